"""Attacks that use the model's answers alone, and no gradient: if they find what gradients miss,
the gradients mislead (Carlini et al. 2019, arXiv 1902.06705, sections 4.3 and 4.11)."""

from __future__ import annotations

import torch
from torch import Tensor

from immunity_lib.attacks.auto_attack import QUERIES_PER_STEP
from immunity_lib.attacks.folding import folded
from immunity_lib.attacks.frozen import within_budget
from immunity_lib.evaluation import verdicts
from immunity_lib.moe import Gate, ImmunityMoE

DRAWS_PER_STEP = 100  # 10,000 random points beside AutoAttack's 100 steps


@torch.no_grad()
def random_noise(
    model: ImmunityMoE, images: Tensor, labels: Tensor, *, eps: float, draws: int
) -> Tensor:
    """Of so many corners of the eps-ball around each image, drawn at random, the one that the most
    gates get wrong; (B, 3, 32, 32)."""
    target = folded(model)
    best, most = images.clone(), torch.full((len(images),), -1.0, dtype=torch.double)
    most = most.to(images.device)
    for _ in range(draws):
        corner = eps * torch.randint_like(images, 2).mul_(2).sub_(1)
        points = within_budget(images + corner, images, eps)
        failure = verdicts(target.expert_outputs(points), labels).failure
        better = failure > most
        best[better], most[better] = points[better], failure[better]
    return best


def square(
    model: ImmunityMoE, images: Tensor, labels: Tensor, gate: Gate, *, eps: float, steps: int
) -> Tensor:
    """Square (Andriushchenko et al. 2020, arXiv 1912.00049) on the margin under a fixed gate, as
    AutoAttack runs it: 50 queries a step. Images that are fooled already stay as they are."""
    from pyautoattack.square import SquareAttack

    target = folded(model)
    target.evaluation_gate, images = gate, images.contiguous()  # it views images as lines
    attack = SquareAttack(
        target, p_init=0.8, n_queries=QUERIES_PER_STEP * steps, eps=eps, norm="Linf", n_restarts=1,
        seed=0, verbose=False, device=images.device, resc_schedule=False,
    )  # fmt: skip
    return attack.perturb(images, labels)
