"""What the explorer shows, as HTML: a row of heat maps for each model, and one expert in detail.

Colours of text and lines are JupyterLab's, so that they follow its theme. Whatever a colour says, a
sign or a number says too.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from html import escape

import matplotlib
from matplotlib.colors import to_hex
from torch import Tensor

from immunity_lib.explorer import drawing
from immunity_lib.explorer.exploration import Subject
from immunity_lib.explorer.moments import Moment
from immunity_lib.heatmaps import is_empty

RIGHT, WRONG = "\N{CHECK MARK}", "\N{BALLOT X}"
GATES_IN_A_ROW = 40

STYLE = """<style>
.explorer { color: var(--jp-ui-font-color1, inherit); font-size: 13px; line-height: 1.35; }
.explorer h4 { font-size: 14px; margin: 10px 0 4px; font-weight: 600; }
.explorer .maps { display: flex; flex-wrap: wrap; gap: 4px; }
.explorer figure { margin: 0; width: 136px; box-sizing: border-box; padding: 2px;
  border: 2px solid transparent; }
.explorer figure.chosen { border-color: var(--jp-brand-color1, #2a7ab0); border-radius: 3px; }
.explorer img { width: 128px; height: 128px; image-rendering: pixelated; display: block;
  margin: 0; max-width: none; }
.explorer .large img { width: 224px; height: 224px; }
.explorer figure.large { width: 236px; }
.explorer .bar { height: 5px; background: var(--jp-border-color2, #bbb); margin: 3px 0; }
.explorer .bar i { display: block; height: 100%; background: var(--jp-ui-font-color1, #333); }
.explorer svg { max-width: 720px; width: 100%; height: auto; display: block; margin: 4px 0; }
.explorer .right { color: #2f86c1; font-weight: 600; }
.explorer .wrong { color: #d9730d; font-weight: 600; }
.explorer table { border-collapse: collapse; font-size: 13px; }
.explorer td, .explorer th { padding: 1px 10px 1px 0; text-align: left; border: 0;
  color: var(--jp-ui-font-color1, inherit); background: none; }
.explorer .legend { display: flex; flex-wrap: wrap; align-items: center; gap: 4px 8px; }
.explorer .scale { position: relative; width: 220px; height: 30px; margin: 0 14px 0 8px; }
.explorer .scale span { position: absolute; top: 12px; transform: translateX(-50%); }
.explorer .scale .ramp { top: 0; left: 0; width: 100%; height: 11px; transform: none; }
.explorer .key { width: 14px; height: 0; border-top: 3px solid; display: inline-block; }
</style>"""


def model_row(
    moment: Moment,
    class_names: Sequence[str],
    chosen: int,
    masks: Tensor | None,
    overlay: bool,
) -> str:
    """The image, the map of every expert with its answer and weight, and the verdict of each gate.

    chosen: the expert in detail, marked. masks: (P, 32, 32), parts to outline, or None.
    """
    asked, right, weights = moment.answers.asked, moment.right, moment.weights
    figures = [
        _figure(
            _picture(drawing.colours(moment.image), masks),
            "the image at this step",
            f"image<br>moved by {moment.moved * 255:.1f}/255",
        )
    ]
    for expert, heat in enumerate(moment.heat):
        caption = (
            f"expert {expert + 1}: {_verdict(moment.experts[expert], class_names, asked)}"
            f'<div class="bar"><i style="width:{weights[expert]:.1%}"></i></div>'
            f"weight {weights[expert]:.2f}"
        )
        if is_empty(heat):
            caption += ", empty map"
        figures.append(
            _figure(
                _heat(moment, heat, masks, overlay),
                f"heat map of expert {expert + 1}",
                caption,
                "chosen" if expert == chosen else "",
            )
        )
    return (
        f"<section><h4>{escape(moment.title)}: {_verdict(moment.mixture, class_names, asked)} "
        f"under this gate</h4><div class='maps'>{''.join(figures)}</div>"
        f"{_gates(right, moment.state)}<div>{int(right.sum())} of {len(right)} gates answer "
        f"<b>{escape(class_names[asked])}</b>; their mean, the plain ensemble, answers "
        f"{_verdict(moment.ensemble, class_names, asked)}.</div>"
        "</section>"
    )


def expert_detail(
    moments: Sequence[Moment],
    class_names: Sequence[str],
    part_names: Sequence[str],
    subject: Subject,
    chosen: int,
) -> str:
    """One expert of each model, large: its map over the image, and what it says of the classes."""
    blocks = []
    for moment in moments:
        if chosen >= len(moment.heat):
            continue
        heat, now = moment.heat[chosen], moment.experts[chosen]
        clean = moment.answers.experts[moment.budget, 0, chosen]
        rows = "".join(
            f"<tr><td>{escape(class_names[label])}</td><td>{clean[label]:.1%}</td>"
            f"<td>{now[label]:.1%}</td></tr>"
            for label in _told(clean, now, moment.answers.asked)
        )
        table = (
            "<table><tr><th>class</th><th>clean</th><th>at this step</th></tr>" + rows + "</table>"
        )
        if subject.part_masks is not None:
            shares = [
                f"{name} {(heat * mask).sum():.0%}"
                for name, mask in zip(part_names, subject.part_masks, strict=True)
                if mask.any()
            ]
            table += f"<div>Heat on: {', '.join(shares)}.</div>"
        picture = _heat(moment, heat, subject.part_masks, overlay=True)
        figure = _figure(picture, f"map of expert {chosen + 1} over the image", "", "large")
        blocks.append(
            f"<div><h4>{escape(moment.title)}, expert {chosen + 1}</h4>"
            f"<div class='maps'>{figure}<div>{table}</div></div></div>"
        )
    return f"<div class='maps'>{''.join(blocks)}</div>"


def legend(top: float, part_names: Sequence[str]) -> str:
    """The one scale of all maps, and the colours of the parts, if there are any to show."""
    stops = ", ".join(to_hex(matplotlib.colormaps[drawing.COLOUR_MAP](k / 8)) for k in range(9))
    ticks = "".join(
        f"<span style='left:{100 * (heat / top) ** 0.5:.0f}%'>{heat:.0f}</span>"
        for heat in (0, 1, top / 4, top)
    )
    parts = "".join(
        f"<span><span class='key' style='border-color:{colour}'></span> {escape(name)}</span>"
        for name, colour in zip(part_names, drawing.PART_COLOURS, strict=False)
    )
    return (
        "<div class='legend'><span class='scale'>"
        f"<span class='ramp' style='background:linear-gradient(to right, {stops})'></span>{ticks}"
        f"</span><span>heat, in units of an even spread; one scale for all maps</span>{parts}</div>"
    )


def budget_label(eps: Fraction) -> str:
    """eps in 255ths, as the paper has it."""
    return f"{float(eps * 255):g}/255"


def _verdict(probabilities: Tensor, class_names: Sequence[str], asked: int) -> str:
    answer = int(probabilities.argmax())
    sign, kind = (RIGHT, "right") if answer == asked else (WRONG, "wrong")
    name, share = escape(class_names[answer]), f"{probabilities[answer]:.0%}"
    return f"{name} {share} <span class='{kind}'>{sign}</span>"


def _told(clean: Tensor, now: Tensor, asked: int) -> list[int]:
    """The classes worth a line: the one asked for, and the likeliest before and now."""
    likeliest = [*now.topk(2).indices.tolist(), *clean.topk(2).indices.tolist()]
    return list(dict.fromkeys([asked, *likeliest]))


def _heat(moment: Moment, heat: Tensor, masks: Tensor | None, overlay: bool) -> str:
    if overlay:
        return _picture(drawing.overlaid(moment.image, heat, moment.top), masks)
    return _picture(drawing.heat_colours(heat, moment.top), masks)


def _picture(rgb, masks: Tensor | None) -> str:
    return drawing.data_address(rgb if masks is None else drawing.outlined(rgb, masks))


def _figure(source: str, description: str, caption: str, kind: str = "") -> str:
    return (
        f"<figure class='{kind}'><img src='{source}' alt='{escape(description)}'>"
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _gates(right: Tensor, state: int) -> str:
    """Every state of the gate as a cell: a full bar where it is right, a cross where it fails."""
    rows = -(-len(right) // GATES_IN_A_ROW)
    bars, crosses = [], []
    for number in range(len(right)):
        row, column = divmod(number, GATES_IN_A_ROW)
        x, y = 18 * column, 18 * row
        if right[number]:
            bars.append(f"M{x + 4} {y + 3}h10v12h-10z")
        else:
            crosses.append(f"M{x + 4} {y + 4}l10 10m0 -10l-10 10")
    row, column = divmod(state, GATES_IN_A_ROW)
    width = 18 * min(GATES_IN_A_ROW, len(right))
    return (
        f"<svg viewBox='0 0 {width} {18 * rows}' style='max-width:{width}px' role='img' "
        f"aria-label='{int(right.sum())} of {len(right)} gates are right'>"
        f"<path d='{''.join(bars)}' fill='#2f86c1'/>"
        f"<path d='{''.join(crosses)}' stroke='#d9730d' stroke-width='2.5' fill='none'/>"
        f"<rect x='{18 * column + 1}' y='{18 * row + 1}' width='16' height='16' fill='none' "
        "stroke='var(--jp-ui-font-color1, #000)' stroke-width='2'/></svg>"
    )
