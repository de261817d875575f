"""Stochastic gradient descent as recipes ask for it: what is decayed, and the learning rate."""

from __future__ import annotations

import math

import torch

from immunity_lib.moe import ImmunityMoE
from immunity_lib.recipes import Recipe


def optimiser_of(model: ImmunityMoE, recipe: Recipe) -> torch.optim.Optimizer:
    """For all weights of the model."""
    parameters = list(model.parameters())
    groups = [{"params": parameters}]
    if recipe.decayed != "everything":  # biases and batch norms, which are vectors, are left alone
        vectors = [one for one in parameters if one.ndim < 2]
        others = [one for one in parameters if one.ndim >= 2]
        groups = [{"params": others}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.SGD(
        groups, recipe.learning_rate, recipe.momentum, weight_decay=recipe.weight_decay
    )


def learning_rate_factor(schedule: str, done: float) -> float:
    """Factor on the learning rate when the share `done` of the training lies behind."""
    if schedule == "cosine":
        return (1 + math.cos(math.pi * done)) / 2
    if schedule == "multistep":
        return 0.1 ** sum(done >= milestone for milestone in (0.5, 0.75))
    if schedule == "warmup-cosine":  # of the RobNets: 0.02 to 1.2 in 20 epochs, to 0.001 in 150
        if done < 20 / 170:
            return (0.02 + (1.2 - 0.02) * done * 170 / 20) / 1.2
        rest = (done - 20 / 170) / (150 / 170)
        return (0.001 + (1.2 - 0.001) * (1 + math.cos(math.pi * rest)) / 2) / 1.2
    if schedule == "one-cycle":  # linear up for a quarter of the training, linear down after
        return max(min(4 * done, (1 - done) / 0.75), 1e-3)
    return 1.0
