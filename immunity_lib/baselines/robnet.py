"""The RobNets (Guo et al. 2020, arXiv 1911.10695), from their published encodings.

A cell is encoded by one two-bit code for each of the 14 edges between its six states: the first
bit for a skip, the second for a separable convolution. 00 leaves the edge out. The batch norms
within cells have no weights.
"""

from typing import Any

from immunity_lib.baselines.cells import CellNetwork, Design, Edge, reduction_cells
from immunity_lib.experts.expert import scale_channels

LARGE = "11 11  11 11 11  01 11 01 10  11 01 01 01 11"

# One for each of the 20 cells; cells 6 and 13 halve the grid
FREE = (
    "11 10  11 11 10  11 01 01 10  11 11 00 11 01",
    "11 00  01 10 01  00 10 10 00  01 11 10 11 00",
    "11 11  11 01 01  11 01 00 10  00 10 10 00 11",
    "10 11  10 01 01  10 10 01 10  11 00 00 01 10",
    "11 11  01 00 10  10 10 01 10  01 00 10 01 11",
    "11 10  11 11 11  01 10 11 00  10 01 11 01 11",
    "11 11  11 10 10  01 11 10 01  10 10 10 01 10",
    "01 11  11 11 01  11 11 11 01  11 01 11 10 00",
    "11 11  11 11 11  01 01 11 10  01 00 10 01 11",
    "10 11  01 00 11  11 10 11 01  11 11 11 11 00",
    "11 10  11 00 00  00 11 00 01  10 00 01 10 11",
    "01 11  01 11 11  10 10 11 10  11 01 11 10 00",
    "11 11  10 10 01  00 10 11 11  01 10 10 00 01",
    "01 11  11 11 01  01 11 01 01  11 11 01 10 10",
    "01 11  11 11 11  01 00 01 10  10 11 10 10 11",
    "11 11  00 11 11  01 00 01 10  00 11 01 11 11",
    "11 11  01 11 11  10 11 10 10  10 10 10 11 11",
    "10 11  01 11 11  01 11 00 11  11 00 10 00 01",
    "11 10  11 11 11  11 11 10 11  00 11 01 11 11",
    "11 11  01 01 11  11 01 00 00  10 00 01 01 11",
)


def decode(encoding: str) -> Design:
    """The design of a cell from its 14 codes; ValueError for anything else."""
    codes = encoding.split()
    if len(codes) != 14 or not all(code in ("00", "01", "10", "11") for code in codes):
        raise ValueError(
            f"{encoding!r} encodes no cell; one is 14 codes of 00, 01, 10 or 11, for the edges "
            "into state 2 (from 0, 1), 3 (from 0 to 2), 4 (from 0 to 3) and 5 (from 0 to 4)"
        )
    rest = iter(codes)
    return [
        [edge for source in range(state) for edge in _edges(next(rest), source)]
        for state in (2, 3, 4, 5)
    ]


def _edges(code: str, source: int) -> list[Edge]:
    operations = {"skip_connect": code[0], "sep_conv_3x3": code[1]}
    return [Edge(operation, source) for operation, bit in operations.items() if bit == "1"]


class RobNetLarge(CellNetwork):
    """One design for all cells, those that halve the grid too."""

    channels, layers = 36, 20

    def __init__(self, width: float, layers: int | None = None, **options: Any) -> None:
        designs = [decode(LARGE)] * (self.layers if layers is None else layers)
        super().__init__(designs, scale_channels(self.channels, width), affine=False, **options)


class RobNetLargeV2(RobNetLarge):
    channels, layers = 64, 33


class RobNetFree(CellNetwork):
    """A design of its own for every cell. With fewer layers than 20, each of the three parts of
    the network keeps its first cells."""

    def __init__(self, width: float, layers: int = len(FREE), **options: Any) -> None:
        encodings = [FREE[index] for index in _kept_cells(layers)]
        designs = [decode(encoding) for encoding in encodings]
        super().__init__(designs, scale_channels(36, width), affine=False, **options)


def _kept_cells(layers: int) -> list[int]:
    """Which of the 20 cells a network of fewer layers is made of."""
    if layers > len(FREE):
        raise ValueError(f"layers is {layers}; RobNet-free has designs for {len(FREE)}")
    starts = (0, *reduction_cells(len(FREE)))
    ends = (*reduction_cells(layers), layers)
    kept: list[int] = []
    for start, end in zip(starts, ends, strict=True):
        kept += range(start, start + end - len(kept))
    return kept
