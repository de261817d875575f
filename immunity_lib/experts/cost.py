"""What a forward pass of an expert costs, and which share of it lies behind the heat map."""

import copy
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

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
    """Count the multiply-accumulates of head and tail; the expert itself is not run."""
    # Meta tensors have a shape but no values, so counting costs no computation.
    shapes_only = copy.deepcopy(expert).to("meta")
    images = torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE, device="meta")
    with FlopCounterMode(display=False) as head, torch.no_grad():
        state = shapes_only.head(images)
    with FlopCounterMode(display=False) as tail, torch.no_grad():
        shapes_only.tail(state)
    return MultiplyAccumulates(head.get_total_flops() // 2, tail.get_total_flops() // 2)
