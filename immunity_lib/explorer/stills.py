"""The explorer's still twins: what its widgets show, as figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from immunity_lib.explorer.drawing import (
    COLOUR_MAP,
    PART_COLOURS,
    brightness,
    colours,
    scale_top,
)
from immunity_lib.explorer.exploration import Answers, Subject
from immunity_lib.explorer.moments import Moment
from immunity_lib.plots import COLOURS, SCREEN

RIGHT, WRONG = COLOURS[0], COLOURS[1]


def gallery(subjects: Sequence[Subject], columns: int = 10) -> Figure:
    """The images to choose from, by their numbers."""
    rows = -(-len(subjects) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(0.95 * columns, 1.12 * rows), dpi=SCREEN, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for number, (panel, subject) in enumerate(zip(axes.T.flat, subjects, strict=False)):
        panel.imshow(colours(subject.image))
        panel.set_title(number + 1, fontsize=8, pad=2)
    for panel in axes.flat:
        panel.set(xticks=[], yticks=[])
    for panel in axes.T.flat[len(subjects) :]:
        panel.set_axis_off()
    return figure


def moments(
    shown: Sequence[Moment], class_names: Sequence[str], masks: Tensor | None = None
) -> Figure:
    """A row for each moment: the image, and the map of every expert with its answer and weight.

    masks: (P, 32, 32), true parts to outline on every picture."""
    experts = len(shown[0].heat)
    figure, axes = plt.subplots(
        len(shown), experts + 1, figsize=(1.5 * (experts + 1) + 0.8, 2.0 * len(shown)), dpi=SCREEN,
        squeeze=False, layout="constrained",
    )  # fmt: skip
    drawn = None
    for row, moment in zip(axes, shown, strict=True):
        row[0].imshow(colours(moment.image))
        row[0].set_title(f"{moment.title.split(',')[0]}, step {moment.step}", fontsize=8)
        row[0].set_xlabel(_told(moment.mixture, class_names, moment.answers.asked), fontsize=8)
        for expert, panel in enumerate(row[1:]):
            heat = moment.heat[expert]
            drawn = panel.imshow(brightness(heat, moment.top), cmap=COLOUR_MAP, vmin=0, vmax=1)
            weight = f"expert {expert + 1}, weight {moment.weights[expert]:.2f}"
            panel.set_title(weight, fontsize=8)
            said = _told(moment.experts[expert], class_names, moment.answers.asked)
            panel.set_xlabel(said, fontsize=8)
    for panel in axes.flat:
        panel.set(xticks=[], yticks=[])
        for mask, colour in zip(() if masks is None else masks, PART_COLOURS, strict=False):
            if mask.any():
                panel.contour(mask.float().numpy(), levels=[0.5], colors=[colour], linewidths=1)
    _heat_scale(figure, drawn, axes, shown[0].top)
    return figure


def gates(found: Mapping[str, Answers], budget_labels: Sequence[str]) -> Figure:
    """Which gates are right at the attack's last step, a panel for each model: budgets down, states
    of the gate across, sorted by how many budgets they withstand."""
    figure, axes = plt.subplots(
        len(found), 1, figsize=(9.4, 0.28 * len(budget_labels) * len(found) + 1.1), dpi=SCREEN,
        squeeze=False, sharex=True, layout="constrained",
    )  # fmt: skip
    for panel, (title, answers) in zip(axes.flat, found.items(), strict=True):
        right = answers.right[:, -1].numpy()
        right = right[:, np.argsort(-right.sum(0), kind="stable")]
        for outcome, marker, colour in ((True, "s", RIGHT), (False, "x", WRONG)):
            down, across = np.nonzero(right == outcome)
            panel.scatter(across + 1, down, 14, marker=marker, color=colour, linewidths=1)
        shares = [f"{label}  ({share:.0%})" for label, share in
                  zip(budget_labels, right.mean(1), strict=True)]  # fmt: skip
        panel.set_yticks(range(len(shares)), shares, fontsize=8)
        panel.set_title(title, fontsize=9)
        panel.set(xlim=(0, right.shape[1] + 1), ylim=(len(shares) - 0.5, -0.5))
        panel.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel("states of the gate (square: right, cross: wrong)")
    figure.supylabel("eps (right gates)", fontsize=9)
    return figure


def methods(image: Tensor, maps: Mapping[str, Tensor]) -> Figure:
    """A row for each CAM method: the maps (N, 32, 32) of every expert for one image and class."""
    experts = len(next(iter(maps.values())))
    figure, axes = plt.subplots(
        len(maps), experts + 1, figsize=(1.15 * (experts + 1) + 1.2, 1.2 * len(maps)), dpi=SCREEN,
        squeeze=False, layout="constrained",
    )  # fmt: skip
    top, drawn = scale_top(list(maps.values())), None
    for row, (method, of_method) in zip(axes, maps.items(), strict=True):
        row[0].imshow(colours(image))
        row[0].set_ylabel(method, rotation=0, ha="right", va="center", fontsize=8)
        for panel, heat in zip(row[1:], of_method, strict=True):
            drawn = panel.imshow(brightness(heat, top), cmap=COLOUR_MAP, vmin=0, vmax=1)
    for expert, panel in enumerate(axes[0, 1:]):
        panel.set_title(f"expert {expert + 1}", fontsize=8)
    for panel in axes.flat:
        panel.set(xticks=[], yticks=[])
    _heat_scale(figure, drawn, axes, top)
    return figure


def _heat_scale(figure: Figure, drawn, axes, top: float) -> None:
    """Brightness is the square root of heat, and its scale says heat."""
    heats = np.array([0, 1, top / 4, top])
    bar = figure.colorbar(drawn, ax=axes, shrink=0.6, ticks=np.sqrt(heats / top))
    bar.ax.set_yticklabels([f"{heat:.0f}" for heat in heats], fontsize=8)
    bar.set_label("heat, in units of an even spread", fontsize=8)


def _told(probabilities: Tensor, class_names: Sequence[str], asked: int) -> str:
    answer = int(probabilities.argmax())
    sign = "" if answer == asked else " x"
    return f"{class_names[answer]} {probabilities[answer]:.0%}{sign}"
