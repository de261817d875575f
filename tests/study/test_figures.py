"""Figures show the data they are given, with names on what they show."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

from immunity_lib import ImmunityMoE, build_expert
from study import figures
from study.store import read_json, write_json
from study.tables import DEFENCES


@pytest.fixture(autouse=True)
def without_a_screen():
    plt.switch_backend("agg")
    yield
    plt.close("all")


def texts(figure) -> list[str]:
    figure.canvas.draw()
    return [text.get_text() for text in figure.findobj(plt.Text) if text.get_text()]


def test_architecture_shows_every_stage_expert_and_equation():
    experts = [build_expert("resnet18", num_classes=10, width=0.0625) for _ in range(3)]
    shown = texts(figures.architecture(ImmunityMoE(experts)))
    for name in ("stem 32x32", "stage1 32x32", "stage2 16x16", "stage3 8x8", "stage4 4x4"):
        assert shown.count(name) == 1
    assert [text for text in shown if text.startswith("expert")] == [
        "expert 1", "expert 2", "expert 3",
    ]  # fmt: skip
    together = " ".join(shown)
    for part in ("eq (1)", "eq (3)", "eq (9)", "eq (11)", "eq (12)", "ConvolutionalGate"):
        assert part in together


def log(accuracy: float) -> list[dict]:
    return [
        {name: 0.5 for name in figures.CURVES}
        | {"epoch": epoch, "accuracy": accuracy, "expert_accuracy": [accuracy - 0.1, accuracy]}
        for epoch in (1, 2, 3)
    ]


def test_training_curves_have_a_line_for_every_model_and_a_band_of_experts():
    figure = figures.training_curves({"MoE": log(0.7), "Immunity": log(0.6)})
    panels = {panel.get_title(): panel for panel in figure.axes}
    assert list(panels) == list(figures.CURVES.values())
    accuracy = panels["accuracy, held out"]
    assert [list(line.get_ydata()) for line in accuracy.lines] == [[0.7] * 3, [0.6] * 3]
    assert accuracy.get_ylim() == (0, 1)
    band = accuracy.collections[0].get_paths()[0].get_extents()
    assert (band.y0, band.y1) == pytest.approx((0.6, 0.7))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["MoE", "Immunity"]


def test_heatmap_grid_has_one_scale_and_marks_empty_maps():
    maps = torch.rand(2, 3, 32, 32)
    maps[1, 2] = 1 / 1024  # an empty map, as the library normalises it
    maps = maps / maps.sum((-2, -1), keepdim=True)
    predictions = [["cat", "dog", "cat"], ["dog", "dog", "cat"]]
    figure = figures.heatmap_grid(torch.rand(2, 3, 32, 32), maps, ["cat", "dog"], predictions)
    panels = np.array(figure.axes[:8]).reshape(2, 4)
    for row in range(2):
        assert panels[row, 0].get_xlabel() == ["cat", "dog"][row]
        for expert in range(3):
            picture = panels[row, expert + 1].images[0]
            assert picture.get_clim() == (0, 1)
            highest = 0 if (row, expert) == (1, 2) else 1
            assert picture.get_array().max() == pytest.approx(highest)
            assert panels[row, expert + 1].get_xlabel() == predictions[row][expert]
    assert texts(figure).count("empty") == 1
    assert panels[0, 3].get_title() == "expert 3"


@pytest.mark.parametrize("name", ["US$ and A$", "$x_1$", "a_b^c", r"\alpha", "caf\udce9"])
def test_C7_a_class_of_any_name_is_drawn_as_text(name):
    """Letter by letter: the pixels are those of the name where formulas are switched off."""
    plain = name.replace("\udce9", "�")  # a byte that is no UTF-8

    def drawn(text, **options):
        figure = plt.figure(figsize=(2, 1), dpi=60)
        figure.text(0, 0.5, text, **options)
        figure.canvas.draw()
        return np.asarray(figure.canvas.buffer_rgba())

    assert np.array_equal(drawn(figures.literal(name)), drawn(plain, parse_math=False))
    maps = torch.rand(1, 1, 32, 32)
    figure = figures.heatmap_grid(torch.rand(1, 3, 32, 32), maps, [name], [[name]])
    assert texts(figure).count(figures.literal(name)) == 2


def test_part_coverage_shows_every_share_and_parts_on_one_scale():
    columns = ["head", "wing", "background"]
    first = pd.DataFrame([[0.1, 0.2, 0.6], [0.3, 0.1, 0.5]], ["expert 1", "expert 2"], columns)
    figure = figures.part_coverage({"MoE": first, "Immunity": first / 2})
    assert [panel.get_title() for panel in figure.axes] == ["MoE", "Immunity"]
    for panel in figure.axes:
        parts, background = panel.collections
        assert (parts.get_clim(), background.get_clim()) == ((0, 0.3), (0, 1))
    assert [text.get_text() for text in figure.axes[0].texts] == [
        "10%", "20%", "30%", "10%", "60%", "50%",
    ]  # fmt: skip


@pytest.mark.parametrize("data_sets", [["CIFAR-10"], ["CIFAR-10", "CIFAR-100"]])
def test_attack_bars_are_expectations_with_whiskers_from_worst_to_best(data_sets):
    values = {"switched": 50, "worst": 40, "best": 70}
    cells = pd.DataFrame([
        {"data": data, "training": training, "model": model, "attack": attack,
         "header": DEFENCES[defence], "value": value + 10 * seed}
        for data in data_sets
        for training in ("standard", "adversarial")
        for model in ("MoE", "Immunity")
        for attack in ("clean", "pgd")
        for seed in (0, 1)
        for defence, value in values.items()
    ])  # fmt: skip
    figure = figures.attack_bars(cells)
    trainings = ["standard training", "adversarial training"]
    several = [f"{data}, {training}" for data in data_sets for training in trainings]
    titles = [panel.get_title() for panel in figure.axes]
    assert titles == (trainings if len(data_sets) == 1 else several)
    for panel in figure.axes:
        assert [tick.get_text() for tick in panel.get_xticklabels()] == ["clean", "PGD"]
        assert panel.get_ylim()[0] == 0 and panel.get_ylim()[1] >= 100
        assert [bar.get_height() for bar in panel.patches] == pytest.approx([55.0] * 4)
        assert [text.get_text() for text in panel.texts] == ["55"] * 4
        whisker = panel.collections[0].get_segments()[0]
        assert list(whisker[:, 1]) == pytest.approx([45, 75])
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["MoE", "Immunity"]


def test_attack_dots_have_a_mark_for_every_gate_and_attack():
    gates = {"expected over switches": 40.0, "plain ensemble": 42.0, "frozen gate": 10.0}
    attacks = [("paper", "fgsm"), ("paper", "pgd"), ("exact", "arc")]
    suite = pd.DataFrame([
        {"training": training, "model": model, "kind": kind, "attack": attack, "column": column,
         "value": value + 5 * row}
        for training in ("standard", "adversarial")
        for model in ("MoE", "Immunity")
        for row, (kind, attack) in enumerate(attacks)
        for column, value in gates.items()
    ])  # fmt: skip
    figure = figures.attack_dots(suite, "Immunity")
    panel, other = figure.axes
    assert (panel.get_title(), other.get_title()) == ("standard training", "adversarial training")
    assert [label.get_text() for label in panel.get_yticklabels()] == ["fgsm", "pgd", "arc"]
    marks = {mark.get_label(): mark for mark in panel.get_lines() if mark.get_label() in gates}
    for gate, value in gates.items():
        assert list(marks[gate].get_xdata()) == [value, value + 5, value + 10]
        assert list(marks[gate].get_ydata()) == [0, -1, -2]


def test_strength_curves_run_from_one_sample_to_all_gates():
    label = {"training": "standard", "model": "MoE"}
    suite = pd.DataFrame([
        label | {"attack": attack, "column": column, "value": value}
        for attack, value in (("pgd", 60), ("eotpgd-1", 50), ("eotpgd-5", 45),
                              ("exact-expected", 40), ("exact-weakest", 44))
        for column in ("expected over switches", "plain ensemble")
    ])  # fmt: skip
    budget = pd.DataFrame([label | {"eps": eps, "value": 100 - eps} for eps in (0.0, 0.5, 1.0)])
    left, right = figures.strength_curves(suite, budget).axes
    assert [tick.get_text() for tick in left.get_xticklabels()] == ["1", "5", "exact"]
    assert list(left.get_lines()[0].get_ydata()) == [50, 45, 40]
    assert list(right.get_lines()[0].get_xdata()) == [0, 127.5, 255]
    assert list(right.get_lines()[0].get_ydata()) == [100, 99.5, 99]


def test_the_forest_shades_what_is_predicted_and_colours_by_verdict():
    claims = pd.DataFrame([
        {"claim": "a", "predicted": "at least +5 points", "effect": 7.0, "low": 6.0, "high": 8.0,
         "unit": "points", "verdict": "holds"},
        {"claim": "b", "predicted": "at most -10 %", "effect": 3.0, "low": -1.0, "high": 7.0,
         "unit": "%", "verdict": "does not hold"},
        {"claim": "c", "predicted": "", "effect": None, "low": None, "high": None, "unit": None,
         "verdict": "not testable at this scale"},
    ])  # fmt: skip
    points, relative = figures.verdict_forest(claims).axes
    assert [label.get_text() for label in points.get_yticklabels()] == ["a"]
    assert [label.get_text() for label in relative.get_yticklabels()] == ["b"]
    shaded = points.collections[0].get_datalim(points.transData)
    assert shaded.x0 == 5 and shaded.x1 > 8
    shaded = relative.collections[0].get_datalim(relative.transData)
    assert shaded.x1 == -10 and shaded.x0 < -10
    assert points.containers[0][0].get_color() == figures.VERDICTS["holds"]


def test_saved_figure_is_the_same_bytes_again_and_names_its_records(make_settings, tmp_path):
    settings = make_settings(output_folder=str(tmp_path))
    record = settings.runs / "models" / "one" / "record.json"
    record.parent.mkdir(parents=True)
    write_json(record, {"provenance": {"commit": "abc"}})

    def save():
        figure = figures.training_curves({"MoE": log(0.7)}, ["accuracy"])
        paths = figures.save_figure(settings, figure, "curves", "Curves.", [record])
        return paths, [path.read_bytes() for path in paths]

    paths, first = save()
    assert [path.name for path in paths] == ["curves.png", "curves.pdf", "curves.json"]
    assert first == save()[1]
    assert first[0].startswith(b"\x89PNG") and first[1].startswith(b"%PDF")
    assert read_json(paths[2])["caption"] == "Curves."
    assert (settings.figures / "records/one.training.json").read_bytes() == record.read_bytes()
