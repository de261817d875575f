"""The network of cells that DARTS introduced (Liu et al. 2019, arXiv 1806.09055) and that P-DARTS,
AdvRush and the RobNets build on.

A cell is a small graph. Its states 0 and 1 are the outputs of the two cells before it, brought to
its own number of channels; each further state is the sum of operations on earlier states; what the
cell puts out is the concatenation of its own states. Two of the cells, at a third and at two
thirds of the depth, halve the grid and double the channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from immunity_lib.baselines.operations import OPERATIONS, FactorizedReduce, Skip, pointwise
from immunity_lib.experts.expert import Expert, scale_channels
from immunity_lib.layers import BatchNorm2d, Conv2d, ReLU


class Edge(NamedTuple):
    """An operation on one of the states before; 0 and 1 are the outputs of the cells before."""

    operation: str
    source: int


Design = Sequence[Sequence[Edge]]  # for each state of a cell, from state 2 on, what it sums up


def check_design(design: Design) -> None:
    """Raise ValueError for a cell that cannot be built, naming the edge and what would be valid."""
    if not design:
        raise ValueError("a cell needs at least one state of its own; its design is empty")
    for state, edges in enumerate(design, start=2):
        if not edges:
            raise ValueError(f"state {state} of a cell has no incoming edge; give it at least one")
        for operation, source in edges:
            if operation not in OPERATIONS:
                valid = ", ".join(OPERATIONS)
                raise ValueError(f"unknown operation {operation!r} of a cell; choose from {valid}")
            if not 0 <= source < state:
                raise ValueError(
                    f"{operation} into state {state} comes from state {source}; "
                    f"it can come from 0 to {state - 1}"
                )


def reduction_cells(layers: int) -> tuple[int, int]:
    """The indices of the two cells that halve the grid; 6 and 13 of 20."""
    if layers < 3:
        raise ValueError(f"layers is {layers}; a network of cells has at least 3, two that halve")
    return layers // 3, 2 * layers // 3


def genotype_designs(normal: Design, reduction: Design, layers: int) -> list[Design]:
    """The designs of all cells where there are two kinds, those that keep the grid and others."""
    halving = reduction_cells(layers)
    return [reduction if index in halving else normal for index in range(layers)]


class Cell(nn.Module):
    """(the output before the last, the last output) to (the last output, this cell's)."""

    def __init__(
        self,
        design: Design,
        before_last_channels: int,
        last_channels: int,
        channels: int,
        *,
        halves: bool,
        after_halving: bool,
        affine: bool,
    ) -> None:
        """channels: of each state. halves: whether the cell halves the grid; after_halving:
        whether the cell before did, so that the output before the last is twice as large."""
        super().__init__()
        check_design(design)
        self.relu = ReLU()
        self.preprocess_before_last = (
            FactorizedReduce(before_last_channels, channels, affine)
            if after_halving
            else pointwise(before_last_channels, channels, affine)
        )
        self.preprocess_last = pointwise(last_channels, channels, affine)
        self.sources = [[edge.source for edge in edges] for edges in design]
        self.operations = nn.ModuleList(
            nn.ModuleList(
                OPERATIONS[operation](channels, 2 if halves and source < 2 else 1, affine)
                for operation, source in edges
            )
            for edges in design
        )
        self.out_channels = len(design) * channels
        self.drop_path = 0.0

    def forward(self, outputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        before_last, last = outputs
        states = [
            self.preprocess_before_last(self.relu(before_last)),
            self.preprocess_last(self.relu(last)),
        ]
        rectified: dict[int, Tensor] = {}
        for sources, operations in zip(self.sources, self.operations, strict=True):
            summands = []
            for source, operation in zip(sources, operations, strict=True):
                if operation.rectified and source not in rectified:
                    rectified[source] = self.relu(states[source])
                summand = operation(rectified[source] if operation.rectified else states[source])
                dropped = self.training and self.drop_path and not isinstance(operation, Skip)
                summands.append(_dropped(summand, self.drop_path) if dropped else summand)
            states.append(sum(summands[1:], summands[0]))
        return last, torch.cat(states[2:], 1)


def _dropped(summand: Tensor, share: float) -> Tensor:
    """Drop-path: zero for a random share of the images, and larger for the others to make up."""
    kept = torch.empty(len(summand), 1, 1, 1, device=summand.device).bernoulli_(1 - share)
    return summand * (kept / (1 - share)).to(summand.dtype)


class Stem(nn.Sequential):
    """Convolution and batch norm, no ReLU; both inputs of the first cell."""

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        out = super().forward(images)
        return out, out


class CellNetwork(Expert):
    """A network of cells for 32x32 images, one design for each cell; stages "stem", "cell0", ...

    What one stage hands to the next are the last two outputs; the activations are the last.
    """

    def __init__(
        self,
        designs: Sequence[Design],
        channels: int,
        *,
        affine: bool = True,
        auxiliary: bool = False,
        **options: Any,
    ) -> None:
        """channels: of a state of the first cells, 36 in the published networks. affine: whether
        batch norms within cells have weights. auxiliary: with a second classifier behind the
        second cell that halves the grid, for training alone. options: as in `Expert`."""
        halving = reduction_cells(len(designs))
        stem_channels = 3 * channels
        stages: dict[str, nn.Module] = {
            "stem": Stem(
                Conv2d(3, stem_channels, 3, padding=1, bias=False), BatchNorm2d(stem_channels)
            )
        }
        before_last = last = stem_channels
        for index, design in enumerate(designs):
            channels *= 2 if index in halving else 1
            cell = Cell(
                design, before_last, last, channels, halves=index in halving,
                after_halving=index - 1 in halving, affine=affine,
            )  # fmt: skip
            stages[f"cell{index}"] = cell
            before_last, last = last, cell.out_channels
            if index == halving[1]:
                auxiliary_channels = last
        super().__init__(stages, last, **options)
        self.auxiliary_stages = 1 + halving[1] + 1  # the stem and the cells it stands behind
        self.auxiliary_classifier = (
            _auxiliary_classifier(auxiliary_channels, self.num_classes) if auxiliary else None
        )

    @staticmethod
    def activations_of(state: tuple[Tensor, Tensor]) -> Tensor:
        return state[1]

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
        for stage in self.stages:
            if isinstance(stage, Cell):
                stage.drop_path = share


class GenotypeNetwork(CellNetwork):
    """One design for the cells that keep the grid, another for the two that halve it; 36 channels
    and 20 cells at full size."""

    normal: Design
    reduction: Design

    def __init__(self, width: float, layers: int = 20, **options: Any) -> None:
        designs = genotype_designs(self.normal, self.reduction, layers)
        super().__init__(designs, scale_channels(36, width), **options)


def _auxiliary_classifier(channels: int, num_classes: int) -> nn.Module:
    """From the grid of 8x8, (B, channels, 8, 8), to logits (B, C)."""
    return nn.Sequential(
        nn.ReLU(),
        nn.AvgPool2d(5, stride=3, count_include_pad=False),
        nn.Conv2d(channels, 128, 1, bias=False),
        BatchNorm2d(128),
        nn.ReLU(),
        nn.Conv2d(128, 768, 2, bias=False),
        BatchNorm2d(768),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(768, num_classes),
    )
