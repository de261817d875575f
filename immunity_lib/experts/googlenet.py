"""GoogLeNet for 32x32 images, in two forms (Szegedy et al. 2015, arXiv 1409.4842).

Both have the nine inception blocks of the paper, with batch norm after every convolution, two
3x3 convolutions in place of the 5x5 one, and no auxiliary classifier. They differ in the stem:

- `GoogLeNet`: three convolutions and a max-pool, the form of weiaicunzai/pytorch-cifar100. Two
  things of the original are left out: its dropout before the classifier, which would make the
  heat maps of training and evaluation differ, and a batch norm with its channel count for
  epsilon, a slip that damps its branch. Neither changes the parameter count.
- `GoogLeNetKuangliu`: a single convolution, the form of kuangliu/pytorch-cifar. All inception
  blocks work at twice the resolution, for three times the compute.
"""

from typing import Any

import torch
from torch import Tensor, nn

from immunity_lib.experts.expert import Expert, scale_channels
from immunity_lib.layers import BatchNorm2d, Conv2d, MaxPool2d, ReLU

# Output channels: 1x1 | 1x1 -> 3x3 | 1x1 -> "5x5" | pool -> 1x1.
INCEPTION_CHANNELS = {
    "inception3a": (64, 96, 128, 16, 32, 32),
    "inception3b": (128, 128, 192, 32, 96, 64),
    "inception4a": (192, 96, 208, 16, 48, 64),
    "inception4b": (160, 112, 224, 24, 64, 64),
    "inception4c": (128, 128, 256, 24, 64, 64),
    "inception4d": (112, 144, 288, 32, 64, 64),
    "inception4e": (256, 160, 320, 32, 128, 128),
    "inception5a": (256, 160, 320, 32, 128, 128),
    "inception5b": (384, 192, 384, 48, 128, 128),
}


def convolution(
    in_channels: int, out_channels: int, kernel_size: int, bias: bool = True
) -> nn.Sequential:
    """Convolution that keeps the grid, batch norm, ReLU."""
    return nn.Sequential(
        Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=bias),
        BatchNorm2d(out_channels),
        ReLU(),
    )


def halve_grid() -> MaxPool2d:
    return MaxPool2d(3, stride=2, padding=1)


class Inception(nn.Module):
    """Four parallel branches, concatenated: (B, in, u, v) to (B, out_channels, u, v)."""

    def __init__(self, in_channels: int, branch_channels: list[int]) -> None:
        super().__init__()
        one, three_reduced, three, five_reduced, five, pooled = branch_channels
        self.out_channels = one + three + five + pooled
        self.branches = nn.ModuleList(
            (
                convolution(in_channels, one, 1),
                nn.Sequential(
                    convolution(in_channels, three_reduced, 1),
                    convolution(three_reduced, three, 3),
                ),
                nn.Sequential(
                    convolution(in_channels, five_reduced, 1),
                    convolution(five_reduced, five, 3),
                    convolution(five, five, 3),
                ),
                nn.Sequential(
                    MaxPool2d(3, stride=1, padding=1), convolution(in_channels, pooled, 1)
                ),
            )
        )

    def forward(self, activations: Tensor) -> Tensor:
        return torch.cat([branch(activations) for branch in self.branches], 1)


def inception_stages(in_channels: int, width: float) -> tuple[dict[str, nn.Module], int]:
    """The nine inception blocks with a max-pool before 4a and 5a, and their output channels."""
    stages: dict[str, nn.Module] = {}
    channels = in_channels
    for name, full_width in INCEPTION_CHANNELS.items():
        if name in ("inception4a", "inception5a"):
            stages[f"pool{name[-2]}"] = halve_grid()
        block = Inception(channels, [scale_channels(count, width) for count in full_width])
        stages[name] = block
        channels = block.out_channels
    return stages, channels


class GoogLeNet(Expert):
    """The light form; on 32x32 images the blocks 3, 4 and 5 have grids of 16, 8 and 4."""

    def __init__(self, width: float, **options: Any) -> None:
        first, last = scale_channels(64, width), scale_channels(192, width)
        stem = nn.Sequential(
            convolution(3, first, 3, bias=False),
            convolution(first, first, 3, bias=False),
            convolution(first, last, 3, bias=False),
        )
        stages, channels = inception_stages(last, width)
        super().__init__({"stem": stem, "pool3": halve_grid(), **stages}, channels, **options)


class GoogLeNetKuangliu(Expert):
    """The heavy form; on 32x32 images the blocks 3, 4 and 5 have grids of 32, 16 and 8."""

    def __init__(self, width: float, **options: Any) -> None:
        stem_channels = scale_channels(192, width)
        stages, channels = inception_stages(stem_channels, width)
        super().__init__({"stem": convolution(3, stem_channels, 3), **stages}, channels, **options)
