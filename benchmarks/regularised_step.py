"""The cost of the heat-map losses: a training step with eqs (9) and (11), against one without.

The arithmetic limit is 1 + T, with T the share of multiply-accumulates behind the Grad-CAM layer:
the maps cost one more backward pass of that tail and its second derivative, three tails on top of
three whole passes. The goal is 1.15 times that limit. The same step with PyTorch's own layers
shows what `immunity_lib/layers` is for.
Run with `python -m benchmarks.regularised_step`.
"""

from contextlib import nullcontext
from statistics import median
from unittest.mock import patch

import torch

from benchmarks.timing import take_turns
from immunity_lib import ImmunityMoE, build_expert, objective
from immunity_lib.experts import multiply_accumulates
from immunity_lib.objective import training_loss
from immunity_lib.recipes import ModelName, recipe
from immunity_lib.settings import load_preset

SETTINGS = load_preset("demo")
EXPERTS, IMAGES, ROUNDS = 5, 32, 7
CASES = (("googlenet", 0.25), ("googlenet-kuangliu", 0.125))


def main() -> None:
    torch.set_num_threads(1)
    for name, width in CASES:
        torch.manual_seed(0)
        experts = [build_expert(name, 10, width) for _ in range(EXPERTS)]
        model = ImmunityMoE(experts).to(memory_format=torch.channels_last).train()
        images = torch.rand(IMAGES, 3, 32, 32).contiguous(memory_format=torch.channels_last)
        labels = torch.randint(0, 10, (IMAGES,))

        def step(method: str, name=name, model=model, images=images, labels=labels) -> None:
            model.zero_grad()
            wanted = recipe(SETTINGS, ModelName.parse(f"parts10-{method}-{name}-standard-seed0"))
            training_loss(model, images, labels, wanted, epochs_done=10.0).total.backward()

        def stock_step(step=step) -> None:
            with patch.object(objective, "differentiated_twice", lambda expected: nullcontext()):
                step("immunity")

        seconds = take_turns(
            {
                "plain": lambda step=step: step("moe"),
                "regularised": lambda step=step: step("immunity"),
                "stock regularised": stock_step,
            },
            ROUNDS,
        )
        limit = 1 + multiply_accumulates(experts[0]).tail_share
        plain = median(seconds["plain"])
        ours = median(seconds["regularised"]) / plain
        theirs = median(seconds["stock regularised"]) / plain
        print(
            f"{name}, width {width}: regularised over plain step {ours:.2f}, limit {limit:.2f}, "
            f"so {ours / limit:.2f} times the limit; with PyTorch's own layers {theirs:.2f}"
        )


if __name__ == "__main__":
    main()
