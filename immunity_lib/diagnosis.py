"""How a model under training does on held-out images."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn

from immunity_lib import scores
from immunity_lib.data import ImageSet
from immunity_lib.data.batches import evaluation_batches
from immunity_lib.heatmaps import empty_share, heatmaps_from_outputs
from immunity_lib.moe import ImmunityMoE
from immunity_lib.objective import adversarial_images
from immunity_lib.randomness import seeded
from immunity_lib.recipes import Recipe


def diagnose(model: ImmunityMoE, validation: ImageSet, recipe: Recipe, device=None) -> dict:
    """What the log says of the model, in eval mode, maps in the fixed reading; random numbers are
    left as they were.

    accuracy of the mixture under the trained gate and of every expert; entropy of the gate in
    nats; share of empty maps; I(C, E) in nats; mean norm of the input's gradient of the mixture's
    cross entropy; robust_accuracy of the mixture under the recipe's own attack, if it has one.
    """
    model.eval()
    sums: dict[str, Tensor | float] = defaultdict(float)
    for images, labels in evaluation_batches(validation, 250, device):
        images.requires_grad_()
        outputs = model.expert_outputs(images)
        mixture = outputs.mixture()
        cross_entropy = nn.functional.nll_loss(mixture, labels, reduction="sum")
        maps = heatmaps_from_outputs(outputs, labels).detach()
        (gradient,) = torch.autograd.grad(cross_entropy, images)
        count = len(labels)
        sums["accuracy"] += (mixture.argmax(-1) == labels).sum()
        sums["expert_accuracy"] += (outputs.logits.argmax(-1) == labels[:, None]).sum(0)
        sums["gate_entropy"] -= (outputs.gate * outputs.log_gate).sum().detach()
        sums["empty_maps"] += empty_share(maps).mean() * count
        sums["mutual_information"] += scores.mutual_information(maps) * count
        sums["input_gradient"] += gradient.flatten(1).norm(dim=1).sum()
        if recipe.adversary:
            with seeded(recipe.seed):
                attacked = adversarial_images(model, images.detach(), labels, recipe)
            with torch.no_grad():
                predicted = model(attacked, gate="trained").argmax(-1)
            sums["robust_accuracy"] += (predicted == labels).sum()
    return {
        what: torch.as_tensor(total).div(len(validation)).tolist() for what, total in sums.items()
    }
