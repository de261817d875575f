"""Figure 1, the architecture of Immunity, drawn from a model itself."""

from __future__ import annotations

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from immunity_lib.experts import Expert
from immunity_lib.moe import ImmunityMoE
from immunity_lib.plots import COLOURS, SCREEN

PLAIN, HEAT, GATE, OUTPUT = COLOURS[8], COLOURS[1], COLOURS[4], COLOURS[0]
START, END = 1.7, 9.0  # where the stages of an expert are drawn


def architecture(model: ImmunityMoE) -> Figure:
    """Figure 1: every expert with its stages and their grids, the Grad-CAM layer, the gate and its
    random switch, the mixture, and the losses on the heat maps."""
    experts = len(model.experts)
    figure, axes = plt.subplots(figsize=(13, 2.8 + 0.9 * experts), dpi=SCREEN, layout="constrained")
    axes.set(xlim=(-0.5, 15.0), ylim=(-2.1, experts + 0.8))
    axes.set_axis_off()
    middle = (experts - 1) / 2
    mixture, losses = -0.1, max(experts - 0.6, 2.0)

    _box(axes, 0.1, middle, 0.9, 0.9, "image", "black")
    for number, expert in enumerate(model.experts):
        _expert(axes, expert, number, experts - 1 - number, middle)
    for row in range(experts):  # outputs to the mixture, heat maps to the losses
        axes.plot([10.05, 10.95], [row + 0.15] * 2, color=OUTPUT, linewidth=1.2)
        axes.plot([10.05, 10.55], [row - 0.3] * 2, color=HEAT, linewidth=1.2)
    axes.plot([10.95] * 2, [min(0.15, mixture), experts - 0.85], color=OUTPUT, linewidth=1.2)
    axes.plot([10.55] * 2, [-0.3, losses], color=HEAT, linewidth=1.2)

    gate = f"gate\n({type(model.gate).__name__})"
    switch = "random switch, section 4.1\nat evaluation, one of N! orders"
    _box(axes, 5.0, -1.6, 2.6, 0.8, gate, GATE)
    _box(axes, 9.3, -1.6, 3.0, 0.8, switch, GATE)
    _arrow(axes, [(0.1, middle - 0.45), (0.1, -1.6), (3.7, -1.6)])
    _arrow(axes, [(6.3, -1.6), (7.8, -1.6)])
    axes.text(7.05, -1.52, r"$g_1 \ldots g_N$", ha="center", va="bottom", fontsize=10)
    _arrow(axes, [(10.8, -1.6), (13.2, -1.6), (13.2, mixture - 0.5)])
    mixed = "mixture, eq (1)\n" + r"$\hat y=\sum_i\, g_i\,\mathrm{softmax}(f_i)$"
    on_maps = "losses on the heat maps:\nMI, eq (9), and PS, eq (11)"
    total = (mixture + losses) / 2
    _box(axes, 13.2, mixture, 3.2, 1.0, mixed, OUTPUT)
    _box(axes, 13.2, losses, 3.2, 0.8, on_maps, HEAT)
    _box(axes, 13.2, total, 3.2, 0.5, r"loss, eq (12): CE $+\,\beta$ MI $+\,\gamma$ PS", "black")
    _arrow(axes, [(10.95, mixture), (11.6, mixture)], OUTPUT)
    _arrow(axes, [(10.55, losses), (11.6, losses)], HEAT)
    _arrow(axes, [(13.2, losses - 0.4), (13.2, total + 0.25)])
    _arrow(axes, [(13.2, mixture + 0.5), (13.2, total - 0.25)])
    return figure


def _expert(axes: Axes, expert: Expert, number: int, row: int, middle: float) -> None:
    """One expert as a row of stages, as high as their grids, with its output and heat map."""
    grids = expert.stage_sides()
    step = (END - START) / len(grids)
    _arrow(axes, [(0.55, middle), (START - 0.05, row + 0.15)])
    for index, (name, side) in enumerate(grids.items()):
        explained = index == expert.head_stages - 1
        centre, height = START + (index + 0.5) * step, 0.12 + 0.5 * side / 32
        width = min(0.8 * step, 0.5)
        axes.add_patch(Rectangle(
            (centre - width / 2, row + 0.15 - height / 2), width, height,
            facecolor=HEAT if explained else PLAIN, edgecolor="black", linewidth=0.6,
        ))  # fmt: skip
        if number == 0:
            axes.text(centre - 0.1, row + 0.55, f"{name} {side}x{side}", rotation=35, fontsize=8,
                      color=HEAT if explained else "black")  # fmt: skip
        if explained:
            axes.plot([centre, centre, 9.35], [row + 0.15 - height / 2, row - 0.3, row - 0.3],
                      color=HEAT, linewidth=1.2)  # fmt: skip
            if number == 0:
                axes.text((centre + END) / 2, row - 0.28, "Grad-CAM, eq (3)", color=HEAT,
                          fontsize=8, ha="center", va="bottom")  # fmt: skip
    _arrow(axes, [(END - 0.02, row + 0.15), (9.35, row + 0.15)])
    axes.text(START, row - 0.3, f"expert {number + 1}", fontsize=9, va="center")
    _box(axes, 9.7, row + 0.15, 0.7, 0.38, f"$f_{{{number + 1}}}$", OUTPUT)
    _box(axes, 9.7, row - 0.3, 0.7, 0.38, f"$h_{{{number + 1}}}$", HEAT)


def _arrow(axes: Axes, points: list[tuple[float, float]], colour: str = "black") -> None:
    """A line through the points that ends in an arrow head."""
    axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.2)
    head = {"arrowstyle": "-|>", "color": colour, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", points[-1], points[-2], arrowprops=head)


def _box(
    axes: Axes, x: float, y: float, width: float, height: float, text: str, colour: str
) -> None:
    shape = FancyBboxPatch(
        (x - width / 2, y - height / 2), width, height, boxstyle="round,pad=0,rounding_size=0.08",
        facecolor="white", edgecolor=colour, linewidth=1.6,
    )  # fmt: skip
    axes.add_patch(shape)
    axes.text(x, y, text, ha="center", va="center", fontsize=9)
