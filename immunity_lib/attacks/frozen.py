"""PGD on a model's folded copy, for evaluation.

Where the question is only whether the model can be fooled, the first point that fools it is the
answer.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional
from torchattacks.attack import Attack

from immunity_lib.attacks.folding import folded
from immunity_lib.checks import check_images, check_labels
from immunity_lib.moe import ImmunityMoE

RANDOM_GATES = ("switch", "switch-per-image")

Loss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(log_probs: Tensor, labels: Tensor) -> Tensor:
    """Of each image, (B,), from log-probabilities (B, C) and labels (B,)."""
    return functional.cross_entropy(log_probs, labels, reduction="none")


def margin(log_probs: Tensor, labels: Tensor) -> Tensor:
    """Of each image, (B,): max_{j != y} z_j - z_y, positive where the model is fooled (Carlini &
    Wagner 2017, arXiv 1608.04644). Log-probabilities z (B, C) have the margins of logits."""
    own = labels[:, None]
    best_other = log_probs.scatter(1, own, -torch.inf).amax(1)
    return best_other - log_probs.gather(1, own).squeeze(1)


def within_budget(points: Tensor, images: Tensor, eps: float) -> Tensor:
    """The points (B, 3, 32, 32), each pixel brought to within eps of its image's and to [0, 1]."""
    return (images + (points - images).clamp(-eps, eps)).clamp(0, 1)


class FrozenPGD(Attack):
    """PGD (l_inf, Madry et al. 2018, arXiv 1706.06083) on a model's folded copy, under the gate
    that the model's `evaluation_gate` names when the attack is made.

    stop_early: leave images that are misclassified anyway as they are, and each other image at
    the first point on its way, the random start included, that is misclassified. So it fools at
    least the images that torchattacks' PGD, which judges its last point alone, fools from the same
    starts. But such points lie just behind the boundary of the one gate attacked: for accuracies
    under other gates they are too weak. Without it, the points are those of torchattacks' PGD
    within rounding.
    """

    def __init__(
        self,
        model: ImmunityMoE,
        eps: float = 8 / 255,
        alpha: float = 2 / 255,
        steps: int = 10,
        random_start: bool = True,
        *,
        loss: Loss = cross_entropy,
        stop_early: bool = True,
    ) -> None:
        """eps, alpha: budget and step size, in units of the image's range [0, 1]. loss: what the
        attack raises, from log-probabilities (B, C) and labels (B,) to (B,). Raises ValueError for
        early stopping under a random gate."""
        if stop_early and model.evaluation_gate in RANDOM_GATES:
            raise ValueError(
                f"the gate {model.evaluation_gate!r} is drawn anew in every pass, so one pass "
                "does not show that an image fools it; attack a fixed gate or set stop_early=False"
            )
        super().__init__("FrozenPGD", folded(model))
        self.eps, self.alpha, self.steps, self.random_start = eps, alpha, steps, random_start
        self.loss, self.stop_early = loss, stop_early

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """Adversarial images (B, 3, 32, 32) within eps of `images`, which lie in [0, 1]; labels:
        (B,). Raises ValueError for images and labels outside of their range."""
        check_images(images)
        check_labels(labels, self.model.experts[0].num_classes)
        images, labels = images.detach().to(self.device), labels.to(self.device)
        points = images.clone()
        if self.random_start:
            points = (points + torch.empty_like(points).uniform_(-self.eps, self.eps)).clamp(0, 1)
        attacked = torch.arange(len(images), device=self.device)
        if self.stop_early:
            with torch.no_grad():
                correct = self.get_logits(images).argmax(1) == labels
            points[~correct] = images[~correct]
            attacked = attacked[correct]
        for _ in range(self.steps):
            if not len(attacked):
                break
            attacked, moved = self._step(attacked, images, points, labels)
            points[attacked] = moved
        return points

    def objective(self, points: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """At points (B, 3, 32, 32): what is raised, (B,), and the log-probabilities (B, C) that
        say which points fool the model."""
        log_probs = self.get_logits(points)
        return self.loss(log_probs, labels), log_probs

    def _step(
        self, attacked: Tensor, images: Tensor, points: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Which images to attack on, and their points one step further."""
        centres, labels = images[attacked], labels[attacked]
        starts = points[attacked].requires_grad_()
        with torch.enable_grad():
            raised, log_probs = self.objective(starts, labels)
            total = raised.sum()
        (gradient,) = torch.autograd.grad(total, starts)
        moved = starts.detach() + self.alpha * gradient.sign()
        moved = within_budget(moved, centres, self.eps)
        if not self.stop_early:
            return attacked, moved
        resisting = log_probs.argmax(1) == labels
        return attacked[resisting], moved[resisting]
