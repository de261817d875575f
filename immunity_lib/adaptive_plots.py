"""Figures of the adaptive evaluation and of the verdicts."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from immunity_lib.plots import COLOURS, SCREEN

GATES = {
    "expected over switches": {"marker": "o", "color": COLOURS[0]},
    "plain ensemble": {"marker": "D", "color": COLOURS[1], "markerfacecolor": "none"},
    "frozen gate": {"marker": "x", "color": COLOURS[2]},
}
VERDICT_COLOURS = {"holds": COLOURS[0], "does not hold": COLOURS[2], "undecided": COLOURS[3]}


def attack_dots(suite: pd.DataFrame, model: str) -> Figure:
    """Accuracy of one model under every attack, a panel for each training, for each of the gates
    that could defend.

    suite: as `adaptive_tables.suite_table` makes it.
    """
    own = suite[suite["model"] == model]
    trainings, attacks = own["training"].unique(), list(dict.fromkeys(own["attack"]))
    figure, axes = plt.subplots(
        1, len(trainings), figsize=(4.8 * len(trainings), 0.26 * len(attacks) + 1.3), dpi=SCREEN,
        squeeze=False, sharey=True, layout="constrained",
    )  # fmt: skip
    rows = {attack: -row for row, attack in enumerate(attacks)}
    kinds = own.drop_duplicates("attack").set_index("attack")["kind"]
    for panel, training in zip(axes.flat, trainings, strict=True):
        of_panel = own[own["training"] == training]
        for gate, style in GATES.items():
            cells = of_panel[of_panel["column"] == gate]
            heights = [rows[attack] for attack in cells["attack"]]
            panel.plot(cells["value"], heights, linestyle="", label=gate, **style)
        before = None
        for attack, kind in kinds.items():
            if before not in (None, kind):
                panel.axhline(rows[attack] + 0.5, color="0.85", linewidth=0.8, zorder=0)
            before = kind
        panel.set(title=f"{training} training", xlabel="accuracy, %", xlim=(-2, 102))
        panel.set_yticks(list(rows.values()), list(rows))
        panel.grid(axis="x", color="0.92")
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return figure


def strength_curves(sampling: pd.DataFrame, budget: pd.DataFrame) -> Figure:
    """Left: accuracy by the number of gates sampled for each gradient, up to all of them. Right:
    accuracy by eps.

    sampling, budget: as `adaptive_tables` makes them, shares in 0 .. 1 of the expectation over
    switches.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.7), dpi=SCREEN, layout="constrained")
    order = list(dict.fromkeys(sampling["samples"]))
    lines = sampling[["training", "model"]].drop_duplicates()
    for (training, model), colour in zip(lines.itertuples(index=False), COLOURS, strict=False):
        own = [frame[(frame["training"] == training) & (frame["model"] == model)]
               for frame in (sampling, budget)]  # fmt: skip
        style = {"color": colour, "marker": ".", "label": f"{model}, {training} training"}
        places = [order.index(samples) for samples in own[0]["samples"]]
        left.plot(places, 100 * own[0]["switched"], **style)
        right.plot(255 * own[1]["eps"], 100 * own[1]["switched"], **style)
    left.set_xticks(range(len(order)), order)
    left.set(xlabel="gates sampled for each gradient", ylabel="accuracy, %")
    right.set_xscale("symlog", base=2, linthresh=2)
    ticks = [0, 2, 4, 8, 16, 32, 64, 128, 255]
    right.set_xticks(ticks, ticks)
    right.set(xlabel="eps, in 255ths; exact expectation attacked", ylim=(0, 100))
    for panel in (left, right):
        panel.spines[["top", "right"]].set_visible(False)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    return figure


def verdict_forest(verdicts: pd.DataFrame) -> Figure:
    """Every claim's effect and 95 % interval beside what it predicts (shaded), coloured by verdict;
    a panel for each unit. Claims that cannot be tested are left out.

    verdicts: as `claims.verdicts` makes them.
    """
    tested = verdicts.dropna(subset="effect")
    units = list(dict.fromkeys(tested["unit"]))
    heights = [max((tested["unit"] == unit).sum(), 1) for unit in units]
    figure, axes = plt.subplots(
        len(units), 1, figsize=(8.6, 0.36 * sum(heights) + 1.1 * len(units) + 0.4), dpi=SCREEN,
        squeeze=False, layout="constrained", gridspec_kw={"height_ratios": heights},
    )  # fmt: skip
    for panel, unit in zip(axes.flat, units, strict=True):
        own = tested[tested["unit"] == unit]
        reach = 1.1 * max(own[["low", "high"]].abs().to_numpy().max(), 12)
        for row, claim in enumerate(own.itertuples(index=False)):
            word, bound = claim.predicted.split()[1:3]
            ends = (float(bound), reach) if word == "least" else (-reach, float(bound))
            panel.fill_betweenx([-row - 0.4, -row + 0.4], *ends, color="0.9", linewidth=0)
            panel.errorbar(
                claim.effect, -row, xerr=[[claim.effect - claim.low], [claim.high - claim.effect]],
                fmt="o", color=VERDICT_COLOURS[claim.verdict], capsize=3,
            )  # fmt: skip
        panel.axvline(0, color="0.5", linewidth=0.8)
        panel.set_yticks(-np.arange(len(own)), own["claim"])
        panel.set(xlim=(-reach, reach), xlabel=f"effect, {unit}")
        panel.spines[["top", "right"]].set_visible(False)
    handles = [
        plt.Line2D([], [], marker="o", linestyle="", color=colour, label=verdict)
        for verdict, colour in VERDICT_COLOURS.items()
    ]
    handles.append(plt.Rectangle((0, 0), 1, 1, color="0.9", label="predicted"))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    return figure
