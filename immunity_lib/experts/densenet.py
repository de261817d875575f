"""DenseNet121 for 32x32 images (Huang et al. 2017, arXiv 1608.06993).

As usual for CIFAR, the stem is a single bare 3x3 convolution without stride or pooling.
"""

from typing import Any

import torch
from torch import Tensor, nn

from immunity_lib.experts.expert import Expert, scale_channels
from immunity_lib.layers import BatchNorm2d, Conv2d, ReLU


class DenseLayer(nn.Module):
    """Adds `growth` channels: (B, K, u, v) to (B, K + growth, u, v), the old ones first."""

    def __init__(self, in_channels: int, growth: int) -> None:
        super().__init__()
        self.new_channels = nn.Sequential(
            BatchNorm2d(in_channels),
            ReLU(),
            Conv2d(in_channels, 4 * growth, 1, bias=False),
            BatchNorm2d(4 * growth),
            ReLU(),
            Conv2d(4 * growth, growth, 3, padding=1, bias=False),
        )

    def forward(self, activations: Tensor) -> Tensor:
        return torch.cat((activations, self.new_channels(activations)), 1)


def transition(channels: int) -> nn.Sequential:
    """Halves the channels and the grid: (B, K, u, v) to (B, K/2, u/2, v/2)."""
    return nn.Sequential(
        BatchNorm2d(channels),
        ReLU(),
        Conv2d(channels, channels // 2, 1, bias=False),
        nn.AvgPool2d(2),
    )


class DenseNet121(Expert):
    """Four dense blocks of 6, 12, 24 and 16 layers; on 32x32 images their grids are 32, 16, 8, 4.

    Every channel count follows from the growth rate (32 at width 1), so width scales that alone;
    with its minimum of 4, widths below 0.125 give the network of width 0.125.
    """

    def __init__(self, width: float, **options: Any) -> None:
        growth = scale_channels(32, width)
        channels = 2 * growth
        stages: dict[str, nn.Module] = {"stem": Conv2d(3, channels, 3, padding=1, bias=False)}
        for number, layers in enumerate((6, 12, 24, 16), 1):
            if number > 1:
                stages[f"transition{number - 1}"] = transition(channels)
                channels //= 2
            stages[f"dense{number}"] = nn.Sequential(
                *(DenseLayer(channels + layer * growth, growth) for layer in range(layers))
            )
            channels += layers * growth
        stages["norm"] = nn.Sequential(BatchNorm2d(channels), ReLU())
        super().__init__(stages, channels, **options)
