"""What training descends: eq (12), on the images that the training regime shows.

The four regimes are named in `recipes.REGIMES`. Every attack in training is on the trained gate.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from immunity_lib.attacks import attack_images
from immunity_lib.heatmaps import grad_cam, normalised
from immunity_lib.layers import differentiated_twice
from immunity_lib.losses import ImmunityLoss, immunity_loss
from immunity_lib.moe import ExpertOutputs, ImmunityMoE
from immunity_lib.recipes import Recipe


def adversarial_images(
    model: ImmunityMoE, images: Tensor, labels: Tensor, recipe: Recipe
) -> Tensor | None:
    """The images of a batch under the recipe's attack; None if it has none."""
    if recipe.adversary is None:
        return None
    eps, step_size, steps = float(recipe.eps), float(recipe.step_size), recipe.adversary_steps
    attack: str = recipe.adversary
    if recipe.pairing == "trades":
        # It ascends the divergence from the clean answer; FFGSM is that attack's one step of 1.25
        # eps for a cross entropy
        attack, one_step = "tpgd", recipe.adversary == "ffgsm"
        step_size, steps = (1.25 * eps, 1) if one_step else (step_size, steps)
    with mixed_precision(recipe, images.device):
        return attack_images(
            model, images, labels, attack, "trained", eps=eps, step_size=step_size, steps=steps
        )


def training_loss(
    model: ImmunityMoE,
    images: Tensor,
    labels: Tensor,
    recipe: Recipe,
    epochs_done: float,
    adversarial: Tensor | None = None,
) -> ImmunityLoss:
    """Eq (12) on one batch; beta and gamma rise linearly over the warm-up.

    adversarial: the images under attack, where the recipe trains on them. The total also has what
    the recipe's pairing and auxiliary classifier add.
    """
    warm = min(epochs_done / recipe.warmup_epochs, 1.0) if recipe.warmup_epochs else 1.0
    beta, gamma = warm * recipe.beta, warm * recipe.gamma
    maps_wanted = bool(beta or gamma)
    classified = _classified_images(images, adversarial, recipe)
    with mixed_precision(recipe, images.device):
        with differentiated_twice(maps_wanted):
            outputs, auxiliary_logits = _outputs(model, classified, recipe)
        if recipe.pairing != "none":
            other = images if classified is adversarial else adversarial
            other_log_probs = model(other, gate="trained")
    maps = positions = None
    if maps_wanted:
        heat = grad_cam(outputs, labels, create_graph=True, explained=recipe.explained)
        maps = normalised(heat, recipe.floor)
        # A floor's centre of mass never moves, so that eq (11) would reward maps for shrinking
        positions = normalised(heat, recipe.floor, constant_share=True)
    loss = immunity_loss(
        outputs, labels, maps, positions, alpha=recipe.alpha, beta=beta, gamma=gamma,
        coordinates=recipe.coordinates,
    )  # fmt: skip
    total = loss.total
    if recipe.pairing != "none":
        total = total + _pairing_loss(recipe, outputs.mixture(), other_log_probs)
    if auxiliary_logits is not None:
        auxiliary = functional.cross_entropy(auxiliary_logits, labels)
        total = total + recipe.auxiliary_weight * auxiliary
    return replace(loss, total=total)


def _outputs(
    model: ImmunityMoE, images: Tensor, recipe: Recipe
) -> tuple[ExpertOutputs, Tensor | None]:
    """What the model puts out, and the logits of a stand-alone network's auxiliary classifier."""
    if not recipe.auxiliary_weight:
        return model.expert_outputs(images), None
    (network,) = model.experts
    logits, auxiliary = network.forward_with_auxiliary(images)
    logits, auxiliary = logits.to(images.dtype), auxiliary.to(images.dtype)
    return ExpertOutputs(logits[:, None], logits.new_zeros(len(images), 1), ()), auxiliary


def _classified_images(images: Tensor, adversarial: Tensor | None, recipe: Recipe) -> Tensor:
    """The images whose cross entropy and heat maps eq (12) takes."""
    return images if adversarial is None or recipe.pairing == "trades" else adversarial


def _pairing_loss(recipe: Recipe, log_probs: Tensor, other_log_probs: Tensor) -> Tensor:
    """What TRADES and adversarial logit pairing add, mean over the batch, times its weight.

    log_probs, other_log_probs: (B, C), the mixture's for the classified images and for the other
    images of the pair.
    """
    if recipe.pairing == "trades":  # its eq (5): KL(clean || adversarial)
        divergence = functional.kl_div(
            other_log_probs, log_probs, reduction="batchmean", log_target=True
        )
        return recipe.pairing_weight * divergence
    return recipe.pairing_weight * functional.mse_loss(log_probs, other_log_probs)


def mixed_precision(recipe: Recipe, device: torch.device) -> AbstractContextManager:
    """Within it, convolutions and products are in bfloat16 if the recipe says so."""
    if recipe.precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16)
