"""ResNet18 for 32x32 images (He et al. 2016, arXiv 1512.03385).

As usual for CIFAR, the stem is a single 3x3 convolution without stride or pooling.
"""

from typing import Any

from torch import Tensor, nn

from immunity_lib.experts.expert import Expert, scale_channels
from immunity_lib.layers import BatchNorm2d, Conv2d, ReLU


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut: (B, in, u, v) to (B, out, u/stride, v/stride)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False),
            BatchNorm2d(out_channels),
            ReLU(),
            Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
            BatchNorm2d(out_channels),
        )
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            # A 1x1 convolution with a stride, in two steps: as one it writes past its buffers on
            # processors without AVX-512 (oneDNN) where the channels are no multiple of 8
            self.shortcut = nn.Sequential(
                nn.AvgPool2d(1, stride),
                Conv2d(in_channels, out_channels, 1, bias=False),
                BatchNorm2d(out_channels),
            )
        self.relu = ReLU()

    def forward(self, activations: Tensor) -> Tensor:
        return self.relu(self.residual(activations) + self.shortcut(activations))


class ResNet18(Expert):
    """Stem and four stages of two basic blocks; on 32x32 images their grids are 32, 16, 8, 4."""

    def __init__(self, width: float, **options: Any) -> None:
        channels = scale_channels(64, width)
        stages: dict[str, nn.Module] = {
            "stem": nn.Sequential(
                Conv2d(3, channels, 3, padding=1, bias=False), BatchNorm2d(channels), ReLU()
            )
        }
        for number, (full_width, stride) in enumerate(((64, 1), (128, 2), (256, 2), (512, 2)), 1):
            in_channels, channels = channels, scale_channels(full_width, width)
            stages[f"stage{number}"] = nn.Sequential(
                BasicBlock(in_channels, channels, stride), BasicBlock(channels, channels, 1)
            )
        super().__init__(stages, channels, **options)
