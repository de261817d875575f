"""An attack made for classifiers that are drawn at random, in the manner of ARC (Dbouk & Shanbhag
2022, arXiv 2206.06737).

Gradients of different experts may cancel in the mean loss, and PGD on it then misses perturbations
that fool some of the gates. ARC turns to one classifier at a time, and keeps a step if it fools no
fewer of all of them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchattacks.attack import Attack

from immunity_lib.attacks.folding import folded
from immunity_lib.attacks.frozen import margin, within_budget
from immunity_lib.checks import check_images, check_labels
from immunity_lib.evaluation import verdicts
from immunity_lib.moe import ExpertOutputs, ImmunityMoE

BEYOND = 1.05  # of the estimated distance to a decision boundary


class ArcAttack(Attack):
    """Greedy l_inf attack on the share of the gate's permutations that are fooled, on a folded
    copy of the model.

    Each step turns to every expert in the order of the batch's mean gate weights, the largest
    first, and moves along the sign of the gradient of its margin: just beyond its decision
    boundary, by a linear estimate, or by alpha if it is beyond already. Where that fools at least
    as many permutations as before, the image keeps the move, so that the share never falls. In ARC
    the classifiers are the randomly drawn ones themselves; here they would be the N! mixtures,
    which share the gradients of N experts.
    """

    def __init__(
        self, model: ImmunityMoE, eps: float = 8 / 255, alpha: float = 2 / 255, steps: int = 10
    ) -> None:
        """eps, alpha: budget and least step size, in units of the image's range [0, 1]."""
        super().__init__("ARC", folded(model))
        self.eps, self.alpha, self.steps = eps, alpha, steps

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """Adversarial images (B, 3, 32, 32) within eps of `images`, which lie in [0, 1]; labels:
        (B,). Raises ValueError for images and labels outside of their range."""
        check_images(images)
        check_labels(labels, self.model.experts[0].num_classes)
        images, labels = images.detach().to(self.device), labels.to(self.device)
        points = images
        with torch.no_grad():
            outputs = self.model.expert_outputs(images)
        fooled = _share_fooled(outputs, labels)
        order = outputs.gate.mean(0).argsort(descending=True).tolist()
        for _ in range(self.steps):
            for expert in order:
                moved = points + self._step(expert, points, labels)
                moved = within_budget(moved, images, self.eps)
                with torch.no_grad():
                    share = _share_fooled(self.model.expert_outputs(moved), labels)
                kept = share >= fooled
                points = torch.where(kept[:, None, None, None], moved, points)
                fooled = torch.where(kept, share, fooled)
        return points

    def _step(self, expert: int, points: Tensor, labels: Tensor) -> Tensor:
        """Up one expert's margin."""
        points = points.clone().requires_grad_()
        with torch.enable_grad():
            _, logits = self.model.experts[expert].forward_with_features(points)
            margins = margin(logits, labels)
            total = margins.sum()
        (gradient,) = torch.autograd.grad(total, points)
        # Along the sign of the gradient, a linear margin rises by the gradient's l_1 norm
        slope = gradient.abs().sum((1, 2, 3)).clamp(min=1e-12)
        length = (BEYOND * -margins.detach() / slope).clamp(self.alpha, 2 * self.eps)
        return length[:, None, None, None] * gradient.sign()


def _share_fooled(outputs: ExpertOutputs, labels: Tensor) -> Tensor:
    """Of the gate's permutations, for each image, (B,)."""
    return verdicts(outputs, labels).failure
