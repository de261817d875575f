"""What the explorer shows, computed once and kept: attack paths, answers and heat maps."""

from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache, wraps
from io import BytesIO, StringIO
from pathlib import Path
from threading import RLock

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from immunity_lib.attacks import ascent_path, fold
from immunity_lib.data import Dataset
from immunity_lib.data.images import pixels
from immunity_lib.heatmaps import expert_heatmaps, normalise_maps
from immunity_lib.moe import Gate, GateVerdicts, ImmunityMoE, switched_probabilities, verdicts
from study.catalogue import ModelName, explored_models
from study.graph import job_command
from study.settings import Settings, preset_names
from study.store import WEIGHTS, chosen_device, find_record, trained_model

LOCK = RLock()
KEPT = 128  # results of each kind; the answers to an image take 2 MB
GALLERY = 30  # images to choose from, as many of each class as there is room for
BUDGETS = (0, Fraction(1, 4), Fraction(1, 2), 1, Fraction(3, 2), 2)  # times the preset's eps
PRESET_BUDGET = BUDGETS.index(1)
OURS = "Grad-CAM, eq (3)"
KIN = ("Grad-CAM++", "XGrad-CAM", "Layer-CAM", "HiRes-CAM", "Eigen-CAM", "EigenGrad-CAM", "Score-CAM", "Ablation-CAM")
CAM_METHODS = (OURS, *KIN)  # the paper's, and its kin from pytorch-grad-cam
BATCH = 64  # images at a time, also of the masked ones that Score-CAM and Ablation-CAM ask for
TRUE_CLASS, ANSWER = "its true class", "what the plain ensemble answers"


@dataclass(frozen=True, eq=False)
class Subject:
    """An image (3, 32, 32) in [0, 1] to look at; its class, or None where nobody knows it (an own image); and its true
    parts (P, 32, 32) bool, where P is 0 if they are not known."""

    title: str
    image: Tensor
    label: int | None
    part_masks: Tensor = torch.zeros(0, 32, 32, dtype=torch.bool)


@dataclass(frozen=True)
class Answers:
    """What a model says on its way: E budgets, S + 1 points, N experts, C classes, G gates.
    asked: the class that the attack leads away from: the true one, else what this model's plain ensemble answers."""

    frames: Tensor  # (E, S + 1, 3, 32, 32)
    experts: Tensor  # (E, S + 1, N, C), each expert's probabilities
    gate: Tensor  # (E, S + 1, N), the trained weights
    mixtures: Tensor  # (E, S + 1, G, C), under each permutation of them, see `moe.permutations`
    asked: int


def _kept(method: Callable) -> Callable:
    """A method that computes each result once, and one at a time: JupyterLab can serve widgets in a thread beside the
    cells that still run."""
    cached = lru_cache(KEPT)(method)

    @wraps(method)
    def once(*arguments):
        with LOCK:
            return cached(*arguments)

    return once


class Exploration:
    """The mixtures of a preset on single images, each attacked by PGD on itself.
    preset: its name or path, as the reader gave it. models: those that are trained or come with the project; missing:
    the others. budgets: values of eps, E of them, 0 first. Raises ValueError if there is no model at all."""

    def __init__(self, settings: Settings, dataset: Dataset, preset: str = ""):
        self.settings, self.dataset = settings, dataset
        self._preset = preset or settings.preset
        self.budgets = [settings.recipe.eps * factor for factor in BUDGETS if settings.recipe.eps * factor <= 1]
        names = explored_models(settings)
        self.models = [name for name in names if find_record(settings, name, "training").with_name(WEIGHTS).exists()]
        self.missing = [name for name in names if name not in self.models]
        if not self.models:
            told = f"no mixture of preset {settings.preset} is trained yet"
            raise ValueError(f"{told}; this trains one: {self.training_command()}")
        test, self.gallery = dataset.splits["test"], []
        per_class = max(1, GALLERY // len(dataset.class_names))
        for label, class_name in enumerate(dataset.class_names[:GALLERY]):
            for row in (test.labels == label).nonzero()[:per_class, 0].tolist():
                masks = () if test.part_masks is None else (test.part_masks[row],)
                self.gallery.append(Subject(f"{class_name}, test image {row}", test.images[row] / 255, label, *masks))

    def training_command(self) -> str:
        """The shell command that trains the first model that is missing."""
        preset = self._preset if self._preset in preset_names() else Path(self._preset).expanduser().resolve()
        return job_command("02_training", preset, self.settings, model=self.missing[0])

    @_kept
    def model(self, name: ModelName) -> ImmunityMoE:
        """In eval mode."""
        return trained_model(self.settings, name, self.dataset)

    @_kept
    def answers(self, name: ModelName, subject: Subject, attacked_gate: Gate) -> Answers:
        """What the model says on the way of an attack on it that sees this gate."""
        model, image = self._folded(name), subject.image.to(chosen_device())[None]
        asked = int(model(image, gate="uniform").argmax()) if subject.label is None else subject.label
        eps = torch.tensor([float(budget) for budget in self.budgets])
        frames = self._attack(model, image.repeat(len(eps), 1, 1, 1), asked, attacked_gate, eps)
        with torch.no_grad():
            outputs = model.expert_outputs(frames.flatten(0, 1))
        found = outputs.log_probs.exp(), outputs.gate, switched_probabilities(outputs)
        return Answers(frames.cpu(), *(one.unflatten(0, frames.shape[:2]).cpu() for one in found), asked)

    @_kept
    def maps(
        self, name: ModelName, subject: Subject, attacked_gate: Gate,
        budget: int = PRESET_BUDGET, method: str = OURS, explained: int | str = TRUE_CLASS,
    ) -> Tensor:  # fmt: skip
        """Heat maps (S + 1, N, 32, 32) on the way with one of the budgets, each summing to 1, by one of CAM_METHODS.
        explained: the class they are for; TRUE_CLASS: the one asked for; ANSWER: the plain ensemble's at each point."""
        answers, device = self.answers(name, subject, attacked_gate), chosen_device()
        labels = answers.experts[budget].mean(1).argmax(-1)
        if explained != ANSWER:
            labels.fill_(answers.asked if explained == TRUE_CLASS else explained)
        return explanation_maps(self.model(name), answers.frames[budget].to(device), labels.to(device), method).cpu()

    @_kept
    def verdicts(self, name: ModelName, attacked_gate: Gate) -> tuple[GateVerdicts, GateVerdicts]:
        """On the images of the gallery, before and after the attack at the preset's eps."""
        images, labels = self._ends(name, attacked_gate)
        with torch.no_grad():
            return tuple(verdicts(self._folded(name).expert_outputs(some), labels) for some in images)

    def story(self, name: ModelName, attacked_gate: Gate) -> dict[Subject, str]:
        """Images of the gallery that show what there is to see of a model, each with the rule that chose it. None is
        taken twice, and a rule that no image satisfies is left out."""
        (before, after), (images, labels) = self.verdicts(name, attacked_gate), self._ends(name, attacked_gate)
        clean, attacked = (explanation_maps(self.model(name), some, labels, OURS) for some in images)
        with torch.no_grad():
            said = self._folded(name).expert_outputs(images[0]).log_probs.exp()
        right, known = 1 - after.failure, before.switched.all(1)
        rules = {  # by how well an image satisfies it: above 0, if at all
            "Switching saves it, at times: the attack breaks the plain ensemble, and of all such images this is the "
            "one that most gates still get right.": right * (before.uniform & ~after.uniform),
            "The maps move most: the attack shifts more of the experts' heat than on any other image.":
                (attacked - clean).abs().sum((1, 2, 3)),
            "All gates lose it: every gate is right before the attack, and none after it.": known & (right == 0),
            "No gate loses it: the same attack changes no gate's answer.": known & (right == 1),
            "The experts disagree most, before any attack: their probabilities lie furthest from their mean.":
                (said - said.mean(1, keepdim=True)).abs().sum((1, 2)),
        }  # fmt: skip
        chosen = {}
        for rule, fits in rules.items():
            free = [0 if one in chosen else fit for one, fit in zip(self.gallery, fits.tolist(), strict=True)]
            if max(free) > 0:
                chosen[self.gallery[free.index(max(free))]] = rule
        return chosen

    @_kept
    def _ends(self, name: ModelName, attacked_gate: Gate) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """The gallery's images before and after the attack at the preset's eps, and their labels."""
        images = torch.stack([subject.image for subject in self.gallery]).to(chosen_device())
        labels = torch.tensor([subject.label for subject in self.gallery], device=images.device)
        eps = torch.full((len(images),), float(self.settings.recipe.eps))
        return (images, self._attack(self._folded(name), images, labels, attacked_gate, eps)[:, -1]), labels

    @_kept
    def _folded(self, name: ModelName) -> ImmunityMoE:
        return fold(self.model(name))

    def _attack(self, model, images: Tensor, labels: int | Tensor, gate: Gate, eps: Tensor):
        """Where PGD on the cross entropy is, from the images on, each with its own eps; (B, S + 1, 3, 32, 32)."""
        labels = torch.as_tensor(labels, device=images.device).expand(len(images))
        path = ascent_path(
            lambda points, rows: functional.cross_entropy(model(points, gate), labels[rows], reduction="none"),
            images, eps=eps.to(images.device).view(-1, 1, 1, 1), random_start=False,
            step_size=float(self.settings.recipe.step_size), steps=self.settings.steps,
        )  # fmt: skip
        return torch.stack(list(path)).transpose(0, 1)


def explanation_maps(model: ImmunityMoE, images: Tensor, labels: Tensor, method: str) -> Tensor:
    """Heat maps (B, N, 32, 32) of every expert for the labels, each summing to 1.
    images: (B, 3, 32, 32) in [0, 1]; labels: (B,). method: one of CAM_METHODS; ValueError for another. pytorch-grad-cam
    stretches each map to 0 .. 1, so its least heated pixel is 0. Eigen-CAM looks at activations, whatever the class."""
    if method == OURS:
        return expert_heatmaps(model, images, labels)
    if method not in CAM_METHODS:
        raise ValueError(f"unknown CAM method {method!r}; valid names: {', '.join(CAM_METHODS)}")
    import pytorch_grad_cam as library  # costs a second, which only those who ask for it should pay
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    kin = getattr(library, method.replace("-", "").replace("+", "Plus"))
    by_expert = []
    for expert in model.experts:
        # Score-CAM prints a progress bar for each image
        with redirect_stderr(StringIO()), kin(expert, [expert.stages[expert.head_stages - 1]]) as cam:
            cam.batch_size = BATCH
            batches = zip(images.split(BATCH), labels.split(BATCH), strict=True)
            maps = [cam(few, list(map(ClassifierOutputTarget, theirs.tolist()))) for few, theirs in batches]
        by_expert.append(torch.cat(list(map(torch.from_numpy, maps))))
    return normalise_maps(torch.stack(by_expert, dim=1).float()).to(images.device)


def own_subject(content: bytes, name: str) -> Subject:
    """A reader's image file, made to fit, as its title says; ValueError says why one is refused, and what would do."""
    try:
        image = torch.from_numpy(pixels(BytesIO(content)).copy()) / 255
    except Exception as error:  # for a broken file, Pillow raises errors of all kinds
        raise ValueError(f"{name} cannot be read as an image; give an intact PNG, JPEG or WebP ({error})") from error
    picture = Image.open(BytesIO(content))  # of one of the formats that were just read
    was = f"{picture.width}x{picture.height} pixels, {picture.mode}"
    fitted = " made to fit: its middle at 32x32 pixels, RGB, opaque, of a film the first frame"
    return Subject(name if was == "32x32 pixels, RGB" else f"{name}: {was},{fitted}", image, None)
