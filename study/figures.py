"""The paper's figures and those around them. Every function takes data and returns a `Figure`."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from itertools import cycle
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib import color_sequences
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from immunity_lib.heatmaps import is_empty
from immunity_lib.moe import ImmunityMoE
from study.catalogue import ModelName
from study.settings import Settings
from study.store import read_json, write_artefact
from study.tables import DEFENCES, attack_title, preset_text

COLOURS = color_sequences["petroff10"]  # told apart by colour-blind readers too
LINES = "-", "--", "-.", ":"
SCREEN, PRINT = 90, 150  # dots per inch
BARE = {"xticks": [], "yticks": []}
CURVES = {  # entries of a training log, with their axes' names
    "accuracy": "accuracy, held out",
    "cross_entropy": "cross entropy, eq (2)",
    "mutual_information_loss": "MI loss, eq (9)",
    "position_stability_loss": "PS loss, eq (11)",
    "empty_maps": "share of empty maps",
    "mutual_information": "I(C,E), nats",
    "gate_entropy": "entropy of the gate, nats",
    "input_gradient": "norm of the input's gradient",
}
VERDICTS = {
    "holds": COLOURS[0], "does not hold": COLOURS[2], "no effect": COLOURS[1], "undecided": COLOURS[3],
    "no verdict": "0.7",
}  # fmt: skip


def save_figure(settings: Settings, figure: Figure, name: str, caption: str, records: Sequence[Path]) -> None:
    """Write figures/<preset>/<name>.png, .pdf and .json (see `write_artefact`).
    records: the files that the figure was drawn from; the caption will tell the preset, and their data and seeds. No
    date goes in: the same data give the same bytes."""
    contents = {}
    for ending, metadata in {"png": {}, "pdf": {"CreationDate": None}}.items():
        content = BytesIO()
        figure.savefig(content, format=ending, dpi=PRINT, metadata=metadata)
        contents[ending] = content.getvalue()
    if records:
        names = [ModelName.parse(read_json(path)["model"]) for path in records]
        datasets = dict.fromkeys(name.dataset for name in names)
        caption += f" {preset_text(settings, datasets, {name.seed for name in names})}."
    write_artefact(settings, name, contents, caption, records)


def literal(text: str) -> str:
    """A name as matplotlib draws it letter by letter: dollars begin no formula, and bytes that are no text, as a
    folder's name may have, become a replacement character."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace").replace("$", r"\$")


def make_grid(rows: int, columns: int, size: tuple[float, float], **options) -> tuple[Figure, np.ndarray]:
    """A figure of so many inches, and its axes, (rows, columns)."""
    return plt.subplots(rows, columns, figsize=size, dpi=SCREEN, squeeze=False, layout="constrained", **options)


def make_panels(count: int, columns: int, width: float, height: float, **options):
    """A figure and its panels, so many and at most so many side by side; inches a panel."""
    columns, rows = min(columns, count), -(-count // columns)
    figure, axes = make_grid(rows, columns, (width * columns, height * rows + 0.4), **options)
    for panel in axes.flat:
        panel.spines[["top", "right"]].set_visible(False)
    for panel in axes.flat[count:]:
        panel.set_axis_off()
    return figure, list(axes.flat[:count])


def add_legend(figure: Figure, panel: Axes, columns: int) -> Figure:
    """The figure with one legend for all panels: that of one of them."""
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    return figure


def training_curves(logs: Mapping[str, Sequence[Mapping]], curves: Sequence[str] = tuple(CURVES)) -> Figure:
    """Training logs (one entry an epoch) by model, a panel for each of the `curves`.
    The accuracy of the mixture is the line, that of the weakest to the strongest expert the band."""
    figure, panels = make_panels(len(curves), 4, 3.1, 2.6)
    for panel, curve in zip(panels, curves, strict=True):
        for (model, log), colour in zip(logs.items(), cycle(COLOURS), strict=False):
            epochs, values = [entry["epoch"] for entry in log], [entry[curve] for entry in log]
            panel.plot(epochs, values, marker=".", color=colour, label=model)
            if curve == "accuracy":
                experts = np.array([entry["expert_accuracy"] for entry in log])
                panel.fill_between(epochs, experts.min(1), experts.max(1), color=colour, alpha=0.15)
        panel.set(title=CURVES[curve], xlabel="epoch")
        highest = max(entry[curve] for log in logs.values() for entry in log)
        panel.set_ylim(0, 1 if curve in ("accuracy", "empty_maps") else 1.1 * highest or 1)
        panel.xaxis.get_major_locator().set_params(integer=True)
    return add_legend(figure, panels[0], 2)


def heatmap_grid(
    images: Tensor, maps: Tensor, titles: Sequence[str], predictions: Sequence[Sequence[str]] = ()
) -> Figure:
    """Images beside the heat map of every expert, as Figure 2.
    images: (B, 3, 32, 32) in [0, 1]; maps: (B, N, 32, 32), drawn divided by their maxima on one colour scale; an empty
    map is marked. titles: B; predictions: B x N, set below the maps."""
    rows, experts = maps.shape[:2]
    figure, axes = make_grid(rows, experts + 1, (1.55 * experts + 2.25, 1.75 * rows + 0.3), subplot_kw=BARE)
    for panel, title in zip(axes[0], ["image", *range(1, experts + 1)], strict=True):
        panel.set_title(title if title == "image" else f"expert {title}", fontsize=10)
    for row in range(rows):
        axes[row, 0].imshow(images[row].permute(1, 2, 0).numpy(force=True))
        axes[row, 0].set_xlabel(literal(titles[row]), fontsize=9)
        for expert in range(experts):
            panel, heat = axes[row, expert + 1], maps[row, expert].numpy(force=True)
            if empty := bool(is_empty(maps[row, expert])):
                panel.text(15.5, 15.5, "empty", color="white", ha="center", va="center")
            drawn = panel.imshow(heat * 0 if empty else heat / heat.max(), cmap="magma", vmin=0, vmax=1)
            if predictions:
                panel.set_xlabel(literal(predictions[row][expert]), fontsize=9)
    figure.colorbar(drawn, ax=axes, label="heat / maximum", shrink=0.7)
    return figure


def part_coverage(panels: Mapping[str, pd.DataFrame]) -> Figure:
    """Share of every expert's heat on each part and on the background, a panel for each model.
    panels: by title, frames with a row an expert and a column a part, the last one "background", shares in 0 .. 1. The
    parts share one colour scale; the background, in grey, has its own."""
    import seaborn as sns  # costs seconds, which only this figure should pay

    height = 0.42 * len(next(iter(panels.values()))) + 1.1
    figure, axes = make_panels(len(panels), 2, 4.6, height)
    highest = max(frame.drop(columns="background").to_numpy().max() for frame in panels.values())
    for panel, (title, frame) in zip(axes, panels.items(), strict=True):
        background = np.tile(frame.columns == "background", (len(frame), 1))
        for hidden, colours, top in ((background, "viridis", highest), (~background, "Greys", 1)):
            style = {"cmap": colours, "vmin": 0, "vmax": top, "annot": True, "fmt": ".0%", "linewidths": 1}
            sns.heatmap(frame, mask=hidden, ax=panel, cbar=False, **style)
        panel.set(title=title)
        panel.tick_params(axis="y", rotation=0)
    return figure


def attack_bars(cells: pd.DataFrame) -> Figure:
    """Accuracy under every attack, a panel for each data set and training: bars are the expectation over the switched
    gate, whiskers reach from its worst to its best permutation (means over seeds).
    cells: as `tables.gate_cells` makes them, of one attacked gate and clean."""
    groups = cells.groupby(["data", "training"], sort=False)
    models, attacks = cells["model"].unique(), cells["attack"].unique()
    width = max(5.2, 0.25 * len(attacks) * len(models))
    figure, panels = make_panels(len(groups), cells["training"].nunique(), width, 3.6, sharey=True)
    for panel, ((data, training), own) in zip(panels, groups, strict=True):
        by = own.groupby(["header", "attack", "model"])["value"].mean().unstack()
        right, low, high = (by.loc[DEFENCES[state]].loc[attacks, models] for state in ("switched", "worst", "best"))
        reach = np.clip([(right - low).T, (high - right).T], 0, None).swapaxes(0, 1)
        right.index = [attack_title(attack) for attack in attacks]
        style = {"width": 0.8, "color": COLOURS, "capsize": 2, "rot": 0, "legend": False}
        right.plot.bar(ax=panel, yerr=reach, ylim=(0, 106), **style)
        for bars in panel.containers[1::2]:
            panel.bar_label(bars, fmt="%.0f", fontsize=8)
        data = f"{data}, " * (cells["data"].nunique() > 1)
        panel.set(title=f"{data}{training} training", ylabel="accuracy, %")
    return add_legend(figure, panels[0], len(models))


def attack_dots(suite: pd.DataFrame, model: str) -> Figure:
    """Accuracy of one model under every attack, a panel for each training, for each of the gates that could defend.
    suite: as `tables.suite_table` makes it."""
    own = suite[suite["model"] == model]
    kinds = own.drop_duplicates("attack").set_index("attack")["kind"]
    rows = pd.Series(-np.arange(len(kinds)), kinds.index)
    trainings, height = own["training"].unique(), 0.26 * len(rows) + 0.9
    figure, panels = make_panels(len(trainings), len(trainings), 4.8, height, sharey=True)
    for panel, training in zip(panels, trainings, strict=True):
        for gate, style in {
            "expected over switches": {"marker": "o", "color": COLOURS[0]},
            "plain ensemble": {"marker": "D", "color": COLOURS[1], "markerfacecolor": "none"},
            "frozen gate": {"marker": "x", "color": COLOURS[2]},
        }.items():
            cells = own[(own["training"] == training) & (own["column"] == gate)]
            panel.plot(cells["value"], rows[cells["attack"]], linestyle="", label=gate, **style)
        for attack in kinds.index[kinds != kinds.shift(fill_value=kinds.iloc[0])]:
            panel.axhline(rows[attack] + 0.5, color="0.85", linewidth=0.8, zorder=0)
        panel.set(title=f"{training} training", xlabel="accuracy, %", xlim=(-2, 102))
        panel.set_yticks(rows, rows.index)
        panel.grid(axis="x", color="0.92")
        panel.set_axisbelow(True)
    return add_legend(figure, panels[0], 3)


def strength_curves(suite: pd.DataFrame, budget: pd.DataFrame) -> Figure:
    """Left: accuracy by the number of gates sampled for each gradient, up to all of them exactly. Right: accuracy by
    eps. suite, budget: as `tables.suite_table` and `budget_curves` make them."""
    sampled = suite["attack"].str.match("eotpgd-|exact-expected")
    suite = suite[sampled & (suite["column"] == "expected over switches")]
    samples = suite["attack"].str.replace("eotpgd-|-expected", "", regex=True)
    order = sorted(samples.unique(), key=lambda one: (not one.isdecimal(), one.zfill(10)))  # "exact" last
    suite = suite.assign(place=samples.map(order.index))
    figure, (left, right) = make_panels(2, 2, 5.6, 3.3)
    models, trainings = (list(budget[field].unique()) for field in ("model", "training"))
    for (model, training), own in budget.groupby(["model", "training"], sort=False):
        style = {"color": COLOURS[models.index(model)], "linestyle": LINES[trainings.index(training)]}
        style |= {"marker": ".", "label": f"{model}, {training} training"}
        right.plot(255 * own["eps"], own["value"], **style)
        own = suite[(suite["model"] == model) & (suite["training"] == training)].sort_values("place")
        left.plot(own["place"], own["value"], **style)
    left.set_xticks(range(len(order)), order)
    left.set(xlabel="gates sampled for each gradient", ylabel="accuracy, %")
    right.set_xscale("symlog", base=2, linthresh=2)
    ticks = [0, 2, 4, 8, 16, 32, 64, 128, 255]
    right.set_xticks(ticks, ticks)
    right.set(xlabel="eps, in 255ths; exact expectation attacked", ylim=(0, 100))
    return add_legend(figure, left, 2)


def verdict_forest(verdicts: pd.DataFrame) -> Figure:
    """Every claim's effect and 95 % interval beside what it predicts (shaded), coloured by verdict; a panel for each
    unit. Where there were too few trainings, the interval tells of other images alone: it is grey, dotted and hollow.
    verdicts: as `claims.verdicts` makes them; what cannot be tested is left out."""
    tested = verdicts.dropna(subset="effect")
    counts = tested["unit"].value_counts(sort=False)
    figure, panels = make_panels(len(counts), 1, 8.6, 0.36 * counts.mean() + 1.1, height_ratios=list(counts))
    for panel, unit in zip(panels, counts.index, strict=True):
        own = tested[tested["unit"] == unit]
        reach = 1.1 * max(own[["low", "high"]].abs().to_numpy().max(), 12)
        for row, claim in enumerate(own.itertuples(index=False)):
            word, bound = claim.predicted.split()[1:3]
            ends = (float(bound), reach) if word == "least" else (-reach, float(bound))
            panel.fill_betweenx([-row - 0.4, -row + 0.4], *ends, color="0.9", linewidth=0)
            around = [[claim.effect - claim.low], [claim.high - claim.effect]]
            judged, verdict = not claim.verdict.endswith("no verdict"), claim.verdict.split(": ")[-1]
            style = {"fmt": "o", "color": VERDICTS[verdict], "capsize": 3 * judged}
            (point, _, bars) = panel.errorbar(claim.effect, -row, xerr=around, **style)
            if not judged:
                point.set_markerfacecolor("none")
                bars[0].set_linestyle(":")
        panel.axvline(0, color="0.5", linewidth=0.8)
        panel.set_yticks(-np.arange(len(own)), own["title"])
        panel.set(xlim=(-reach, reach), xlabel=f"effect, {unit}")
    for verdict, colour in VERDICTS.items():
        hollow = {"markerfacecolor": "none"} if verdict == "no verdict" else {}
        panel.plot([], [], "o", color=colour, label=verdict, **hollow)
    panel.fill_between([], [], color="0.9", label="predicted")
    return add_legend(figure, panel, 3)


def architecture(model: ImmunityMoE) -> Figure:
    """Figure 1, from a model itself: every expert (of `build_expert`) with its stages, as high as their grids, the
    Grad-CAM layer, gate and switch, the mixture, and the losses on the maps."""
    plain, heat, switch, output = (COLOURS[k] for k in (8, 1, 4, 0))
    experts = len(model.experts)
    figure, axes = plt.subplots(figsize=(13, 2.8 + 0.9 * experts), dpi=SCREEN, layout="constrained")
    axes.set(xlim=(-0.5, 15.2), ylim=(-2.2, experts + 0.9))
    axes.set_axis_off()
    middle, mixture, losses = (experts - 1) / 2, 0.0, max(experts - 0.6, 2.2)
    total = (mixture + losses) / 2

    def box(x: float, y: float, text: str, colour="black") -> None:
        frame = {"boxstyle": "round", "facecolor": "white", "edgecolor": colour, "linewidth": 1.6}
        axes.text(x, y, text, ha="center", va="center", fontsize=9, bbox=frame)

    def arrow(*points: tuple[float, float], colour="black") -> None:
        axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.2)
        style = {"arrowstyle": "-|>", "color": colour, "shrinkA": 0, "shrinkB": 0}
        axes.annotate("", points[-1], points[-2], arrowprops=style)

    for number, expert in enumerate(model.experts):
        row, found = experts - 1 - number, expert.stage_sides()
        names, sides = list(found), np.array(list(found.values()))
        centres, heights = np.linspace(2, 8.8, len(sides)), 0.12 + 0.5 * sides / 32
        explained = np.arange(len(sides)) == expert.head_stages - 1
        arrow((0.4, middle), (1.75, row))
        colours = [heat if one else plain for one in explained]
        axes.bar(centres, heights, 0.4, row - heights / 2, color=colours, edgecolor="black")
        axes.text(1.8, row - 0.45, f"expert {number + 1}", fontsize=9, va="center")
        arrow((9.0, row), (9.65, row))
        (layer,) = centres[explained]
        arrow((layer, row), (layer, row - 0.45), (9.65, row - 0.45), colour=heat)
        arrow((9.95, row), (10.9, row), (10.9, mixture), (12.4, mixture), colour=output)
        arrow((9.95, row - 0.45), (10.5, row - 0.45), (10.5, losses), (12.15, losses), colour=heat)
        box(9.8, row, f"$f_{{{number + 1}}}$", output)
        box(9.8, row - 0.45, f"$h_{{{number + 1}}}$", heat)
        if number == 0:
            for name, side, x in zip(names, sides, centres, strict=True):
                label = {"rotation": 35, "color": heat if x == layer else "black"}
                axes.text(x, row + 0.4, f"{name} {side}x{side}", fontsize=8, **label)
            axes.text(layer + 0.1, row - 0.43, "Grad-CAM, eq (3)", color=heat, fontsize=8)
    arrow((0.1, middle), (0.1, -1.6), (4.15, -1.6))
    arrow((5.8, -1.6), (8.05, -1.6))
    axes.text(6.95, -1.52, r"$g_1 \ldots g_N$", ha="center", va="bottom", fontsize=10)
    arrow((10.5, -1.6), (13.2, -1.6), (13.2, mixture - 0.35))
    for start, end in ((losses, total + 0.15), (mixture, total - 0.15)):
        arrow((13.2, start), (13.2, end))
    box(0.1, middle, "image")
    box(5.0, -1.6, f"gate\n({type(model.gate).__name__})", switch)
    box(9.3, -1.6, "random switch, section 4.1\nat evaluation, one of N! orders", switch)
    box(13.2, mixture, "mixture, eq (1)\n" r"$\hat y=\sum_i\, g_i\,\mathrm{softmax}(f_i)$", output)
    box(13.2, losses, "losses on the heat maps:\nMI, eq (9), and PS, eq (11)", heat)
    box(13.2, total, r"loss, eq (12): CE $+\,\beta$ MI $+\,\gamma$ PS")
    return figure
