"""The paper's figures and those around them. Every function takes data and returns a `Figure`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
from matplotlib import color_sequences
from matplotlib.figure import Figure
from torch import Tensor

from immunity_lib.artefacts import write_artefact
from immunity_lib.heatmaps import is_empty
from immunity_lib.settings import Settings

if TYPE_CHECKING:
    import pandas as pd

COLOURS = color_sequences["petroff10"]  # told apart by colour-blind readers too
SCREEN, PRINT = 90, 150  # dots per inch

# Entries of a training log, with their axes' names
CURVES = {
    "accuracy": "accuracy, held out",
    "cross_entropy": "cross entropy, eq (2)",
    "mutual_information_loss": "MI loss, eq (9)",
    "position_stability_loss": "PS loss, eq (11)",
    "empty_maps": "share of empty maps",
    "mutual_information": "I(C,E), nats",
    "gate_entropy": "entropy of the gate, nats",
    "input_gradient": "norm of the input's gradient",
}


def training_curves(
    logs: Mapping[str, Sequence[Mapping]], curves: Sequence[str] = tuple(CURVES)
) -> Figure:
    """Training logs (one entry an epoch) by model, a panel for each of the `curves`.

    The accuracy of the mixture is the line, that of the weakest to the strongest expert the band.
    """
    columns = min(4, len(curves))
    rows = -(-len(curves) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(3.1 * columns, 2.6 * rows + 0.4), dpi=SCREEN, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for panel, curve in zip(axes.flat, curves, strict=False):
        for (model, log), colour in zip(logs.items(), COLOURS, strict=False):
            epochs = [entry["epoch"] for entry in log]
            values = np.array([entry[curve] for entry in log])
            panel.plot(epochs, values, marker=".", color=colour, label=model)
            if curve == "accuracy":
                experts = np.array([entry["expert_accuracy"] for entry in log])
                panel.fill_between(epochs, experts.min(1), experts.max(1), color=colour, alpha=0.15)
        panel.set(title=CURVES[curve], xlabel="epoch")
        highest = max(entry[curve] for log in logs.values() for entry in log)
        panel.set_ylim(0, 1 if curve in ("accuracy", "empty_maps") else 1.1 * highest or 1)
        panel.xaxis.get_major_locator().set_params(integer=True)
    for panel in axes.flat[len(curves) :]:
        panel.set_axis_off()
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    return figure


def heatmap_grid(
    images: Tensor, maps: Tensor, titles: Sequence[str], predictions: Sequence[Sequence[str]] = ()
) -> Figure:
    """Images beside the heat map of every expert, as Figure 2.

    images: (B, 3, 32, 32) in [0, 1]; maps: (B, N, 32, 32), drawn divided by their maxima on one
    colour scale; an empty map is marked. titles: B; predictions: B x N, set below the maps.
    """
    rows, experts = maps.shape[:2]
    figure, axes = plt.subplots(
        rows, experts + 1, figsize=(1.55 * (experts + 1) + 0.7, 1.75 * rows + 0.3), dpi=SCREEN,
        squeeze=False, layout="constrained",
    )  # fmt: skip
    drawn = None
    for row in range(rows):
        axes[row, 0].imshow(images[row].permute(1, 2, 0).numpy(force=True))
        axes[row, 0].set_xlabel(titles[row], fontsize=9)
        for expert in range(experts):
            panel, heat = axes[row, expert + 1], maps[row, expert].numpy(force=True)
            empty = bool(is_empty(maps[row, expert]))
            heat = heat * 0 if empty else heat / heat.max()
            drawn = panel.imshow(heat, cmap="magma", vmin=0, vmax=1)
            if empty:
                panel.text(15.5, 15.5, "empty", color="white", ha="center", va="center")
            if predictions:
                panel.set_xlabel(predictions[row][expert], fontsize=9)
            if row == 0:
                panel.set_title(f"expert {expert + 1}", fontsize=10)
    axes[0, 0].set_title("image", fontsize=10)
    for panel in axes.flat:
        panel.set(xticks=[], yticks=[])
    figure.colorbar(drawn, ax=axes, label="heat / maximum", shrink=0.7)
    return figure


def part_coverage(panels: Mapping[str, pd.DataFrame]) -> Figure:
    """Share of every expert's heat on each part and on the background, a panel for each model.

    panels: by title, frames with a row an expert and a column a part, the last one "background",
    shares in 0 .. 1. The parts share one colour scale; the background, in grey, has its own.
    """
    import seaborn as sns  # costs seconds, which only this figure should pay

    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    height = 0.42 * len(next(iter(panels.values()))) + 1.1
    figure, axes = plt.subplots(
        rows, columns, figsize=(4.6 * columns, height * rows), dpi=SCREEN, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    highest = max(frame.drop(columns="background").to_numpy().max() for frame in panels.values())
    for panel, (title, frame) in zip(axes.flat, panels.items(), strict=False):
        background = np.tile(frame.columns == "background", (len(frame), 1))
        for hidden, colours, top in ((background, "viridis", highest), (~background, "Greys", 1)):
            sns.heatmap(
                frame, mask=hidden, ax=panel, cmap=colours, vmin=0, vmax=top, annot=True,
                fmt=".0%", cbar=False, linewidths=1,
            )  # fmt: skip
        panel.set(title=title)
        panel.tick_params(axis="y", rotation=0)
    return figure


def attack_bars(accuracies: pd.DataFrame) -> Figure:
    """Accuracy under every attack, a panel for each data set and regime: bars are the expectation
    over the switched gate, whiskers reach from its worst to its best permutation (means over
    seeds).

    accuracies: as `tables.gate_accuracies` makes them, of one attacked gate and clean.
    """
    data_sets, regimes = accuracies["data"].unique(), accuracies["regime"].unique()
    attacks, models = accuracies["attack"].unique(), accuracies["model"].unique()
    bar = 0.8 / len(models)
    panel_width = max(5.2, 0.25 * len(attacks) * len(models))
    figure, axes = plt.subplots(
        len(data_sets), len(regimes), figsize=(panel_width * len(regimes), 3.6 * len(data_sets)),
        dpi=SCREEN, squeeze=False, sharey=True, layout="constrained",
    )  # fmt: skip
    panels = dict(zip(product(data_sets, regimes), axes.flat, strict=True))
    for (data, regime), of_panel in accuracies.groupby(["data", "regime"]):
        panel = panels[data, regime]
        for position, (model, colour) in enumerate(zip(models, COLOURS, strict=False)):
            of_model = of_panel[of_panel["model"] == model].groupby("attack", sort=False)
            share = 100 * of_model[["switched", "worst", "best"]].mean().loc[list(attacks)]
            places = np.arange(len(attacks)) + (position - (len(models) - 1) / 2) * bar
            reach = [share["switched"] - share["worst"], share["best"] - share["switched"]]
            panel.bar(places, share["switched"], bar, color=colour, label=model)
            panel.errorbar(
                places, share["switched"], np.clip(reach, 0, None), fmt="none", ecolor="black",
                capsize=2, linewidth=1,
            )  # fmt: skip
            for place, value, top in zip(places, share["switched"], share["best"], strict=True):
                panel.text(place, top + 1.5, f"{value:.0f}", ha="center", fontsize=8)
        panel.set_xticks(range(len(attacks)), attacks)
        title = f"{regime} training" if len(data_sets) == 1 else f"{data}, {regime} training"
        panel.set(title=title, ylim=(0, 106))
        panel.spines[["top", "right"]].set_visible(False)
    for panel in axes[:, 0]:
        panel.set_ylabel("accuracy, %")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return figure


def save_figure(
    settings: Settings, figure: Figure, name: str, caption: str, records: Sequence[Path]
) -> list[Path]:
    """Write figures/<preset>/<name>.png, .pdf and .json (see artefacts); returns their paths.

    records: the files that the figure was drawn from. No date goes into the pictures, so the same
    data give the same bytes.
    """
    undated = {"png": {}, "pdf": {"CreationDate": None}}
    contents = {}
    for ending, metadata in undated.items():
        content = BytesIO()
        figure.savefig(content, format=ending, dpi=PRINT, metadata=metadata)
        contents[ending] = content.getvalue()
    return write_artefact(settings, name, contents, caption, records)
