"""What the explorer shows, computed once and kept: attack paths, answers and heat maps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from threading import RLock
from typing import Any

import torch
from torch import Tensor

from immunity_lib.attacks import attack_images
from immunity_lib.attacks.folding import folded
from immunity_lib.attacks.path import attack_path
from immunity_lib.data import Dataset
from immunity_lib.evaluation import GateVerdicts, switched_probabilities, verdicts
from immunity_lib.explorer.cam_methods import OURS, explanation_maps
from immunity_lib.models import chosen_device, model_folder, trained_model
from immunity_lib.moe import Gate, ImmunityMoE
from immunity_lib.recipes import ModelName, explored_models
from immunity_lib.settings import Settings

KEPT = 128  # results; a set of heat maps takes some 3 MB
GALLERY = 30  # images to choose from, as many of each class as there is room for
BUDGETS = (0, Fraction(1, 4), Fraction(1, 2), 1, Fraction(3, 2), 2)  # times the preset's eps
PRESET_BUDGET = BUDGETS.index(1)
TRUE_CLASS, ANSWER = "its true class", "what the plain ensemble answers"


@dataclass(frozen=True, eq=False)
class Subject:
    """An image to look at.

    image: (3, 32, 32) in [0, 1]. label: its class, or None where nobody knows it (an own image).
    part_masks: (P, 32, 32) bool, the true parts, on Parts-10 only.
    """

    title: str
    image: Tensor
    label: int | None
    part_masks: Tensor | None = None


@dataclass(frozen=True)
class Answers:
    """What a model says on its way: E budgets, S + 1 points, N experts, C classes, G gates.

    frames: (E, S + 1, 3, 32, 32). experts: (E, S + 1, N, C), each expert's probabilities. gate:
    (E, S + 1, N), the trained weights. ensemble: (E, S + 1, C), under equal weights. mixtures:
    (E, S + 1, G, C), under each permutation of the weights, see `evaluation.permutations`.
    asked: the class that the attack leads away from: the true one where it is known, else what the
    plain ensemble answers.
    """

    frames: Tensor
    experts: Tensor
    gate: Tensor
    ensemble: Tensor
    mixtures: Tensor
    asked: int

    @property
    def right(self) -> Tensor:
        """(E, S + 1, G) bool, the gates whose mixture answers the asked class."""
        return self.mixtures.argmax(-1) == self.asked


class Exploration:
    """The mixtures of a preset on single images, each attacked by PGD on itself.

    models: those that are trained or come with the project; missing: the others. budgets: values of
    eps, E of them, 0 first. Raises ValueError if there is no model at all.
    """

    def __init__(self, settings: Settings, dataset: Dataset):
        self.settings, self.dataset = settings, dataset
        self.budgets = [settings.eps * factor for factor in BUDGETS if settings.eps * factor <= 1]
        every = explored_models(settings)
        self.models = [
            name for name in every if (model_folder(settings, name) / "record.json").exists()
        ]
        self.missing = [name for name in every if name not in self.models]
        if not self.models:
            raise ValueError(
                f"no mixture of preset {settings.preset} is trained yet. This trains one:\n"
                f"{training_command(settings, every[0])}"
            )
        self.gallery = self._gallery()
        self._kept: dict[tuple, Any] = {}
        self._lock = RLock()

    def model(self, name: ModelName) -> ImmunityMoE:
        """In eval mode."""
        return self._once(("model", name), lambda: trained_model(self.settings, name, self.dataset))

    def answers(self, name: ModelName, subject: Subject, attacked_gate: Gate) -> Answers:
        """What the model says on the way of an attack on it that sees this gate."""
        return self._once(
            ("answers", name, subject, attacked_gate),
            lambda: self._answers(name, subject, attacked_gate),
        )

    def maps(
        self,
        name: ModelName,
        subject: Subject,
        attacked_gate: Gate,
        method: str = OURS,
        explained: int | str = TRUE_CLASS,
    ) -> Tensor:
        """Heat maps (E, S + 1, N, 32, 32) on the same way, each summing to 1.

        method: one of CAM_METHODS. explained: the class they are for; TRUE_CLASS: the one asked
        for; ANSWER: what the plain ensemble answers at each point.
        """
        return self._once(
            ("maps", name, subject, attacked_gate, method, explained),
            lambda: self._maps(name, subject, attacked_gate, method, explained),
        )

    def verdicts(self, name: ModelName, attacked_gate: Gate) -> tuple[GateVerdicts, GateVerdicts]:
        """On the images of the gallery, before and after the attack at the preset's eps."""
        return self._once(
            ("verdicts", name, attacked_gate), lambda: self._verdicts(name, attacked_gate)
        )

    def broken(self, name: ModelName, attacked_gate: Gate) -> list[bool]:
        """Of each image of the gallery, whether the plain ensemble is right before the attack, and
        wrong after it."""
        before, after = self.verdicts(name, attacked_gate)
        return (before.uniform & ~after.uniform).tolist()

    def most_disputed(self, name: ModelName, attacked_gate: Gate) -> Subject:
        """The image of the gallery on which, after the attack, the gates disagree most."""
        _, after = self.verdicts(name, attacked_gate)
        return self.gallery[int((after.failure - 0.5).abs().argmin())]

    def _once(self, key: tuple, compute: Callable[[], Any]) -> Any:
        # JupyterLab can serve widgets in a thread beside the cells that still run, and an attack
        # sets its model's gate
        with self._lock:
            if key not in self._kept:
                self._kept[key] = compute()
                while len(self._kept) > KEPT:  # the oldest, but no model
                    old = next(one for one in self._kept if one[0] not in ("model", "folded"))
                    del self._kept[old]
            return self._kept[key]

    def _folded(self, name: ModelName) -> ImmunityMoE:
        return self._once(("folded", name), lambda: folded(self.model(name)))

    def _gallery(self) -> list[Subject]:
        test, subjects = self.dataset.splits["test"], []
        per_class = max(1, GALLERY // len(self.dataset.class_names))
        for label, class_name in enumerate(self.dataset.class_names[:GALLERY]):
            for row in (test.labels == label).nonzero()[:per_class, 0].tolist():
                masks = None if test.part_masks is None else test.part_masks[row]
                title = f"{class_name}, test image {row}"
                subjects.append(Subject(title, test.images[row] / 255, label, masks))
        return subjects

    def _answers(self, name: ModelName, subject: Subject, attacked_gate: Gate) -> Answers:
        model, image = self._folded(name), subject.image.to(chosen_device())
        asked = subject.label
        if asked is None:
            asked = int(model(image[None], gate="uniform").argmax())
        eps = torch.tensor([float(budget) for budget in self.budgets], device=image.device)
        path = attack_path(
            model, image.repeat(len(eps), 1, 1, 1), torch.full((len(eps),), asked).to(image.device),
            attacked_gate, eps=eps, step_size=float(self.settings.step_size),
            steps=self.settings.steps,
        )  # fmt: skip
        frames = path.transpose(0, 1)
        with torch.no_grad():
            outputs = model.expert_outputs(frames.flatten(0, 1))
            found = (
                outputs.log_probs.exp(), outputs.gate, outputs.mixture("uniform").exp(),
                switched_probabilities(outputs),
            )  # fmt: skip
        by_point = (one.unflatten(0, frames.shape[:2]).cpu() for one in found)
        return Answers(frames.cpu(), *by_point, asked=asked)

    def _maps(
        self, name: ModelName, subject: Subject, gate: Gate, method: str, explained: int | str
    ) -> Tensor:
        answers = self.answers(name, subject, gate)
        labels = answers.ensemble.argmax(-1)
        if explained != ANSWER:
            labels.fill_(answers.asked if explained == TRUE_CLASS else explained)
        device = chosen_device()
        found = explanation_maps(
            self.model(name), answers.frames.flatten(0, 1).to(device), labels.flatten().to(device),
            method,
        )  # fmt: skip
        return found.unflatten(0, labels.shape).cpu()

    def _verdicts(self, name: ModelName, attacked_gate: Gate) -> tuple[GateVerdicts, GateVerdicts]:
        model, device = self._folded(name), chosen_device()
        images = torch.stack([subject.image for subject in self.gallery]).to(device)
        labels = torch.tensor([subject.label for subject in self.gallery], device=device)
        # PGD without a random start, as above
        attacked = attack_images(
            model, images, labels, "bim", attacked_gate, eps=float(self.settings.eps),
            step_size=float(self.settings.step_size), steps=self.settings.steps,
        )  # fmt: skip
        with torch.no_grad():
            before, after = (
                verdicts(model.expert_outputs(seen), labels) for seen in (images, attacked)
            )
        return before, after


def training_command(settings: Settings, name: ModelName) -> str:
    """The shell command, in the project's folder, that trains a model of the explorer."""
    data = f" -p data_folder {settings.data_folder}" if settings.data_folder else ""
    return (
        f".venv/bin/papermill notebooks/02_training.ipynb runs/02_training.ipynb --cwd notebooks "
        f"-p preset {settings.preset} -p model {name}{data}"
    )
