"""Accuracy, clean and under attack, computed exactly over every state of the switched gate.

A gate of N weights has N! states, and every expert's output is shared by all of them: one pass of
the experts gives the mixture under each. For N = 5 that is 120, so nothing is sampled.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from immunity_lib.attacks import attack_images
from immunity_lib.attacks.folding import folded
from immunity_lib.data import ImageSet
from immunity_lib.data.batches import evaluation_batches
from immunity_lib.moe import ExpertOutputs, Gate, ImmunityMoE
from immunity_lib.randomness import seeded

LARGEST_ENUMERATED = 6  # 720 gates; 7 experts would make 5,040 mixtures per image


@dataclass(frozen=True)
class GateAccuracy:
    """Shares of correctly classified images, 0 .. 1, under each way to set the gate.

    trained, uniform: the gate as trained, and equal weights (the plain ensemble).
    switched: expected over a uniform permutation of the trained weights, exact.
    best, worst: of the N! permutations, each held fixed for all images.
    every: correct under all permutations, image by image.
    """

    images: int
    trained: float
    uniform: float
    switched: float
    best: float
    worst: float
    every: float


def permutations(experts: int) -> Tensor:
    """All permutations of range(experts), (N!, N), the identity first."""
    if experts > LARGEST_ENUMERATED:
        raise ValueError(
            f"{experts} experts have {math.factorial(experts)} gates, too many to enumerate; "
            f"at most {LARGEST_ENUMERATED} experts are supported"
        )
    return torch.tensor(list(itertools.permutations(range(experts))))


def switched_probabilities(outputs: ExpertOutputs) -> Tensor:
    """The mixture's class probabilities under every permutation of its gate, (B, N!, C)."""
    states = permutations(outputs.gate.shape[1]).to(outputs.gate.device)
    # Eq. (1) for all gates at once: (B, N!, N) weights times (B, N, C) probabilities
    return outputs.gate[:, states] @ outputs.log_probs.exp()


def correct_by_gate(outputs: ExpertOutputs, labels: Tensor) -> dict[str, Tensor]:
    """Which images are classified correctly: "trained" and "uniform" (B,), "switched" (B, N!)."""
    return {
        "trained": outputs.mixture("trained").argmax(-1) == labels,
        "uniform": outputs.mixture("uniform").argmax(-1) == labels,
        "switched": switched_probabilities(outputs).argmax(-1) == labels[:, None],
    }


def accuracy_over_gates(
    model: ImmunityMoE, batches: Iterable[tuple[Tensor, Tensor]]
) -> GateAccuracy:
    """Accuracy of a model in eval mode over batches of (images, labels), one pass each."""
    model.eval()
    found: list[dict[str, Tensor]] = []
    with torch.no_grad():
        for images, labels in batches:
            found.append(correct_by_gate(model.expert_outputs(images), labels))
    correct = {gate: torch.cat([batch[gate] for batch in found]).double() for gate in found[0]}
    by_permutation = correct["switched"].mean(0)
    return GateAccuracy(
        images=len(correct["trained"]),
        trained=correct["trained"].mean().item(),
        uniform=correct["uniform"].mean().item(),
        switched=by_permutation.mean().item(),
        best=by_permutation.max().item(),
        worst=by_permutation.min().item(),
        every=correct["switched"].amin(1).mean().item(),
    )


def accuracy_under_attack(
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
) -> GateAccuracy:
    """Accuracy on adversarial images made against the given gate; "none" leaves images clean.

    The attack is on the model's folded copy, which is the same function and differentiated faster.
    The attack's random starts and gates are drawn from `seed`, without touching the caller's
    random state. Every adversarial batch is checked to lie in [0, 1] and within eps.
    """
    batches = evaluation_batches(image_set, batch_size, device=device)
    if attack == "none":
        return accuracy_over_gates(model, batches)

    target = folded(model)

    def attacked() -> Iterable[tuple[Tensor, Tensor]]:
        total = math.ceil(len(image_set) / batch_size)
        for images, labels in tqdm(batches, f"{attack} on the {gate} gate", total, leave=False):
            adversarial = attack_images(
                target, images, labels, attack, gate, eps=eps, step_size=step_size, steps=steps
            )
            yield adversarial, labels

    with seeded(seed):
        return accuracy_over_gates(model, attacked())
