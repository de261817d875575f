"""Batches for training and evaluation, from tensors in memory, augmented as whole batches.

On images of 32x32 pixels, a loop over images in Python costs more than the network. Crop, flip and
rotation are therefore one affine map per image, and one resampling of the whole batch.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from immunity_lib.data.image_set import ImageSet
from immunity_lib.parallel import processes, rank

MAXIMAL_SHIFT = 4  # pixels, as a random crop of 32x32 pixels out of an image padded by 4
MAXIMAL_ANGLE = 15.0  # degrees


def training_batches(
    image_set: ImageSet,
    batch_size: int,
    generator: torch.Generator,
    augment: bool = True,
    device: torch.device | str | None = None,
    *,
    rotation: float = MAXIMAL_ANGLE,
    cutout: int = 0,
    fill: Sequence[float] = (0.0, 0.0, 0.0),
    skipped: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Every image once, in random order: images (B, 3, 32, 32) float32 in [0, 1], labels (B,).

    augment: crop, flip and rotate, by at most `rotation` degrees. cutout: side in pixels of a
    square that is hidden under the colour `fill` in every image (DeVries & Taylor 2017, arXiv
    1708.04552); 0: none. skipped: batches at the beginning that are not made.

    Images are channels_last. The order and the augmentation of all batches are drawn from
    `generator`, on the CPU, by the call itself: a run resumed from the generator's state sees the
    same batches, whatever it skips. A last batch of a single image is dropped, since batch
    normalisation cannot train on it. Processes that train together draw the same batches, and each
    gets its share of every batch; shares are equal, so that the last batch may lose some images.
    Raises ValueError for a batch size below 2, and one that cannot be shared equally.
    """
    if batch_size < 2:
        raise ValueError(f"batch_size is {batch_size}; training needs at least 2 images in a batch")
    if batch_size % processes():
        raise ValueError(
            f"batch_size is {batch_size}, which {processes()} processes cannot share equally; "
            "make it a multiple of processes"
        )
    end = len(image_set) // processes() * processes()
    order = torch.randperm(len(image_set), generator=generator)
    maps = _random_maps(len(image_set), generator, rotation) if augment else None
    centres = torch.randint(0, 32, (len(image_set), 2), generator=generator) if cutout else None

    def made(start: int) -> tuple[Tensor, Tensor]:
        batch = slice(start + rank(), min(start + batch_size, end), processes())
        images = _as_floats(image_set.images.index_select(0, order[batch]), device)
        if augment:
            images = resample(images, maps[batch])
        if cutout:
            images = cut_out(images, centres[batch], cutout, fill)
        return _channels_last(images), image_set.labels[order[batch]].to(device)

    return map(made, range(skipped * batch_size, end - 1, batch_size))


def evaluation_batches(
    image_set: ImageSet, batch_size: int, device: torch.device | str | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Every image once, in order and unchanged: images as in `training_batches`, labels (B,).

    Raises ValueError for a batch size below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    for start in range(0, len(image_set), batch_size):
        batch = slice(start, start + batch_size)
        images = _as_floats(image_set.images[batch], device)
        yield _channels_last(images), image_set.labels[batch].to(device)


def augment_batch(images: Tensor, generator: torch.Generator) -> Tensor:
    """A random crop, horizontal flip and rotation of each image (B, 3, 32, 32) in [0, 1].

    The crop shifts by up to 4 pixels in each direction, the rotation turns by up to 15 degrees,
    every second image on average is flipped; what comes in at the border is black. The generator
    is on the CPU, the images may be on any device.
    """
    return resample(images, _random_maps(len(images), generator, MAXIMAL_ANGLE))


def cut_out(images: Tensor, centres: Tensor, side: int, fill: Sequence[float]) -> Tensor:
    """Images (B, 3, 32, 32) with a square in the colour `fill`, cut off at the border, around the
    pixels `centres` (B, 2), as (row, column)."""
    places = torch.arange(images.shape[-1], device=images.device)
    offsets = places - centres.to(images.device)[..., None]
    hidden = (offsets >= -side // 2) & (offsets < side // 2)
    square = hidden[:, 0, :, None] & hidden[:, 1, None, :]
    return torch.where(square[:, None], images.new_tensor(fill).view(3, 1, 1), images)


def _random_maps(count: int, generator: torch.Generator, rotation: float) -> Tensor:
    shifts = torch.randint(-MAXIMAL_SHIFT, MAXIMAL_SHIFT + 1, (count, 2), generator=generator)
    angles = rotation * (2 * torch.rand(count, generator=generator) - 1)
    flipped = torch.rand(count, generator=generator) < 0.5
    return affine_maps(shifts / 32, angles, flipped)


def affine_maps(shifts: Tensor, angles: Tensor, flipped: Tensor) -> Tensor:
    """Maps (B, 2, 3) that shift an image, then flip it where asked, then rotate it.

    shifts: (B, 2), to the right and down, in sides of the image. angles: (B,), degrees
    counter-clockwise about the centre. flipped: (B,) bool, left to right.
    A map leads from the place of an output pixel, as (x, y, 1) in -1 .. 1, to its place in the
    input.
    """
    radians, mirror = angles.deg2rad(), 1 - 2 * flipped.float()
    cosine, sine = radians.cos(), radians.sin()
    right, down = (-2 * shifts).unbind(dim=1)
    maps = [mirror * cosine, -mirror * sine, right, sine, cosine, down]
    return torch.stack(maps, dim=1).view(-1, 2, 3)


def resample(images: Tensor, maps: Tensor) -> Tensor:
    """Images (B, 3, 32, 32) moved by affine maps (B, 2, 3), bilinearly; black comes in outside."""
    height, width = images.shape[-2:]
    of_column, of_row, offset = maps.to(images.device)[..., None, None].unbind(dim=2)
    columns = _pixel_centres(width, images.device)
    rows = _pixel_centres(height, images.device)[:, None]
    # Much faster on the CPU than affine_grid, which multiplies a small matrix for every image.
    places = (of_column * columns + offset) + of_row * rows
    moved = functional.grid_sample(
        images, places.movedim(1, -1), mode="bilinear", padding_mode="zeros", align_corners=False
    )
    return moved.clamp_(0, 1)


def _pixel_centres(count: int, device: torch.device) -> Tensor:
    """Where the centres of pixels are on a side that runs from -1 to 1, as grid_sample has it."""
    return (2 * torch.arange(count, device=device) + 1) / count - 1


def _as_floats(images: Tensor, device: torch.device | str | None) -> Tensor:
    """Images in [0, 1]; they travel to the device as bytes, a quarter of the floats' size."""
    return images.to(device).float().div_(255)


def _channels_last(images: Tensor) -> Tensor:
    return images.contiguous(memory_format=torch.channels_last)
