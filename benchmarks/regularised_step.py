"""The cost of the heat-map losses: a training step with eqs (9) and (11), against one without.

The arithmetic limit is 1 + T, with T the share of multiply-accumulates behind the Grad-CAM layer:
the maps cost one more backward pass of that tail and its second derivative, three tails on top of
three whole passes. Run with `python -m benchmarks.regularised_step`.
"""

from dataclasses import replace
from statistics import median

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.timing import take_turns
from immunity_lib import ImmunityMoE, build_expert
from immunity_lib.experts import Expert
from immunity_lib.recipe import Recipe
from immunity_lib.train import training_loss

EXPERTS, IMAGES, ROUNDS = 5, 32, 7
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
    torch.set_num_threads(1)
    for name, width in CASES:
        torch.manual_seed(0)
        experts = [build_expert(name, 10, width) for _ in range(EXPERTS)]
        limit = 1 + tail_share(experts[0].eval())
        model = ImmunityMoE(experts).to(memory_format=torch.channels_last).train()
        images = torch.rand(IMAGES, 3, 32, 32).contiguous(memory_format=torch.channels_last)
        labels = torch.randint(0, 10, (IMAGES,))

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


if __name__ == "__main__":
    main()
