"""The networks of architecture search that the paper compares Immunity with: the network of cells that DARTS
introduced (Liu et al. 2019, arXiv 1806.09055), and the published designs of P-DARTS, AdvRush and the RobNets, which
build on it and are in designs.json.

A cell is a small graph. Its states 0 and 1 are the outputs of the two cells before it, brought to its own number of
channels; each further state is the sum of operations on earlier states; what the cell puts out is the concatenation
of its own states. Two of the cells, at a third and at two thirds of the depth, halve the grid and double the
channels.
"""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from immunity_lib.experts import Expert, convolution, scale_channels

# By name, in the order of `experts.BASELINES`: the source, the channels of a state of the first cells, the number of
# cells, whether batch norms within cells have weights, and the designs: two for the cells that keep the grid and the
# two that halve it, or one for each cell
NETWORKS = json.loads(Path(__file__).with_name("designs.json").read_text("utf-8"))

# All other operations begin with a ReLU and leave it to the cell, where those that read a state share it
UNRECTIFIED = (nn.Identity, nn.AvgPool2d, nn.MaxPool2d)


class FactorizedReduce(nn.Module):
    """Two 1x1 convolutions, of the pixels with even and of those with odd coordinates: (B, in,
    u, v) behind its ReLU to (B, out, u / 2, v / 2)."""

    def __init__(self, in_channels: int, out_channels: int, affine: bool) -> None:
        super().__init__()
        self.even = nn.Conv2d(in_channels, out_channels // 2, 1, bias=False)
        self.odd = nn.Conv2d(in_channels, out_channels - out_channels // 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(out_channels, affine=affine)

    def forward(self, rectified: Tensor) -> Tensor:
        # Pixels are picked first: a strided 1x1 convolution is the same, but see `BasicBlock`
        even = self.even(rectified[:, :, ::2, ::2])
        return self.norm(torch.cat([even, self.odd(rectified[:, :, 1::2, 1::2])], 1))


def pointwise(in_channels: int, out_channels: int, affine: bool) -> nn.Module:
    """A 1x1 convolution and batch norm: (B, in, u, v) to (B, out, u, v)."""
    layer = nn.Conv2d(in_channels, out_channels, 1, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(out_channels, affine=affine))


class DilatedDepthwise(nn.Conv2d):
    """A dilated depthwise convolution, on a processor in float32 whatever the precision: oneDNN's bfloat16 gradient of
    its weights is wrong there, made of memory that was never set (PyTorch 2.14 on AVX-512)."""

    def forward(self, rectified: Tensor) -> Tensor:
        if rectified.device.type != "cpu":
            return super().forward(rectified)
        with torch.autocast("cpu", enabled=False):
            return super().forward(rectified.to(self.weight.dtype))


def _separable(channels: int, stride: int, affine: bool, *, size: int, dilation: int = 1, times: int = 1) -> nn.Module:
    """A depthwise and a pointwise convolution and batch norm, once or twice."""
    padding, layers = dilation * (size - 1) // 2, []
    depthwise = nn.Conv2d if dilation == 1 else DilatedDepthwise
    for step in (stride, 1)[:times]:
        layers += [nn.ReLU(), depthwise(channels, channels, size, step, padding, dilation, channels, bias=False)]
        layers += pointwise(channels, channels, affine)
    return nn.Sequential(*layers[1:])  # the first ReLU is the cell's


# Each builds an operation from its channels, its stride, and whether batch norms have weights
OPERATIONS: dict[str, Callable[[int, int, bool], nn.Module]] = {
    "skip_connect": lambda channels, step, affine: (
        nn.Identity() if step == 1 else FactorizedReduce(channels, channels, affine)
    ),
    "avg_pool_3x3": lambda _, step, __: nn.AvgPool2d(3, step, 1, count_include_pad=False),
    "max_pool_3x3": lambda _, step, __: nn.MaxPool2d(3, step, 1),
    "sep_conv_3x3": partial(_separable, size=3, times=2),
    "sep_conv_5x5": partial(_separable, size=5, times=2),
    "dil_conv_3x3": partial(_separable, size=3, dilation=2),
    "dil_conv_5x5": partial(_separable, size=5, dilation=2),
}

# For each state of a cell, from state 2 on, what it sums up: operations, each with the state that it reads
Design = Sequence[Sequence[tuple[str, int]]]


def reduction_cells(layers: int) -> tuple[int, int]:
    """The indices of the two cells that halve the grid; 6 and 13 of 20."""
    if layers < 3:
        raise ValueError(f"layers is {layers}; a network of cells has at least 3, two that halve")
    return layers // 3, 2 * layers // 3


class Cell(nn.Module):
    """(the output before the last, the last output) to (the last output, this cell's); the stem's stands for both."""

    def __init__(
        self, design: Design, before_last_channels: int, last_channels: int, channels: int, *,
        halves: bool, after_halving: bool, affine: bool,
    ) -> None:  # fmt: skip
        """channels: of each state. halves: whether the cell halves the grid; after_halving: whether the cell before
        did, so that the output before the last is twice as large."""
        super().__init__()
        self.relu = nn.ReLU()
        fit = FactorizedReduce if after_halving else pointwise
        self.preprocess_before_last = fit(before_last_channels, channels, affine)
        self.preprocess_last = pointwise(last_channels, channels, affine)
        self.sources = [[source for _, source in edges] for edges in design]
        self.operations = nn.ModuleList(
            nn.ModuleList(
                OPERATIONS[operation](channels, 2 if halves and source < 2 else 1, affine)
                for operation, source in edges
            )
            for edges in design
        )
        self.out_channels = len(design) * channels
        self.drop_path: Tensor | None = None  # a tensor, since a compiled step would be compiled anew for each number

    def forward(self, outputs: tuple[Tensor, Tensor] | Tensor) -> tuple[Tensor, Tensor]:
        outputs = (outputs, outputs) if isinstance(outputs, Tensor) else outputs
        before_last, last = map(self.relu, outputs)
        states = [self.preprocess_before_last(before_last), self.preprocess_last(last)]
        rectified: dict[int, Tensor] = {}  # by the first that reads it: gradients are summed up in this order
        for sources, operations in zip(self.sources, self.operations, strict=True):
            summands = []
            for source, operation in zip(sources, operations, strict=True):
                state = states[source]
                if not isinstance(operation, UNRECTIFIED):
                    if source not in rectified:
                        rectified[source] = self.relu(state)
                    state = rectified[source]
                summand = operation(state)
                dropped = self.training and self.drop_path is not None and type(operation) is not nn.Identity
                summands.append(_drop_path(summand, self.drop_path) if dropped else summand)
            states.append(sum(summands[1:], summands[0]))
        return outputs[1], torch.cat(states[2:], 1)


def _drop_path(summand: Tensor, share: Tensor) -> Tensor:
    """(B, K, u, v): zero for a random share of the images, scaled up for the others to make up."""
    kept = torch.rand(len(summand), 1, 1, 1, device=summand.device) >= share
    return summand * (kept / (1 - share)).to(summand.dtype)


class CellNetwork(Expert):
    """A network of cells for 32x32 images, one design for each cell; stages "stem", "cell0", ...

    What one stage hands to the next are the last two outputs; the activations are the last.
    """

    def __init__(
        self, designs: Sequence[Design], channels: int, *, affine: bool = True, auxiliary: bool = False, **options: Any
    ) -> None:
        """channels: of a state of the first cells, 36 in the published networks. affine: whether batch norms within
        cells have weights. auxiliary: with a second classifier behind the second cell that halves the grid, for
        training alone. options: as in `Expert`."""
        halving = reduction_cells(len(designs))
        before_last = last = 3 * channels
        stages: dict[str, nn.Module] = {"stem": convolution(3, last, 3, bias=False)[:2]}  # no ReLU
        for index, design in enumerate(designs):
            channels *= 2 if index in halving else 1
            cell = Cell(
                design, before_last, last, channels, halves=index in halving,
                after_halving=index - 1 in halving, affine=affine,
            )  # fmt: skip
            stages[f"cell{index}"] = cell
            before_last, last = last, cell.out_channels
        super().__init__(stages, last, **options)
        self.auxiliary_stages = 1 + halving[1] + 1  # the stem and the cells it stands behind
        self.auxiliary_classifier = None
        if auxiliary:
            channels = self.stages[halving[1] + 1].out_channels  # on a grid of 8x8
            self.auxiliary_classifier = nn.Sequential(
                nn.ReLU(), nn.AvgPool2d(5, stride=3, count_include_pad=False),
                *convolution(channels, 128, 1, bias=False),
                nn.Conv2d(128, 768, 2, bias=False), nn.BatchNorm2d(768), nn.ReLU(),
                nn.Flatten(), nn.Linear(768, self.num_classes),
            )  # fmt: skip

    @staticmethod
    def activations_of(state: tuple[Tensor, Tensor] | Tensor) -> Tensor:
        return state if isinstance(state, Tensor) else state[1]

    def forward_with_auxiliary(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, 32, 32) in [0, 1] to the logits (B, C) of both classifiers."""
        if self.auxiliary_classifier is None:
            raise ValueError("this network was built without its auxiliary classifier")
        state = self.stages[: self.auxiliary_stages](self.normalise(images))
        auxiliary = self.auxiliary_classifier(self.activations_of(state))
        final = self.activations_of(self.stages[self.auxiliary_stages :](state))
        return self.classifier(final.mean((2, 3))), auxiliary

    def set_drop_path(self, share: float) -> None:
        """From now on, in train mode, drop this share of the operations' outputs, in [0, 1)."""
        for cell in self.stages[1:]:
            cell.drop_path = torch.tensor(share, device=self.classifier.weight.device) if share else None


def build_cells(name: str, width: float, layers: int | None = None, **options: Any) -> CellNetwork:
    """One of `NETWORKS`, as published or of fewer layers; options: as in `CellNetwork`."""
    published = NETWORKS[name]
    layers = published["layers"] if layers is None else layers
    if "cells" in published:
        cells = [published["cells"][index] for index in _kept_cells(layers)]
    else:
        halving = reduction_cells(layers)
        cells = [published["reduction" if index in halving else "normal"] for index in range(layers)]
    designs = [decode(cell) if isinstance(cell, str) else cell for cell in cells]
    channels = scale_channels(published["channels"], width)
    return CellNetwork(designs, channels, affine=published["affine"], **options)


# Two bits for an edge of a RobNet: the first for a skip, the second for a separable convolution
CODES = {"00": (), "01": ("sep_conv_3x3",), "10": ("skip_connect",), "11": ("skip_connect", "sep_conv_3x3")}


def decode(encoding: str) -> Design:
    """The design of a cell of a RobNet, from one of `CODES` for each of the 14 edges between its six states: those
    into state 2 (from 0, 1), 3 (from 0 to 2), 4 (from 0 to 3) and 5 (from 0 to 4)."""
    codes = iter(encoding.split())
    return [
        [(operation, source) for source in range(state) for operation in CODES[next(codes)]] for state in (2, 3, 4, 5)
    ]


def _kept_cells(layers: int) -> list[int]:
    """Which of RobNet-free's cells a network of fewer layers is made of: of each of the three parts between the
    halvings, the first ones."""
    published = NETWORKS["robnet-free"]["layers"]
    if layers > published:
        raise ValueError(f"layers is {layers}; RobNet-free has designs for {published}")
    starts = (0, *reduction_cells(published))
    ends = (*reduction_cells(layers), layers)
    kept: list[int] = []
    for start, end in zip(starts, ends, strict=True):
        kept += range(start, start + end - len(kept))
    return kept
