"""The cost of the heat-map losses: a training step with eqs (9) and (11), against one without.

The arithmetic limit is 1 + T, with T the share of multiply-accumulates behind the Grad-CAM layer:
the maps cost one more backward pass of that tail and its second derivative, three tails on top of
three whole passes.
"""

from dataclasses import replace
from statistics import median

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.sides import random_mixture, take_turns
from immunity_lib.experts import Expert
from immunity_lib.recipe import Recipe
from immunity_lib.train import training_loss

IMAGES, ROUNDS = 32, 7
CASES = (("googlenet", 0.25), ("googlenet-kuangliu", 0.125))
REGULARISED = Recipe()
PLAIN = replace(REGULARISED, beta=0.0, gamma=0.0)


def tail_share(expert: Expert) -> float:
    """The share of an expert's multiply-accumulates that is behind its Grad-CAM layer."""
    images = torch.zeros(1, 3, 32, 32)
    with torch.no_grad(), FlopCounterMode(display=False) as whole:
        expert(images)
    with torch.no_grad(), FlopCounterMode(display=False) as head:
        expert.stages[: expert.head_stages](expert.normalise(images))
    return 1 - head.get_total_flops() / whole.get_total_flops()


def main() -> None:
    for name, width in CASES:
        model, images, labels = random_mixture(name, width, IMAGES)
        limit = 1 + tail_share(model.eval().experts[0])
        model.train()

        def step(recipe: Recipe, model=model, images=images, labels=labels) -> None:
            model.zero_grad()
            training_loss(model, images, labels, recipe, epochs_done=10.0).total.backward()

        seconds = take_turns(
            {
                "plain": lambda step=step: step(PLAIN),
                "regularised": lambda step=step: step(REGULARISED),
            },
            ROUNDS,
        )
        found = median(seconds["regularised"]) / median(seconds["plain"])
        print(
            f"{name}, width {width}: regularised over plain step {found:.2f}, limit {limit:.2f}, "
            f"so {found / limit:.2f} times the limit"
        )
