"""Images in memory: where they come from, one split of them, and batches of it.

On images of 32x32 pixels, a loop over images in Python costs more than the network. Crop, flip and rotation are
therefore one affine map per image, and one resampling of the whole batch.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional

from immunity_lib.recipe import Recipe

MAXIMAL_SHIFT = 4  # pixels, as a random crop of 32x32 pixels out of an image padded by 4

Device = torch.device | str | None
Batches = Iterator[tuple[Tensor, Tensor]]  # images (B, 3, 32, 32) float32 in [0, 1], channels_last; labels (B,)


@dataclass(frozen=True, eq=False)
class ImageSet:
    """One split of a data set; the masks are for Parts-10 only."""

    images: Tensor  # (B, 3, 32, 32) uint8
    labels: Tensor  # (B,) int64
    part_masks: Tensor | None = None  # (B, P, 32, 32) bool, the visible pixels of each part
    background: Tensor | None = None  # (B, 32, 32) bool, the pixels that show no object

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8:  # batches divide them by 255
            remedy = "give 8-bit pixels, of images in [0, 1] as (255 * images).round().to(torch.uint8)"
            raise ValueError(f"images are {self.images.dtype}; an ImageSet holds torch.uint8: {remedy}")
        if self.images.shape[1:] != (3, 32, 32) or self.labels.shape != self.images.shape[:1]:
            found = f"images of shape {tuple(self.images.shape)} and labels of shape {tuple(self.labels.shape)}"
            raise ValueError(f"{found}; an ImageSet holds (B, 3, 32, 32) and (B,)")
        if self.labels.dtype != torch.int64 or (self.labels < 0).any():  # training passes over -100
            found = f"labels are {self.labels.dtype}, from {self.labels.min().item() if len(self.labels) else 'none'}"
            raise ValueError(f"{found}; an ImageSet holds classes 0, 1, ... as torch.int64")

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def checksum(self) -> str:
        """SHA-256 over pixels and labels, in hexadecimal."""
        digest = hashlib.sha256(self.images.contiguous().numpy())
        digest.update(self.labels.contiguous().numpy())
        return digest.hexdigest()

    def select(self, rows: Tensor | slice) -> "ImageSet":
        """The rows of these numbers, in their order; those of a slice are not copied."""
        tensors = (self.images, self.labels, self.part_masks, self.background)
        return ImageSet(*(None if tensor is None else tensor[rows] for tensor in tensors))

    def balanced(self, k: int) -> Tensor:
        """The numbers of k rows that show every class as often as any other, within one, as far as there are so many:
        the first image of each class, then the second. So do the first of them, however few."""
        among_its_class = functional.one_hot(self.labels).cumsum(0).gather(1, self.labels[:, None]).squeeze(1)
        return among_its_class.argsort(stable=True)[:k]

    def first(self, k: int) -> "ImageSet":
        """The first k rows, or all of fewer."""
        return self.select(slice(k))


@dataclass(frozen=True)
class Source:
    """Where images are; read(split, count) gives a split's first rows, and decodes no more."""

    description: str
    class_names: tuple[str, ...]  # in the order of the labels
    available: dict[str, int]  # rows by split
    read: Callable[[str, int], ImageSet]


def training_batches(
    image_set: ImageSet, batch_size: int, generator: torch.Generator, augment: bool = True,
    device: Device = None, *, rotation: float = Recipe.rotation, cutout: int = 0,
    fill: Sequence[float] = (0.0, 0.0, 0.0),
) -> Batches:  # fmt: skip
    """Every image once, in random order.

    augment: crop by up to 4 pixels in each direction, flip every second image on average, rotate by up to `rotation`
    degrees. cutout: side in pixels of a square that is hidden under the colour `fill` in every image (DeVries &
    Taylor 2017, arXiv 1708.04552); 0: none.

    All is drawn from `generator`, on the CPU, by the call itself: equal states give equal batches. A last batch of a
    single image is dropped, since batch normalisation cannot train on it. ValueError for a batch size below 2.
    """
    if batch_size < 2:
        raise ValueError(f"batch_size is {batch_size}; training needs at least 2 images in a batch")
    count = len(image_set)
    order = torch.randperm(count, generator=generator)
    maps = random_maps(count, generator, rotation) if augment else None
    centres = torch.randint(0, 32, (count, 2), generator=generator) if cutout else None

    def batch_from(start: int) -> tuple[Tensor, Tensor]:
        batch = slice(start, start + batch_size)
        images = _as_floats(image_set.images.index_select(0, order[batch]), device)
        if augment:
            images = resample(images, maps[batch])
        if cutout:
            images = cut_out(images, centres[batch], cutout, fill)
        return images.contiguous(memory_format=torch.channels_last), image_set.labels[order[batch]].to(device)

    return map(batch_from, range(0, count - 1, batch_size))


def evaluation_batches(image_set: ImageSet, batch_size: int, device: Device = None) -> Batches:
    """Every image once, in order and unchanged. ValueError for a batch size below 1."""
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    for start in range(0, len(image_set), batch_size):
        batch = slice(start, start + batch_size)
        images = _as_floats(image_set.images[batch], device).contiguous(memory_format=torch.channels_last)
        yield images, image_set.labels[batch].to(device)


def random_maps(count: int, generator: torch.Generator, rotation: float) -> Tensor:
    """Random `affine_maps`, (count, 2, 3), as `training_batches` says."""
    shifts = torch.randint(-MAXIMAL_SHIFT, MAXIMAL_SHIFT + 1, (count, 2), generator=generator)
    angles = rotation * (2 * torch.rand(count, generator=generator) - 1)
    flipped = torch.rand(count, generator=generator) < 0.5
    return affine_maps(shifts / 32, angles, flipped)


def affine_maps(shifts: Tensor, angles: Tensor, flipped: Tensor) -> Tensor:
    """Maps (B, 2, 3), each from an output pixel's place, as (x, y, 1) in -1 .. 1, to its place in the input: shift by
    (B, 2) sides of the image, to the right and down, flip left to right where (B,) is true, rotate by (B,) degrees
    counter-clockwise about the centre, in this order."""
    radians, mirror = angles.deg2rad(), 1 - 2 * flipped.float()
    cosine, sine = radians.cos(), radians.sin()
    right, down = (-2 * shifts).unbind(dim=1)
    maps = [mirror * cosine, -mirror * sine, right, sine, cosine, down]
    return torch.stack(maps, dim=1).view(-1, 2, 3)


def resample(images: Tensor, maps: Tensor) -> Tensor:
    """Images (B, 3, 32, 32) moved by affine maps (B, 2, 3), bilinearly; black comes in outside."""
    of_column, of_row, offset = maps.to(images.device)[..., None, None].unbind(dim=2)
    # The centres of pixels, on a side from -1 to 1. This is much faster on the CPU than affine_grid, which multiplies
    # a small matrix for every image.
    centres = (2 * torch.arange(32, device=images.device) + 1) / 32 - 1
    places = (of_column * centres + offset) + of_row * centres[:, None]
    return functional.grid_sample(images, places.movedim(1, -1), align_corners=False).clamp_(0, 1)


def cut_out(images: Tensor, centres: Tensor, side: int, fill: Sequence[float]) -> Tensor:
    """Images (B, 3, 32, 32) with a square in the colour `fill`, cut off at the border, around the pixels `centres`
    (B, 2), as (row, column)."""
    offsets = torch.arange(32, device=images.device) - centres.to(images.device)[..., None]
    hidden = (offsets >= -side // 2) & (offsets < side // 2)
    square = hidden[:, 0, :, None] & hidden[:, 1, None, :]
    return torch.where(square[:, None], images.new_tensor(fill).view(3, 1, 1), images)


def _as_floats(images: Tensor, device: Device) -> Tensor:
    """Images in [0, 1]; they travel to the device as bytes, a quarter of the floats' size."""
    return images.to(device).float().div_(255)
