"""The explorer without a kernel: attacks on a few images, computed beforehand, as one HTML file.

It holds its pictures and its few lines of plain JavaScript, and asks nothing of a network.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape

import jinja2
import matplotlib
import numpy as np
from torch import Tensor

from immunity_lib.evaluation import permutations
from immunity_lib.explorer import page
from immunity_lib.explorer.drawing import COLOUR_MAP, brightness, colours, data_address, scale_top
from immunity_lib.explorer.exploration import Answers, Exploration, Subject
from immunity_lib.explorer.moments import label_of
from immunity_lib.heatmaps import is_empty
from immunity_lib.recipes import ModelName


def stepper(
    exploration: Exploration,
    names: Sequence[ModelName],
    subjects: Sequence[Subject],
    budget: int,
    attacked_gate: str,
) -> str:
    """HTML that steps through the attack on each model, image by image.

    budget: which of the exploration's budgets. The maps are for each image's true class.
    """
    shown = []
    for subject in subjects:
        answers = [exploration.answers(name, subject, attacked_gate) for name in names]
        maps = [exploration.maps(name, subject, attacked_gate)[budget] for name in names]
        top = scale_top(maps)
        models = [
            {"title": label_of(name)} | _path(found, of_model, budget, top)
            for name, found, of_model in zip(names, answers, maps, strict=True)
        ]
        shown.append(
            {
                "title": escape(subject.title),
                "asked": answers[0].asked,
                "legend": page.legend(top, ()),
                "models": models,
            }
        )
    experts = answers[0].gate.shape[-1]
    ramp = matplotlib.colormaps[COLOUR_MAP](np.arange(256), bytes=True)[:, :3]
    data = {
        # Names of files and folders, which the page writes as HTML
        "classes": [escape(name) for name in exploration.dataset.class_names],
        "gates": permutations(experts).tolist(),
        "ramp": ramp.tolist(),
        "subjects": shown,
    }
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("immunity_lib", "explorer"), autoescape=True
    )
    return environment.get_template("stepper.html").render(
        eps=page.budget_label(exploration.budgets[budget]),
        dataset=exploration.dataset.name,
        style=page.STYLE,
        # Inside of a script element, nothing may close it
        data=json.dumps(data, separators=(",", ":")).replace("</", "<\\/"),
        steps=exploration.settings.steps,
        states=len(data["gates"]),
    )


def _path(answers: Answers, maps: Tensor, budget: int, top: float) -> dict:
    """One model's way at one budget: pictures as two sheets, steps down; the rest as numbers."""
    frames, experts = answers.frames[budget], answers.experts[budget]
    heat = (brightness(maps, top) * 255).round().astype(np.uint8)  # (S + 1, N, 32, 32)
    steps, count = heat.shape[:2]
    sheet = heat.transpose(0, 2, 1, 3).reshape(steps * 32, count * 32)
    return {
        "images": data_address(np.concatenate([colours(frame) for frame in frames])),
        "heat": data_address(sheet),
        "weights": _rounded(answers.gate[budget]),
        "empty": is_empty(maps).tolist(),
        # Each expert's probabilities; the mixtures follow from them, eq (1)
        "experts": _rounded(experts),
    }


def _rounded(numbers: Tensor) -> list:
    return np.round(numbers.numpy().astype(float), 4).tolist()
