"""Accuracy, clean and under attack, computed exactly over every state of the switched gate.

A gate of N weights has N! states, and every expert's output is shared by all of them: one pass of
the experts gives the mixture under each. For N = 5 that is 120, so nothing is sampled; of more than
six experts' gates, as many are drawn as six have.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cache

import torch
from torch import Tensor
from tqdm import tqdm

from immunity_lib.attacks import attack_images
from immunity_lib.attacks.folding import folded
from immunity_lib.data import ImageSet
from immunity_lib.data.batches import evaluation_batches
from immunity_lib.moe import ExpertOutputs, Gate, ImmunityMoE
from immunity_lib.randomness import seeded

LARGEST_ENUMERATED = 6  # experts; seven would make 5,040 mixtures per image
DRAWN = math.factorial(LARGEST_ENUMERATED)


@dataclass(frozen=True)
class GateVerdicts:
    """Which images are classified correctly, bool, under each way to set the gate.

    trained, uniform: (B,), the gate as trained, and equal weights (the plain ensemble).
    switched: (B, G), under each of the gate's permutations.
    """

    trained: Tensor
    uniform: Tensor
    switched: Tensor

    @property
    def failure(self) -> Tensor:
        """(B,), probability in 0 .. 1 that a uniformly drawn permutation gets the image wrong."""
        return 1 - self.switched.double().mean(1)

    @classmethod
    def joined(cls, batches: Sequence[GateVerdicts]) -> GateVerdicts:
        """Of all images of the batches."""
        return cls(
            *(torch.cat([getattr(one, field.name) for one in batches]) for field in fields(cls))
        )


@dataclass(frozen=True)
class GateAccuracy:
    """Shares of correctly classified images, 0 .. 1, under each way to set the gate.

    trained, uniform: the gate as trained, and equal weights (the plain ensemble).
    switched: expected over a uniform permutation of the trained weights.
    best, worst: of the permutations, each held fixed for all images.
    every: correct under all permutations, image by image.
    gates: how many permutations that is, all N! of them for up to six experts.
    drawing_error: half the width of the 95 % interval that drawing them leaves in `switched`; 0
    where all were counted. Then `best`, `worst` and `every` are exact too, and else of those drawn.
    """

    images: int
    trained: float
    uniform: float
    switched: float
    best: float
    worst: float
    every: float
    gates: int
    drawing_error: float

    @classmethod
    def of(cls, verdicts: GateVerdicts, experts: int) -> GateAccuracy:
        """From the verdicts on images, of a mixture of so many experts."""
        by_permutation = verdicts.switched.double().mean(0)
        drawn = experts > LARGEST_ENUMERATED
        error = 1.96 * by_permutation.std() / len(by_permutation) ** 0.5 if drawn else 0.0
        return cls(
            images=len(verdicts.trained),
            trained=verdicts.trained.double().mean().item(),
            uniform=verdicts.uniform.double().mean().item(),
            switched=by_permutation.mean().item(),
            best=by_permutation.max().item(),
            worst=by_permutation.min().item(),
            every=verdicts.switched.all(1).double().mean().item(),
            gates=len(by_permutation),
            drawing_error=float(error),
        )


@cache
def permutations(experts: int) -> Tensor:
    """All permutations of range(experts), (N!, N), the identity first; of more than six experts,
    720 drawn at random, always the same ones, with a warning."""
    if experts <= LARGEST_ENUMERATED:
        return torch.tensor(list(itertools.permutations(range(experts))))
    warnings.warn(
        f"{experts} experts have {math.factorial(experts):,} gates, too many to count: whatever is "
        f"said of the switched gate is an estimate from {DRAWN} drawn at random",
        stacklevel=2,
    )
    with seeded(0):
        return torch.rand(DRAWN, experts).argsort(1)


def switched_probabilities(outputs: ExpertOutputs) -> Tensor:
    """The mixture's class probabilities under every permutation of its gate, (B, N!, C)."""
    states = permutations(outputs.gate.shape[1]).to(outputs.gate.device)
    # Eq. (1) for all gates at once: (B, N!, N) weights times (B, N, C) probabilities
    return outputs.gate[:, states] @ outputs.log_probs.exp()


def verdicts(outputs: ExpertOutputs, labels: Tensor) -> GateVerdicts:
    """Which images are classified correctly under each gate, from one pass of the experts."""
    return GateVerdicts(
        trained=outputs.mixture("trained").argmax(-1) == labels,
        uniform=outputs.mixture("uniform").argmax(-1) == labels,
        switched=switched_probabilities(outputs).argmax(-1) == labels[:, None],
    )


def verdicts_over_gates(
    model: ImmunityMoE, batches: Iterable[tuple[Tensor, Tensor]]
) -> GateVerdicts:
    """Verdicts of a model in eval mode over batches of (images, labels), one pass each."""
    model.eval()
    found = []
    with torch.no_grad():
        for images, labels in batches:
            found.append(verdicts(model.expert_outputs(images), labels))
    return GateVerdicts.joined(found)


def accuracy_over_gates(
    model: ImmunityMoE, batches: Iterable[tuple[Tensor, Tensor]]
) -> GateAccuracy:
    """Accuracy of a model in eval mode over batches of (images, labels), one pass each."""
    return GateAccuracy.of(verdicts_over_gates(model, batches), len(model.experts))


def verdicts_under_attack(
    model: ImmunityMoE,
    image_set: ImageSet,
    attack: str,
    gate: Gate,
    *,
    eps: float,
    step_size: float,
    steps: int,
    batch_size: int = 250,
    seed: int = 0,
    device: torch.device | None = None,
) -> GateVerdicts:
    """Verdicts on adversarial images made against the given gate; "none" leaves images clean.

    The attack is on the model's folded copy, which is the same function and differentiated faster.
    The attack's random starts and gates are drawn from `seed`, without touching the caller's
    random state. Every adversarial batch is checked to lie in [0, 1] and within eps.
    """
    batches = evaluation_batches(image_set, batch_size, device=device)
    if attack == "none":
        return verdicts_over_gates(model, batches)

    target = folded(model)

    def attacked() -> Iterable[tuple[Tensor, Tensor]]:
        total = math.ceil(len(image_set) / batch_size)
        for images, labels in tqdm(batches, f"{attack} on the {gate} gate", total, leave=False):
            adversarial = attack_images(
                target, images, labels, attack, gate, eps=eps, step_size=step_size, steps=steps
            )
            yield adversarial, labels

    with seeded(seed):
        return verdicts_over_gates(model, attacked())
