"""Figures show the data they are given, with names on what they show."""

from itertools import product

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

from immunity_lib import ImmunityMoE, build_expert
from study import figures
from study.store import read_json, write_json
from study.tables import DEFENCES

pytestmark = pytest.mark.usefixtures("closing_figures")
LOG = [dict.fromkeys(figures.CURVES, 0.5) | {"epoch": epoch, "expert_accuracy": [0.4, 0.5]} for epoch in (1, 2, 3)]
TRAININGS = {"standard": "standard training", "adversarial": "adversarial training"}


def texts(texts_of):
    return [text.get_text() for text in texts_of]


def frame(fields, rows):
    return pd.DataFrame(rows, columns=fields.split(", "))


def test_architecture_shows_every_stage_expert_and_equation():
    experts = [build_expert("resnet18", num_classes=10, width=0.0625) for _ in range(3)]
    shown = texts(figures.architecture(ImmunityMoE(experts)).findobj(plt.Text))
    once = ["expert 1", "expert 2", "expert 3", "stem 32x32"]
    once += ["stage1 32x32", "stage2 16x16", "stage3 8x8", "stage4 4x4"]
    assert [shown.count(name) for name in once] == [1] * len(once)
    assert all(f"eq ({number})" in " ".join(shown) for number in (1, 3, 9, 11, 12))


def test_training_curves_have_a_line_for_every_model_and_a_band_of_experts():
    figure = figures.training_curves({"MoE": LOG, "Immunity": [one | {"accuracy": 0.6} for one in LOG]})
    assert [panel.get_title() for panel in figure.axes] == list(figures.CURVES.values())
    accuracy = figure.axes[list(figures.CURVES).index("accuracy")]
    assert [list(line.get_ydata()) for line in accuracy.lines] == [[0.5] * 3, [0.6] * 3]
    band = accuracy.collections[0].get_paths()[0].get_extents()
    assert (band.y0, band.y1) == pytest.approx((0.4, 0.5))
    assert texts(figure.legends[0].get_texts()) == ["MoE", "Immunity"]


def test_heatmap_grid_has_one_scale_and_marks_empty_maps():
    maps = torch.rand(2, 3, 32, 32)
    maps[1, 2] = 1 / 1024  # an empty map, as the library normalises it
    maps = maps / maps.sum((-2, -1), keepdim=True)
    predictions = [["cat", "dog", "cat"], ["dog", "dog", "cat"]]
    figure = figures.heatmap_grid(torch.rand(2, 3, 32, 32), maps, ["cat", "dog"], predictions)
    panels = np.array(figure.axes[:8]).reshape(2, 4)
    assert [panel.get_xlabel() for panel in panels[:, 0]] == ["cat", "dog"]
    for row, expert in np.ndindex(2, 3):
        picture = panels[row, expert + 1].images[0]
        assert picture.get_clim() == (0, 1)
        assert picture.get_array().max() == pytest.approx(float((row, expert) != (1, 2)))
        assert panels[row, expert + 1].get_xlabel() == predictions[row][expert]
    assert texts(figure.findobj(plt.Text)).count("empty") == 1


@pytest.mark.parametrize("name", ["US$ and A$", "$x_1$", "a_b^c", r"\alpha", "caf\udce9"])
def test_C7_a_class_of_any_name_is_drawn_as_text(name):
    """Letter by letter: the pixels are those of the name where formulas are switched off."""
    plain = name.replace("\udce9", "\ufffd")  # a byte that is no UTF-8

    def drawn(text, **options):
        figure = plt.figure(figsize=(2, 1), dpi=60)
        figure.text(0, 0.5, text, **options)
        figure.canvas.draw()
        return np.asarray(figure.canvas.buffer_rgba())

    assert np.array_equal(drawn(figures.literal(name)), drawn(plain, parse_math=False))
    grid = figures.heatmap_grid(torch.rand(1, 3, 32, 32), torch.rand(1, 1, 32, 32), [name], [[name]])
    assert texts(grid.findobj(plt.Text)).count(figures.literal(name)) == 2


def test_part_coverage_shows_every_share_and_parts_on_one_scale():
    first = frame("head, wing, background", [[0.1, 0.2, 0.6], [0.3, 0.1, 0.5]])
    figure = figures.part_coverage({"MoE": first, "Immunity": first / 2})
    assert [panel.get_title() for panel in figure.axes] == ["MoE", "Immunity"]
    assert all([one.get_clim() for one in panel.collections] == [(0, 0.3), (0, 1)] for panel in figure.axes)
    assert texts(figure.axes[0].texts) == ["10%", "20%", "30%", "10%", "60%", "50%"]


@pytest.mark.parametrize("data_sets", [["CIFAR-10"], ["CIFAR-10", "CIFAR-100"]])
def test_attack_bars_are_expectations_with_whiskers_from_worst_to_best(data_sets):
    values = {DEFENCES["switched"]: 50, DEFENCES["worst"]: 40, DEFENCES["best"]: 70}
    rows = product(data_sets, TRAININGS, ("MoE", "Immunity"), ("clean", "pgd"), values, (0, 10))
    cells = frame("data, training, model, attack, header, value", rows)
    cells["value"] += cells["header"].map(values)  # of two seeds
    figure = figures.attack_bars(cells)
    several = [f"{data}, {training}" for data in data_sets for training in TRAININGS.values()]
    titles = [panel.get_title() for panel in figure.axes]
    assert titles == (several if len(data_sets) > 1 else list(TRAININGS.values()))
    for panel in figure.axes:
        assert texts(panel.get_xticklabels()) == ["clean", "PGD"] and panel.get_ylim()[0] == 0
        assert [bar.get_height() for bar in panel.patches] == pytest.approx([55.0] * 4)
        assert list(panel.collections[0].get_segments()[0][:, 1]) == pytest.approx([45, 75])
    assert texts(figure.legends[0].get_texts()) == ["MoE", "Immunity"]


def test_attack_dots_have_a_mark_for_every_gate_and_attack():
    gates = {"expected over switches": 40.0, "plain ensemble": 42.0, "frozen gate": 10.0}
    attacks = [("paper", "fgsm", 0), ("paper", "pgd", 5), ("exact", "strongest", 10)]
    rows = product(TRAININGS, ("MoE", "Immunity"), attacks, gates)
    rows = [(training, model, *attack, column) for training, model, attack, column in rows]
    suite = frame("training, model, kind, attack, value, column", rows)
    suite["value"] += suite["column"].map(gates)
    panel, other = figures.attack_dots(suite, "Immunity").axes
    assert [panel.get_title(), other.get_title()] == list(TRAININGS.values())
    assert texts(panel.get_yticklabels()) == ["fgsm", "pgd", "strongest"]
    marks = {mark.get_label(): mark for mark in panel.get_lines() if mark.get_label() in gates}
    for gate, value in gates.items():
        assert marks[gate].get_xydata().tolist() == [[value, 0], [value + 5, -1], [value + 10, -2]]


def test_strength_curves_run_from_one_sample_to_all_gates():
    shown = {"pgd": 60, "eotpgd-1": 50, "eotpgd-5": 45, "exact-expected": 40, "exact-strongest": 38}
    suite = frame("attack, value", shown.items()).assign(training="standard", model="MoE")
    suite = pd.concat([suite.assign(column=gate) for gate in ("expected over switches", "plain ensemble")])
    budget = frame("eps, value", [(0.0, 100), (0.5, 99.5), (1.0, 99)]).assign(training="standard", model="MoE")
    left, right = figures.strength_curves(suite, budget).axes
    assert texts(left.get_xticklabels()) == ["1", "5", "exact"]
    assert list(left.get_lines()[0].get_ydata()) == [50, 45, 40]
    assert right.get_lines()[0].get_xydata().tolist() == [[0, 100], [127.5, 99.5], [255, 99]]


def test_strength_curves_have_a_line_for_each_model_and_training():
    """A single network is not attacked by samples of a gate."""
    models = [(f"model {k}", training) for k in range(6) for training in ("standard", "adversarial")]
    suite, budget = (frame("model, training", models).assign(column="expected over switches") for _ in range(2))
    alone, mixture = (suite["model"] == "model 0"), suite.assign(attack="eotpgd-1", value=50)
    suite = pd.concat([suite[alone].assign(attack="exact-expected", value=40), mixture[~alone]])
    figure = figures.strength_curves(suite, budget.assign(eps=0.5, value=60))
    left, right = figure.axes
    drawn = {(line.get_color(), line.get_linestyle()) for line in right.get_lines()}
    assert len(drawn) == len(models) and texts(left.get_xticklabels()) == ["1", "exact"]
    figure.canvas.draw()
    assert 0 <= figure.legends[0].get_window_extent().x0


def test_the_forest_shades_what_is_predicted_and_colours_by_verdict():
    claims = [
        ("a", "at least +5 points", 7.0, 6.0, 8.0, "points", "holds"), ("c", "", *[None] * 4, "not testable"),
        ("b", "at most -10 %", 3.0, -1.0, 7.0, "%", "does not hold"),
        ("d", "at least +5 points", 7.0, 6.0, 8.0, "points", "one training: no verdict"),
    ]  # fmt: skip
    points, relative = figures.verdict_forest(frame("title, predicted, effect, low, high, unit, verdict", claims)).axes
    assert texts(points.get_yticklabels()) == ["a", "d"] and texts(relative.get_yticklabels()) == ["b"]
    above, below = (panel.collections[0].get_datalim(panel.transData) for panel in (points, relative))
    assert above.x0 == 5 and above.x1 > 8 and below.x1 == -10 and below.x0 < -10
    judged, alone = (container[0] for container in points.containers)
    assert judged.get_color() == figures.VERDICTS["holds"] and judged.get_markerfacecolor() != "none"
    assert alone.get_color() == figures.VERDICTS["no verdict"] and alone.get_markerfacecolor() == "none"


def test_saved_figure_is_the_same_bytes_again_and_says_what_it_rests_on(make_settings, tmp_path):
    settings = make_settings(output_folder=str(tmp_path))
    name = "parts10-moe-resnet18-standard-seed0"
    record = settings.runs / "models" / name / "record.json"
    write_json(record, {"kind": "training", "model": name, "provenance": {"commit": "abc", "finished": "now"}})
    saved = []
    for _ in range(2):
        figure = figures.training_curves({"MoE": LOG}, ["accuracy"])
        figures.save_figure(settings, figure, "curves", "Curves.", [record])
        paths = [settings.figures / f"curves.{ending}" for ending in ("png", "pdf", "json")]
        saved.append([path.read_bytes() for path in paths])
    assert saved[0] == saved[1]
    assert saved[0][0].startswith(b"\x89PNG") and saved[0][1].startswith(b"%PDF")
    sidecar = read_json(paths[2])
    assert sidecar["caption"] == "Curves. Preset tiny, Parts-10, one seed."
    assert sidecar["settings"]["recipe"]["eps"] == "8/255"
    assert sidecar["records"] == [{"file": f"records/{name}.training.json", "provenance": {"commit": "abc"}}]
    assert not {"data_folder", "output_folder"} & sidecar["settings"].keys()
    assert (settings.figures / f"records/{name}.training.json").read_bytes() == record.read_bytes()
