"""What a data set is in memory: tensors, class names and the statistics of its channels."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch


@dataclass(frozen=True, eq=False)
class ImageSet:
    """One split of a data set.

    images: (B, 3, 32, 32) uint8. labels: (B,) int64.
    part_masks: (B, P, 32, 32) bool, the visible pixels of each part, and
    background: (B, 32, 32) bool, the pixels that show no object; both for Parts-10 only.
    """

    images: torch.Tensor
    labels: torch.Tensor
    part_masks: torch.Tensor | None = None
    background: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def checksum(self) -> str:
        """SHA-256 over pixels and labels, in hexadecimal."""
        digest = hashlib.sha256(self.images.contiguous().numpy())
        digest.update(self.labels.contiguous().numpy())
        return digest.hexdigest()

    def rows(self, start: int, stop: int) -> "ImageSet":
        """The rows from start up to stop, not copied; ValueError where there are none."""
        if not 0 <= start <= stop <= len(self):
            raise ValueError(f"rows {start} to {stop} asked for, of an image set of {len(self)}")
        return ImageSet(
            images=self.images[start:stop],
            labels=self.labels[start:stop],
            part_masks=None if self.part_masks is None else self.part_masks[start:stop],
            background=None if self.background is None else self.background[start:stop],
        )

    def first(self, k: int) -> "ImageSet":
        """The first k rows."""
        return self.rows(0, k)


@dataclass(frozen=True, eq=False)
class Dataset:
    """All splits of a data set, with what a model needs to know of it.

    mean, std: per channel, of images in [0, 1]. part_names: for Parts-10 only, else empty.
    source: how the images were obtained ("generated", "torchvision archive", "parquet files",
    "torchvision download", "image folder ..."). splits: "train", "validation", "test"; Parts-10
    also "test-shifted".
    """

    name: str
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    part_names: tuple[str, ...]
    source: str
    splits: dict[str, ImageSet]


@dataclass(frozen=True)
class Source:
    """Somewhere images come from: how many rows each split has, and a way to read the first ones.

    class_names: in the order of the labels.
    read(split, count) returns the first count rows of a split, and decodes no more than those.
    """

    description: str
    class_names: tuple[str, ...]
    available: dict[str, int]
    read: Callable[[str, int], ImageSet]
