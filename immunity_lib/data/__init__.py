"""Data sets as tensors in memory: Parts-10 (generated), CIFAR-10, CIFAR-100, your own images."""

import os

import torch

from immunity_lib.data import cifar, parts
from immunity_lib.data import folder as image_folder
from immunity_lib.data.image_set import Dataset, ImageSet

__all__ = ["DATASETS", "Dataset", "ImageSet", "load_dataset"]

DATASETS = ("parts10", "cifar10", "cifar100", "images")


def load_dataset(
    name: str,
    folder: str | os.PathLike | None = None,
    train_images: int | None = None,
    validation_images: int = 500,
    test_images: int | None = None,
    seed: int = 0,
) -> Dataset:
    """A data set by its name, one of `DATASETS`.

    folder: where CIFAR is, or is downloaded to (by default `data` in the working directory); for
    "images", what holds them, in one of the layouts that `immunity_lib.data.folder` describes.
    train_images, test_images: how many, from the first on; None takes all there are. The
    validation images are the rows right after the training images, so they are never trained on.
    seed: draws Parts-10; the others are the same for every seed.
    Raises ValueError for an unknown name, for more images than there are, for damaged files and
    for a folder of images in no valid layout; ConnectionError where CIFAR is missing and cannot be
    downloaded.
    """
    if name not in DATASETS:
        raise ValueError(f"unknown data set '{name}'; choose one of {', '.join(DATASETS)}")
    if name == "parts10":
        source = parts.source(seed)
    elif name == "images":
        if not folder:
            raise ValueError(f"images of which folder? Name it; {image_folder.LAYOUTS}")
        source = image_folder.source(folder)
    else:
        source = cifar.source(name, folder)

    available = source.available["train"]
    if not 0 <= validation_images < available:
        raise ValueError(
            f"{validation_images} validation images of {name} asked for; "
            f"choose from 0 to {available - 1}, to be held out of {available}"
        )
    if train_images is None:
        train_images = available - validation_images
    _check_count(name, "train", train_images, available - validation_images)
    rows = source.read("train", train_images + validation_images)
    splits = {"train": rows.first(train_images), "validation": rows.rows(train_images, len(rows))}
    for split, available in source.available.items():
        if split != "train":
            count = available if test_images is None else test_images
            _check_count(name, split, count, available)
            splits[split] = source.read(split, count)

    if name in cifar.CIFAR:
        mean, std = cifar.CIFAR[name].mean, cifar.CIFAR[name].std
    else:
        mean, std = _channel_statistics(splits["train"].images)
    part_names = parts.PART_NAMES if name == "parts10" else ()
    return Dataset(name, source.class_names, mean, std, part_names, source.description, splits)


def _check_count(name: str, split: str, asked: int, available: int) -> None:
    if not 0 < asked <= available:
        raise ValueError(
            f"{asked} {split} images of {name} asked for; choose from 1 to {available}, "
            f"which is all there are (validation images set apart)"
        )


def _channel_statistics(images: torch.Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of images (B, 3, 32, 32), scaled to [0, 1].

    A channel that is the same everywhere, as red in images of green light, gets a deviation of 1.
    """
    # Sums of integers, so that the result does not depend on a machine's order of summation.
    pixels = images[:, 0].numel()
    total = images.sum(dim=(0, 2, 3), dtype=torch.int64)
    squares = images.to(torch.int32).square().sum(dim=(0, 2, 3), dtype=torch.int64)
    mean = total.double() / pixels
    std = (squares.double() / pixels - mean.square()).sqrt()
    std[std == 0] = 255
    return tuple((mean / 255).tolist()), tuple((std / 255).tolist())
