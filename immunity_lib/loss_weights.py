"""What each of the heat-map losses buys, by its weight: from records to one figure."""

from __future__ import annotations

from statistics import mean

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from immunity_lib.plots import COLOURS, SCREEN
from immunity_lib.recipes import swept_models, table3_models
from immunity_lib.settings import Settings
from immunity_lib.tables import SCORES, STRONGEST_FIRST, stored_record

PANELS = {
    "mutual_information": ("I(C,E), nats", 1),
    "independence_score": ("IScore, 1e-3", 1e3),
    "causality_score": ("CScore, pixels^4", 1),
    "empty_maps": ("empty maps, %", 100),
    "part_coverage": ("heat on the best covered part, %", 100),
    "background_heat": ("heat on the background, %", 100),
    "clean": ("accuracy, clean, %", 100),
    "attacked": ("accuracy under attack, %", 100),
}


def weight_sweep(settings: Settings) -> pd.DataFrame:
    """What each loss buys: a line for each loss, factor on its weight (0: without it) and seed.

    loss, factor, seed, clean and attacked (accuracy under PGD or the strongest there is, expected
    over switches), the scores, empty_maps, and where parts are known part_coverage (heat of the
    expert that looks at a part most, mean over parts) and background_heat (mean over experts).
    """
    weighted, steadied = "mutual information", "position stability"
    of_table3 = {"moe": [(weighted, 0.0), (steadied, 0.0)]}
    of_table3 |= {"moe-mi": [(weighted, 1.0)], "moe-ps": [(steadied, 1.0)]}
    points = [
        (*point, name)
        for name in table3_models(settings)
        for point in of_table3.get(name.method, [])
    ]
    points += [
        (weighted, name.beta / settings.beta, name)
        if name.beta
        else (steadied, name.gamma / settings.gamma, name)
        for name in swept_models(settings)
    ]
    attack = next(name for name in STRONGEST_FIRST if name in settings.attacks)
    lines = []
    for loss, factor, name in points:
        scored = stored_record(settings, name, "scores")["result"]["test"]
        (attacked,) = (
            entry["switched"]
            for entry in stored_record(settings, name, "attacks")["result"]["attacks"]
            if (entry["attack"], entry["attacked_gate"]) == (attack, settings.attack_gates[0])
        )
        line = {"loss": loss, "factor": factor, "seed": name.seed}
        line |= {"clean": scored["accuracy"]["switched"], "attacked": attacked}
        line |= {score: scored[score] for score in SCORES}
        if "part_coverage" in scored:
            line["part_coverage"] = mean(map(max, zip(*scored["part_coverage"], strict=True)))
            line["background_heat"] = mean(scored["background_heat"])
        lines.append(line)
    return pd.DataFrame(lines).sort_values(["loss", "factor", "seed"], ignore_index=True)


def weight_curves(sweep: pd.DataFrame) -> Figure:
    """What each loss buys by its weight, a panel for each measure; points are seeds, lines means.

    sweep: as `weight_sweep` makes it.
    """
    shown = [measure for measure in PANELS if measure in sweep and sweep[measure].notna().all()]
    columns = 4
    rows = -(-len(shown) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(2.9 * columns, 2.6 * rows + 0.6), dpi=SCREEN, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    factors = sorted(sweep["factor"].unique())
    places = {factor: place for place, factor in enumerate(factors)}
    for panel, measure in zip(axes.flat, shown, strict=False):
        title, scale = PANELS[measure]
        for (loss, own), colour in zip(sweep.groupby("loss"), COLOURS, strict=False):
            panel.plot(own["factor"].map(places), scale * own[measure], ".", color=colour)
            means = scale * own.groupby("factor")[measure].mean()
            panel.plot(means.index.map(places), means, color=colour, label=loss)
        panel.set(title=title, ylim=(0, None))
        panel.set_xticks(range(len(factors)), [f"{factor:g}" for factor in factors])
        panel.spines[["top", "right"]].set_visible(False)
    for panel in axes.flat[len(shown) :]:
        panel.set_axis_off()
    figure.supxlabel("weight of the loss, times the preset's; the other loss is off", fontsize=10)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False)
    return figure
