"""Figures show the data they are given, with names on what they show."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from immunity_lib import plots
from immunity_lib.architecture import architecture
from immunity_lib.experts import build_expert
from immunity_lib.moe import ImmunityMoE
from immunity_lib.records import read_record, write_record
from immunity_lib.settings import load_preset


@pytest.fixture(autouse=True, scope="module")
def without_a_screen():
    plt.switch_backend("agg")


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    plt.close("all")


def texts(figure) -> list[str]:
    figure.canvas.draw()
    return [text.get_text() for text in figure.findobj(plt.Text) if text.get_text()]


def test_architecture_shows_every_stage_expert_and_equation():
    experts = [build_expert("resnet18", num_classes=10, width=0.0625) for _ in range(3)]
    shown = texts(architecture(ImmunityMoE(experts)))
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
        {name: 0.5 for name in plots.CURVES}
        | {"epoch": epoch, "accuracy": accuracy, "expert_accuracy": [accuracy - 0.1, accuracy]}
        for epoch in (1, 2, 3)
    ]


def test_training_curves_have_a_line_for_every_model_and_a_band_of_experts():
    figure = plots.training_curves({"MoE": log(0.7), "Immunity": log(0.6)})
    panels = {panel.get_title(): panel for panel in figure.axes}
    assert list(panels) == list(plots.CURVES.values())
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
    figure = plots.heatmap_grid(torch.rand(2, 3, 32, 32), maps, ["cat", "dog"], predictions)
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


def test_part_coverage_shows_every_share_and_parts_on_one_scale():
    columns = ["head", "wing", "background"]
    first = pd.DataFrame([[0.1, 0.2, 0.6], [0.3, 0.1, 0.5]], ["expert 1", "expert 2"], columns)
    figure = plots.part_coverage({"MoE": first, "Immunity": first / 2})
    assert [panel.get_title() for panel in figure.axes] == ["MoE", "Immunity"]
    for panel in figure.axes:
        parts, background = panel.collections
        assert (parts.get_clim(), background.get_clim()) == ((0, 0.3), (0, 1))
    assert [text.get_text() for text in figure.axes[0].texts] == [
        "10%", "20%", "30%", "10%", "60%", "50%",
    ]  # fmt: skip
    assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()] == columns


@pytest.mark.parametrize("data_sets", [["CIFAR-10"], ["CIFAR-10", "CIFAR-100"]])
def test_attack_bars_are_expectations_with_whiskers_from_worst_to_best(data_sets):
    lines = [
        {"data": data, "regime": regime, "model": model, "attack": attack, "seed": seed,
         "switched": 0.5 + 0.1 * seed, "worst": 0.4 + 0.1 * seed, "best": 0.7 + 0.1 * seed}
        for data in data_sets
        for regime in ("standard", "adversarial")
        for model in ("MoE", "Immunity")
        for attack in ("clean", "PGD")
        for seed in (0, 1)
    ]  # fmt: skip
    figure = plots.attack_bars(pd.DataFrame(lines))
    regimes = ["standard training", "adversarial training"]
    several = [f"{data}, {regime}" for data in data_sets for regime in regimes]
    titles = [panel.get_title() for panel in figure.axes]
    assert titles == (regimes if len(data_sets) == 1 else several)
    for panel in figure.axes:
        assert [tick.get_text() for tick in panel.get_xticklabels()] == ["clean", "PGD"]
        assert panel.get_ylim()[0] == 0 and panel.get_ylim()[1] >= 100
        assert [bar.get_height() for bar in panel.patches] == pytest.approx([55.0] * 4)
        assert [text.get_text() for text in panel.texts] == ["55"] * 4
        whisker = panel.collections[0].get_segments()[0]
        assert list(whisker[:, 1]) == pytest.approx([45, 75])


def test_saved_figure_is_the_same_bytes_again_and_names_its_records(tmp_path):
    preset = tmp_path / "scratch.yaml"
    content = {"dataset": "parts10", "compared_experts": ["googlenet"]}
    preset.write_text(yaml.safe_dump(content))
    settings = load_preset(str(preset), output_folder=str(tmp_path))
    record = settings.runs / "models" / "one" / "record.json"
    write_record(record, {"provenance": {"commit": "abc"}})

    def save():
        figure = plots.training_curves({"MoE": log(0.7)}, ["accuracy"])
        paths = plots.save_figure(settings, figure, "curves", "Curves.", [record])
        return paths, [path.read_bytes() for path in paths]

    paths, first = save()
    assert [path.name for path in paths] == ["curves.png", "curves.pdf", "curves.json"]
    assert first == save()[1]
    assert first[0].startswith(b"\x89PNG") and first[1].startswith(b"%PDF")
    sidecar = read_record(paths[2])
    assert sidecar["caption"] == "Curves."
    assert sidecar["records"][0]["file"] == "records/one.training.json"
    copy = settings.figures / "records/one.training.json"
    assert copy.read_bytes() == record.read_bytes()
