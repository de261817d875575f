"""Data sets as tensors in memory: Parts-10 (generated), CIFAR-10, CIFAR-100, your own images."""

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from immunity_lib.data import images, parts10
from immunity_lib.data.batches import ImageSet, Source
from immunity_lib.recipe import DATASETS

__all__ = ["DATASETS", "Dataset", "ImageSet", "Source", "find_source", "load_dataset"]


@dataclass(frozen=True, eq=False)
class Dataset:
    """All splits of a data set, with what a model needs to know of it."""

    name: str
    class_names: tuple[str, ...]
    mean: tuple[float, ...]  # per channel, of images in [0, 1]
    std: tuple[float, ...]
    part_names: tuple[str, ...]  # empty but for Parts-10
    source: str  # how the images were obtained: "generated", "torchvision archive", ...
    splits: dict[str, ImageSet]  # "train", "validation", "test"; Parts-10 also "test-shifted"


def load_dataset(
    name: str, folder: str | os.PathLike | None = None, train_images: int | None = None,
    validation_images: int = 500, test_images: int | None = None,
) -> Dataset:  # fmt: skip
    """A data set by its name, one of `DATASETS`.

    folder: where CIFAR is, or is downloaded to (by default `data` in the working directory); for "images", what holds
    them, in a layout that `images.folder_source` describes. `~` is home. train_images, test_images: how many,
    from the first on; None takes all there are. The validation images are the rows right after the training images,
    so they are never trained on. Raises ValueError for an unknown name, for more images than there are, for damaged
    files and a folder in no valid layout; ConnectionError where CIFAR is missing and cannot be downloaded."""
    source = find_source(name, folder)
    most = {"validation": source.available["train"] - 1} | source.available
    most["train"] -= validation_images
    asked = dict.fromkeys(most, test_images) | {"train": train_images, "validation": validation_images}
    counts = {split: most[split] if count is None else count for split, count in asked.items()}
    for split, count in counts.items():
        least = 0 if split == "validation" else 1
        if not least <= count <= most[split]:
            valid = f"{least} to {most[split]} (no image is both for training and validation)"
            raise ValueError(f"{count} {split} images of {name} asked for; choose from {valid}")
    rows = source.read("train", counts["train"] + counts["validation"])
    splits = {"train": rows.first(counts["train"]), "validation": rows.select(slice(counts["train"], None))}
    splits |= {split: source.read(split, count) for split, count in counts.items() if split not in splits}
    mean, std = images.STATISTICS.get(name) or _channel_statistics(splits["train"].images)
    part_names = parts10.PART_NAMES if name == "parts10" else ()
    return Dataset(name, source.class_names, mean, std, part_names, source.description, splits)


def find_source(name: str, folder: str | os.PathLike | None = None) -> Source:
    """Where the images of a data set are, with the arguments and errors of `load_dataset`."""
    if name not in DATASETS:
        raise ValueError(f"unknown data set '{name}'; choose one of {', '.join(DATASETS)}")
    if name == "parts10":
        return Source("generated", parts10.CLASS_NAMES, parts10.AVAILABLE, partial(parts10.generate, seed=0))
    if name == "images" and not folder:
        raise ValueError(f"images of which folder? Name it; {images.LAYOUTS}")
    folder = Path(os.path.abspath(os.path.expanduser(folder or "data")))
    return images.folder_source(folder) if name == "images" else images.cifar_source(name, folder)


def _channel_statistics(images: torch.Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of each channel of images (B, 3, 32, 32), scaled to [0, 1]; a channel that is the same
    everywhere, as red in images of green light, gets a deviation of 1."""
    # Sums of integers, so that the result does not depend on a machine's order of summation.
    pixels = images[:, 0].numel()
    mean = images.sum((0, 2, 3)).double() / pixels
    squares = images.int().square().sum((0, 2, 3)).double() / pixels
    std = (squares - mean.square()).sqrt()
    std[std == 0] = 255
    return tuple((mean / 255).tolist()), tuple((std / 255).tolist())
