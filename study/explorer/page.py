"""What the explorer shows, once computed: as a page to step through, and as still figures.

`page.html` draws the page, with a few lines of plain JavaScript that ask nothing of a kernel or a network: in the
explorer's widget as in the file that a reader takes home. The figures show the same ways, colours and scale."""

import base64
import json
from collections.abc import Mapping, Sequence
from html import escape
from io import BytesIO
from itertools import product

import jinja2
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from immunity_lib.heatmaps import GRID, is_empty
from immunity_lib.moe import permutations
from study.catalogue import DATA, ModelName
from study.explorer.exploration import OURS, TRUE_CLASS, Answers, Exploration, Subject
from study.figures import BARE, COLOURS, literal, make_grid, make_panels
from study.settings import budget_text

COLOUR_MAP = "magma"  # rises evenly in lightness: readable without colours, and in print
PART_COLOURS = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#cc79a7")  # Okabe and Ito's, for the colour-blind too
ATTACKED_GATES = {"uniform": "all gates alike (the plain ensemble)", "trained": "the gate as trained"}


def explorer_page(
    exploration: Exploration, names: Sequence[ModelName], subjects: Sequence[Subject] | Mapping[Subject, str],
    attacked_gate: str, budget: int, method: str = OURS, explained: int | str = TRUE_CLASS,
) -> str:  # fmt: skip
    """HTML that steps through the attack on each model, image by image, and through the gate. subjects: with captions,
    if they have any; budget: which of the exploration's budgets; the others as for `Exploration.maps`."""
    dataset, shown, still = exploration.dataset, [], []
    captions = subjects if isinstance(subjects, Mapping) else dict.fromkeys(subjects, "")
    ramp = plt.colormaps[COLOUR_MAP](np.arange(256), bytes=True)[:, :3]
    for subject in subjects:
        key = subject, attacked_gate
        maps = [exploration.maps(name, *key, budget, method, explained) for name in names]
        top, models = scale_top(maps), []
        for name, of_model in zip(names, maps, strict=True):
            way = _way(exploration.answers(name, *key), of_model, subject.part_masks, budget, top)
            models.append({"title": name.title} | way)
        parts = [mask.flatten().nonzero()[:, 0].tolist() for mask in subject.part_masks]
        told = {"title": escape(subject.title), "caption": escape(captions[subject])}
        shown.append(told | {"top": top, "parts": parts, "models": models})
        frames, heat = exploration.answers(names[0], *key).frames[budget], brightness(maps[0][-1], top)
        pictures = [colours(frames[0]), colours(frames[-1]), *ramp[(heat * 255).round().astype(np.uint8)]]
        still.append(np.concatenate(pictures, axis=1))
    parts = zip(dataset.part_names, PART_COLOURS, strict=False)
    data = {
        # Names of files and folders, which the page writes as HTML
        "classes": [escape(name) for name in dataset.class_names],
        "parts": [{"name": escape(name), "colour": colour} for name, colour in parts],
        "gates": permutations(exploration.settings.recipe.experts).tolist(),
        "ramp": ramp.tolist(),
        "subjects": shown,
    }
    environment = jinja2.Environment(loader=jinja2.PackageLoader("study", "explorer"), autoescape=True)
    return environment.get_template("page.html").render(
        attacked=ATTACKED_GATES[attacked_gate], eps=budget_text(exploration.budgets[budget]),
        dataset=DATA[dataset.name], steps=exploration.settings.steps, method=method,
        explained=dataset.class_names[explained] if isinstance(explained, int) else explained,
        model=names[0].title, captions=captions, still=data_address(np.concatenate(still)),
        # Inside of a script element, nothing may close it
        data=json.dumps(data, separators=(",", ":")).replace("</", "<\\/"),
    )  # fmt: skip


def _way(answers: Answers, maps: Tensor, masks: Tensor, budget: int, top: float) -> dict:
    """One model's way at one budget: pictures as two sheets, steps down; the rest as numbers."""
    frames = answers.frames[budget]
    heat = (brightness(maps, top) * 255).round().astype(np.uint8)  # (S + 1, N, 32, 32)
    return {
        "asked": answers.asked,
        "images": data_address(np.concatenate([colours(frame) for frame in frames])),
        "heat": data_address(heat.transpose(0, 2, 1, 3).reshape(len(heat) * GRID, -1)),
        "moved": _rounded((frames - frames[0]).abs().flatten(1).amax(1) * 255),
        "weights": _rounded(answers.gate[budget]),
        "experts": _rounded(answers.experts[budget]),  # each one's probabilities
        "answers": answers.mixtures[budget].argmax(-1).tolist(),  # by step and state of the gate
        "empty": is_empty(maps).tolist(),
        "onParts": _rounded((maps[:, :, None] * masks).sum((-2, -1))),
    }


def _rounded(numbers: Tensor) -> list:
    return np.round(numbers.numpy().astype(float), 4).tolist()


def scale_top(maps: Sequence[Tensor]) -> float:
    """Where one scale for these maps, each of sum 1, ends, in units of an even spread: 0.1 % of pixels lie above."""
    pixels = torch.cat([one.flatten() for one in maps]) * GRID**2
    return max(pixels.kthvalue(int(0.999 * len(pixels))).values.item(), 1.0)


def brightness(heat: Tensor, top: float) -> np.ndarray:
    """0 .. 1 of maps that each sum to 1: the square root of their heat over that of `top`, which is in units of an
    even spread. So wide maps can be seen beside those of a few bright pixels."""
    return np.sqrt(np.clip(heat.numpy() * (GRID**2 / top), 0, 1))


def colours(image: Tensor) -> np.ndarray:
    """RGB (32, 32, 3) uint8 of an image (3, 32, 32) in [0, 1]."""
    return (image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)


def data_address(pixels: np.ndarray) -> str:
    """A PNG as a `data:` address, for the source of an HTML image."""
    content = BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"


def gallery_figure(exploration: Exploration) -> Figure:
    """The images to choose from, by their numbers, ten to a row."""
    subjects, columns = exploration.gallery, 10
    rows = -(-len(subjects) // columns)
    figure, axes = make_grid(rows, columns, (0.95 * columns, 1.12 * rows), subplot_kw=BARE)
    for number, (panel, subject) in enumerate(zip(axes.T.flat, subjects, strict=False)):
        panel.imshow(colours(subject.image))
        panel.set_title(number + 1, fontsize=8, pad=2)
    for panel in axes.T.flat[len(subjects) :]:
        panel.set_axis_off()
    return figure


def attack_figure(
    exploration: Exploration, names: Sequence[ModelName], subject: Subject, attacked_gate: str,
    budget: int, steps: Sequence[int],
) -> Figure:  # fmt: skip
    """A row for each model and step: the image with the answer of the mixture, and the map of every expert with its
    answer and weight, all maps on one scale, the true parts outlined."""
    maps = [exploration.maps(name, subject, attacked_gate, budget) for name in names]
    columns, rows, top = maps[0].shape[1] + 1, len(names) * len(steps), scale_top(maps)
    figure, axes = make_grid(rows, columns, (1.5 * columns + 1, 2 * rows), subplot_kw=BARE)
    for row, ((name, of_model), step) in zip(axes, product(zip(names, maps, strict=True), steps), strict=True):
        answers, at = exploration.answers(name, subject, attacked_gate), (budget, step)
        row[0].imshow(colours(answers.frames[at]))
        for panel, heat in zip(row[1:], of_model[step], strict=True):
            drawn = panel.imshow(brightness(heat, top), cmap=COLOUR_MAP, vmin=0, vmax=1)
        weights = [f"expert {k + 1}, weight {w:.2f}" for k, w in enumerate(answers.gate[at])]
        titles = [f"{name.title.split(',')[0]}, step {step}", *weights]
        trained = answers.gate[at] @ answers.experts[at]  # not among the mixtures of more than six experts
        of_panels = [trained, *answers.experts[at]]
        for panel, title, said in zip(row, titles, of_panels, strict=True):
            answer = int(said.argmax())
            sign = "" if answer == answers.asked else " x"
            panel.set_title(title, fontsize=8)
            panel.set_xlabel(f"{literal(exploration.dataset.class_names[answer])} {said[answer]:.0%}{sign}", fontsize=8)
            for mask, colour in zip(subject.part_masks, PART_COLOURS, strict=False):
                if mask.any():
                    panel.contour(mask.float().numpy(), levels=[0.5], colors=[colour], linewidths=1)
    heats = np.array([0, 1, top / 4, top])  # brightness is the square root of heat
    bar = figure.colorbar(drawn, ax=axes, shrink=0.6, ticks=np.sqrt(heats / top))
    bar.ax.set_yticklabels([f"{heat:.0f}" for heat in heats], fontsize=8)
    bar.set_label("heat, in units of an even spread", fontsize=8)
    return figure


def gates_figure(exploration: Exploration, names: Sequence[ModelName], subject: Subject, attacked_gate: str) -> Figure:
    """Which gates are right at the attack's last step, a panel for each model: budgets down, states of the gate
    across, sorted by how many budgets they withstand."""
    budgets = [budget_text(eps) for eps in exploration.budgets]
    figure, panels = make_panels(len(names), 1, 9.4, 0.28 * len(budgets) + 0.35, sharex=True)
    for panel, name in zip(panels, names, strict=True):
        answers = exploration.answers(name, subject, attacked_gate)
        right = (answers.mixtures[:, -1].argmax(-1) == answers.asked).numpy()
        right = right[:, np.argsort(-right.sum(0), kind="stable")]
        for outcome, marker, colour in ((True, "s", COLOURS[0]), (False, "x", COLOURS[1])):
            down, across = np.nonzero(right == outcome)
            panel.scatter(across + 1, down, 14, marker=marker, color=colour, linewidths=1)
        shares = [f"{e}  ({share:.0%})" for e, share in zip(budgets, right.mean(1), strict=True)]
        panel.set_yticks(range(len(shares)), shares, fontsize=8)
        panel.set_title(name.title, fontsize=9)
        panel.set(xlim=(0, right.shape[1] + 1), ylim=(len(shares) - 0.5, -0.5))
    panel.set_xlabel("states of the gate (square: right, cross: wrong)")
    figure.supylabel("eps (right gates)", fontsize=9)
    return figure
