"""The operations of a cell. Those that begin with a ReLU say so by `rectified` and leave it to the
cell, where all operations that read a state share the state's ReLU."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from immunity_lib.layers import BatchNorm2d, Conv2d, MaxPool2d, ReLU


class Convolutions(nn.Sequential):
    """Convolutions and batch norms of an input behind its ReLU."""

    rectified = True


class Pool(nn.Sequential):
    rectified = False


class Skip(nn.Identity):
    rectified = False


class FactorizedReduce(nn.Module):
    """Two 1x1 convolutions, of the pixels with even and of those with odd coordinates: (B, in,
    u, v) behind its ReLU to (B, out, u / 2, v / 2)."""

    rectified = True

    def __init__(self, in_channels: int, out_channels: int, affine: bool) -> None:
        super().__init__()
        self.even = Conv2d(in_channels, out_channels // 2, 1, bias=False)
        self.odd = Conv2d(in_channels, out_channels - out_channels // 2, 1, bias=False)
        self.norm = BatchNorm2d(out_channels, affine=affine)

    def forward(self, rectified: Tensor) -> Tensor:
        # Pixels are picked first: a strided 1x1 convolution is the same, but see resnet.py
        even = self.even(rectified[:, :, ::2, ::2])
        return self.norm(torch.cat([even, self.odd(rectified[:, :, 1::2, 1::2])], 1))


def _separable(
    channels: int, size: int, stride: int, affine: bool, dilation: int = 1
) -> list[nn.Module]:
    """A depthwise and a pointwise convolution and batch norm."""
    padding = dilation * (size - 1) // 2
    return [
        Conv2d(channels, channels, size, stride, padding, dilation, groups=channels, bias=False),
        Conv2d(channels, channels, 1, bias=False),
        BatchNorm2d(channels, affine=affine),
    ]


def _twice_separable(channels: int, size: int, stride: int, affine: bool) -> nn.Module:
    first = _separable(channels, size, stride, affine)
    return Convolutions(*first, ReLU(), *_separable(channels, size, 1, affine))


def _dilated(channels: int, size: int, stride: int, affine: bool) -> nn.Module:
    return Convolutions(*_separable(channels, size, stride, affine, dilation=2))


def _skip(channels: int, stride: int, affine: bool) -> nn.Module:
    return Skip() if stride == 1 else FactorizedReduce(channels, channels, affine)


def _average(channels: int, stride: int, affine: bool) -> nn.Module:
    return Pool(nn.AvgPool2d(3, stride, padding=1, count_include_pad=False))


def _maximum(channels: int, stride: int, affine: bool) -> nn.Module:
    return Pool(MaxPool2d(3, stride, padding=1))


def pointwise(in_channels: int, out_channels: int, affine: bool) -> nn.Module:
    """A 1x1 convolution and batch norm."""
    return Convolutions(
        Conv2d(in_channels, out_channels, 1, bias=False),
        BatchNorm2d(out_channels, affine=affine),
    )


# Each builds an operation from (channels, stride, whether batch norms have weights)
OPERATIONS = {
    "skip_connect": _skip,
    "avg_pool_3x3": _average,
    "max_pool_3x3": _maximum,
    "sep_conv_3x3": lambda channels, *rest: _twice_separable(channels, 3, *rest),
    "sep_conv_5x5": lambda channels, *rest: _twice_separable(channels, 5, *rest),
    "sep_conv_7x7": lambda channels, *rest: _twice_separable(channels, 7, *rest),
    "dil_conv_3x3": lambda channels, *rest: _dilated(channels, 3, *rest),
    "dil_conv_5x5": lambda channels, *rest: _dilated(channels, 5, *rest),
}
