"""The way of an attack: every point between an image and its adversarial version."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from immunity_lib.attacks.paper import check_budget, modes_restored
from immunity_lib.checks import check_images, check_labels
from immunity_lib.moe import Gate, ImmunityMoE


class _Recorded(nn.Module):
    """A model that keeps what it was asked: an attack asks once at each of its points."""

    def __init__(self, model: ImmunityMoE) -> None:
        super().__init__()
        self.model = model
        self.asked: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        self.asked.append(images.detach().clone())
        return self.model(images)


def attack_path(
    model: ImmunityMoE,
    images: Tensor,
    labels: Tensor,
    gate: Gate,
    *,
    eps: Tensor,
    step_size: float,
    steps: int,
) -> Tensor:
    """Where torchattacks' PGD is after each step, (steps + 1, B, 3, 32, 32): the first points are
    the images themselves (no random start), the last ones are adversarial.

    images: (B, 3, 32, 32) in [0, 1]; labels: (B,). eps: (B,), each image's own budget, in units of
    [0, 1]; 0 leaves it where it is. gate: what the attacker's forward passes use, see
    `ImmunityMoE`. Raises ValueError on bad input.
    """
    check_images(images)
    check_labels(labels, model.experts[0].num_classes)
    import torchattacks  # costs a second, which only attackers should pay

    recorded = _Recorded(model)
    with modes_restored(model), model.evaluated_with(gate):
        attack = torchattacks.PGD(
            recorded, eps=eps.view(-1, 1, 1, 1), alpha=step_size, steps=steps, random_start=False
        )
        last = attack(images, labels)
    path = torch.stack([*recorded.asked, last])
    for point in path[1:]:
        check_budget(images, point, eps.max().item())
    return path
