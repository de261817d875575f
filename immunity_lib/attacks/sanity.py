"""Checks that an evaluation under attack must pass before its numbers mean anything.

A failed check says that the attack was too weak, or that the model hides its gradients; not that
the model is robust. Each check is one function from what was measured to a `Finding`, which speaks
for itself: what was found, whether it passes, why it matters, and who says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from immunity_lib.attacks.exact import ExactPGD
from immunity_lib.attacks.frozen import cross_entropy
from immunity_lib.evaluation import GateVerdicts, verdicts
from immunity_lib.moe import ImmunityMoE

BUDGETS = tuple(k / 255 for k in (0, 2, 4, 8, 16, 32, 64, 128, 255))
TOLERANCE = 0.005  # half a point of accuracy
CARLINI = "Carlini et al. 2019, arXiv 1902.06705"


@dataclass(frozen=True)
class Finding:
    """One check's outcome."""

    check: str
    passed: bool
    evidence: str
    why: str
    source: str


def falls_to_zero(accuracy: Mapping[float, float]) -> Finding:
    """accuracy: expected over the gate, 0 .. 1, by eps of the attack, up to 1."""
    curve = [accuracy[eps] for eps in sorted(accuracy)]
    rise = max((later - sooner for sooner, later in zip(curve, curve[1:], strict=False)), default=0)
    return Finding(
        "accuracy falls to zero as eps grows to 1",
        rise <= TOLERANCE and curve[-1] <= TOLERANCE,
        ", ".join(f"{255 * eps:.0f}/255: {accuracy[eps]:.1%}" for eps in sorted(accuracy)),
        "A larger ball holds the smaller one, and a ball of radius 1 holds every image: whatever "
        "survives there was not found, rather than not there.",
        f"{CARLINI}, section 5.2",
    )


def iterative_beats_single_step(iterative: float, single: float) -> Finding:
    """Accuracies, 0 .. 1, under PGD and FGSM on the same gate."""
    return Finding(
        "iterative attack beats a single step",
        iterative <= single + TOLERANCE,
        f"{iterative:.1%} under PGD, {single:.1%} under FGSM",
        "One long step can only do better than many short ones where the gradient points the wrong "
        "way.",
        "Athalye et al. 2018, arXiv 1802.00420, section 3.1",
    )


def white_box_beats_black_box(white: np.ndarray, black: np.ndarray) -> Finding:
    """Failure probability of each image, (B,), under the strongest of the attacks that use the
    model's gradients, and of those that do not."""
    missed = int((black > white + 1e-9).sum())
    return Finding(
        "attacks with gradients beat those without",
        bool(black.mean() <= white.mean() + TOLERANCE),
        f"{1 - white.mean():.1%} left with gradients, {1 - black.mean():.1%} without; "
        f"{missed} of {len(white)} images fail more often without",
        "Gradients are more information. If noise, queries or images made for other models find "
        "more, the gradients are masked.",
        f"{CARLINI}, section 5.4",
    )


def doubling_steps_changes_little(once: float, twice: float) -> Finding:
    """Accuracies, 0 .. 1, under the same attack with its steps, and with twice as many."""
    return Finding(
        "twice the steps change less than half a point",
        abs(once - twice) < TOLERANCE,
        f"{once:.1%}, with twice the steps {twice:.1%}",
        "An attack that still gains from more steps has not converged, and its number is too high.",
        f"{CARLINI}, section 4.8",
    )


def gradients_are_not_zero(share: float) -> Finding:
    """share: of images whose gradient is exactly zero, 0 .. 1."""
    return Finding(
        "no gradient is zero",
        share == 0,
        f"{share:.1%} of images have a zero gradient",
        "Where the gradient is zero, an attack that follows it stands still.",
        f"{CARLINI}, section 4.4, and AutoAttack's flags",
    )


def frozen_gate_breaks(frozen: float, alone: Sequence[float]) -> Finding:
    """Accuracies, 0 .. 1, under PGD: the mixture with its gate frozen, and every expert alone, each
    attacked through its own gradients."""
    highest = max(alone)
    return Finding(
        "with a frozen gate it breaks like a plain network",
        frozen <= highest + 0.05,
        f"frozen gate {frozen:.1%}; experts alone {min(alone):.1%} to {highest:.1%}",
        "Without its randomness the defence is an ordinary network. If the attack does not break "
        "that (within five points of the strongest expert), it fails for another reason than "
        "randomness.",
        f"{CARLINI}, section 4.6",
    )


def fixed_gate_answers_alike(difference: float) -> Finding:
    """difference: the largest, between two passes over the same images, of a log-probability."""
    return Finding(
        "with a fixed gate it gives the same answer twice",
        difference < 1e-4,
        f"largest difference of a log-probability {difference:.1e}",
        "The gate is the only declared randomness. Any other would have to be averaged over, too.",
        f"{CARLINI}, section 4.6",
    )


def auto_attack_flags_nothing(flags: Sequence[str]) -> Finding:
    """flags: AutoAttack's warnings."""
    return Finding(
        "AutoAttack raises no flag",
        not flags,
        "; ".join(flags) or "no flags",
        "AutoAttack tells where its own verdict is not to be trusted.",
        "Croce & Hein 2020, arXiv 2003.01690, and its flags_doc.md",
    )


def check_gives_gradients(model: ImmunityMoE, images: Tensor) -> None:
    """Raise ValueError for a model whose answers have no gradient in its images at all, as one that
    detaches them; images: (B, 3, 32, 32)."""
    if not model(images.clone().requires_grad_(), "uniform").requires_grad:
        raise ValueError(
            "the model gives no gradient in its images, which most of these attacks follow; "
            "attacks that work: square and random_noise of attacks/black_box.py"
        )


def accuracy_by_budget(
    model: ImmunityMoE, images: Tensor, labels: Tensor, steps: int
) -> dict[float, float]:
    """Accuracy expected over the gate under PGD on the exact expectation, by eps. The step grows
    with eps, so that every point of the ball can be reached."""
    found = {}
    for eps in BUDGETS:
        attack = ExactPGD(model, eps, 2.5 * eps / steps, steps)
        found[eps] = expected_accuracy(model, attack(images, labels), labels)
    return found


def expected_accuracy(model: ImmunityMoE, images: Tensor, labels: Tensor) -> float:
    """Over a uniform permutation of the gate, 0 .. 1."""
    return 1 - verdicts_on(model, images, labels).failure.mean().item()


@torch.no_grad()
def verdicts_on(model: ImmunityMoE, images: Tensor, labels: Tensor) -> GateVerdicts:
    """Of a model in eval mode, from one pass."""
    return verdicts(model.expert_outputs(images), labels)


def share_of_zero_gradients(model: ImmunityMoE, images: Tensor, labels: Tensor) -> float:
    """Of images, 0 .. 1, at which the plain ensemble's cross entropy has a gradient of exactly
    zero, or none. (Under other gates the gate's own gradient could hide that experts have none.)"""
    points = images.clone().requires_grad_()
    loss = cross_entropy(model(points, "uniform"), labels).sum()
    (gradient,) = torch.autograd.grad(loss, points, allow_unused=True)
    if gradient is None:
        return 1.0
    return (gradient.flatten(1).abs().amax(1) == 0).double().mean().item()


@torch.no_grad()
def difference_of_two_passes(model: ImmunityMoE, images: Tensor) -> float:
    """The largest difference of a log-probability under the trained gate."""
    return (model(images, "trained") - model(images, "trained")).abs().max().item()
