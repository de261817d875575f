"""What a forward pass of an expert costs, and which share of it lies behind the heat map."""

import copy
from collections import Counter
from typing import NamedTuple

import torch
from torch import nn

from immunity_lib.experts.expert import IMAGE_SIZE, Expert


class MultiplyAccumulates(NamedTuple):
    """Multiply-accumulates of convolutions and linear layers for one 32x32 image."""

    head: int
    tail: int

    @property
    def tail_share(self) -> float:
        """Tail over total, in [0, 1]: the part of a pass that Grad-CAM differentiates again."""
        return self.tail / (self.head + self.tail)


def multiply_accumulates(expert: Expert) -> MultiplyAccumulates:
    """Count the multiply-accumulates of head and tail in a dry run of a copy with one image."""
    copied = copy.deepcopy(expert).eval()
    counted: Counter[str] = Counter()
    part = "head"

    def count(layer: nn.Conv2d | nn.Linear, _, output: torch.Tensor) -> None:
        # Each number that a layer puts out is a product with one of its filters
        counted[part] += output.numel() * layer.weight[0].numel()

    for module in copied.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    images = torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE, device=copied.classifier.weight.device)
    with torch.no_grad():
        state = copied.head(images)
        part = "tail"
        copied.tail(state)
    return MultiplyAccumulates(counted["head"], counted["tail"])
