"""Figures of the adaptive evaluation: every number is where it belongs."""

import pandas as pd
import pytest
from matplotlib import pyplot as plt

from immunity_lib.adaptive_plots import attack_dots, strength_curves, verdict_forest
from immunity_lib.loss_weights import weight_curves

ATTACKS = [("paper", "fgsm"), ("paper", "pgd"), ("exact", "arc")]


@pytest.fixture(autouse=True)
def without_a_screen():
    plt.switch_backend("agg")
    yield
    plt.close("all")


def test_attack_dots_have_a_mark_for_every_gate_and_attack():
    gates = {"expected over switches": 40.0, "plain ensemble": 42.0, "frozen gate": 10.0}
    suite = pd.DataFrame([
        {"training": training, "model": model, "kind": kind, "attack": attack, "column": column,
         "value": value + 5 * row}
        for training in ("standard", "adversarial")
        for model in ("MoE", "Immunity")
        for row, (kind, attack) in enumerate(ATTACKS)
        for column, value in gates.items()
    ])  # fmt: skip
    figure = attack_dots(suite, "Immunity")
    assert [panel.get_title() for panel in figure.axes] == [
        "standard training", "adversarial training"
    ]  # fmt: skip
    panel = figure.axes[0]
    assert [label.get_text() for label in panel.get_yticklabels()] == ["fgsm", "pgd", "arc"]
    marks = {mark.get_label(): mark for mark in panel.get_lines() if mark.get_label() in gates}
    for gate, value in gates.items():
        assert list(marks[gate].get_xdata()) == [value, value + 5, value + 10]
        assert list(marks[gate].get_ydata()) == [0, -1, -2]


def test_strength_curves_run_from_one_sample_to_all_gates():
    label = {"training": "standard", "model": "MoE"}
    sampling = pd.DataFrame([
        label | {"samples": samples, "switched": switched}
        for samples, switched in (("1", 0.5), ("5", 0.45), ("exact", 0.4))
    ])  # fmt: skip
    budget = pd.DataFrame([label | {"eps": eps, "switched": 1 - eps} for eps in (0.0, 0.5, 1.0)])
    left, right = strength_curves(sampling, budget).axes
    assert [tick.get_text() for tick in left.get_xticklabels()] == ["1", "5", "exact"]
    assert list(left.get_lines()[0].get_ydata()) == [50, 45, 40]
    assert list(right.get_lines()[0].get_xdata()) == [0, 127.5, 255]
    assert list(right.get_lines()[0].get_ydata()) == [100, 50, 0]


def test_the_forest_shades_what_is_predicted_and_colours_by_verdict():
    claims = pd.DataFrame([
        {"claim": "a", "predicted": "at least +5 points", "effect": 7.0, "low": 6.0, "high": 8.0,
         "unit": "points", "verdict": "holds"},
        {"claim": "b", "predicted": "at most -10 %", "effect": 3.0, "low": -1.0, "high": 7.0,
         "unit": "%", "verdict": "does not hold"},
        {"claim": "c", "predicted": "", "effect": None, "low": None, "high": None, "unit": None,
         "verdict": "not testable at this scale"},
    ])  # fmt: skip
    points, relative = verdict_forest(claims).axes
    assert [label.get_text() for label in points.get_yticklabels()] == ["a"]
    assert [label.get_text() for label in relative.get_yticklabels()] == ["b"]
    shaded = points.collections[0].get_datalim(points.transData)
    assert shaded.x0 == 5 and shaded.x1 > 8
    shaded = relative.collections[0].get_datalim(relative.transData)
    assert shaded.x1 == -10 and shaded.x0 < -10


def test_weight_curves_have_a_panel_for_each_measure_there_is():
    sweep = pd.DataFrame([
        {"loss": loss, "factor": factor, "seed": 0, "clean": 0.5, "attacked": 0.1,
         "mutual_information": factor, "background_heat": None}
        for loss in ("mutual information", "position stability") for factor in (0.0, 1.0, 4.0)
    ])  # fmt: skip
    figure = weight_curves(sweep)
    titles = [panel.get_title() for panel in figure.axes if panel.axison]
    assert titles == ["I(C,E), nats", "accuracy, clean, %", "accuracy under attack, %"]
    panel = figure.axes[0]
    assert [tick.get_text() for tick in panel.get_xticklabels()] == ["0", "1", "4"]
    assert any(list(line.get_ydata()) == [0, 1, 4] for line in panel.get_lines())
