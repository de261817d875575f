"""Experts one after the other, as the mixture runs them, against all at once, stacked under `torch.func.vmap`."""

import torch
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional

from benchmarks.sides import random_mixture, ratios, take_turns

IMAGES, ROUNDS = 64, 5


def main() -> None:
    for name in ("resnet18", "googlenet"):
        model, images, labels = random_mixture(name, 0.25, IMAGES)
        experts = list(model.train().experts)
        stacked, first = stack_module_state(experts), experts[0]

        def logits_of(parameters, buffers, images, first=first):
            return functional_call(first, (parameters, buffers), (images,))

        sides = {
            "stacked": lambda stacked=stacked, images=images, one=logits_of: vmap(one, (0, 0, None))(*stacked, images),
            "one by one": lambda experts=experts, images=images: torch.stack([one(images) for one in experts]),
        }

        def step(outputs, labels=labels) -> torch.Tensor:
            logits = outputs()
            loss = functional.cross_entropy(logits.flatten(0, 1), labels.repeat(len(logits)))
            loss.backward()
            return loss.detach()

        torch.testing.assert_close(*map(step, sides.values()))
        seconds = take_turns({one: lambda outputs=outputs: step(outputs) for one, outputs in sides.items()}, ROUNDS)
        found = ratios(seconds["stacked"], seconds["one by one"])
        print(f"{name}: forward and backward pass of {len(experts)} experts, stacked over one by one, {found}")
