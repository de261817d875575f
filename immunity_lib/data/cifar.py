"""CIFAR-10 and CIFAR-100: from torchvision's archives, from parquet files, or by download."""

import io
import os
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from immunity_lib.data.image_set import ImageSet, Source

DEFAULT_FOLDER = "data"
# What pyarrow and Pillow raise for files that are truncated, damaged or hold something else.
UNREADABLE = (OSError, ValueError, KeyError, TypeError, RuntimeError, SyntaxError)


@dataclass(frozen=True)
class Cifar:
    """What is to be known about one of the two data sets before its images are there.

    mean, std: of each channel over the training images in [0, 1].
    """

    title: str
    class_names: tuple[str, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    label_column: str
    extracted: str
    archive: str


CIFAR = {
    "cifar10": Cifar(
        title="CIFAR-10",
        class_names=tuple("airplane automobile bird cat deer dog frog horse ship truck".split()),
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        label_column="label",
        extracted="cifar-10-batches-py",
        archive="cifar-10-python.tar.gz",
    ),
    "cifar100": Cifar(
        title="CIFAR-100",
        class_names=tuple(
            """
            apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus
            butterfly camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach
            couch crab crocodile cup dinosaur dolphin elephant flatfish forest fox girl hamster
            house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree
            motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear
            pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road
            rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
            sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip
            turtle wardrobe whale willow_tree wolf woman worm
            """.split()
        ),
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
        label_column="fine_label",
        extracted="cifar-100-python",
        archive="cifar-100-python.tar.gz",
    ),
}


def source(name: str, folder: str | os.PathLike | None) -> Source:
    """The first that there is: torchvision's archive, parquet files in `folder/<name>`, a download.

    Raises ValueError for a file that is damaged or holds something else, and ConnectionError
    where there are no images and the download fails.
    """
    folder = Path(DEFAULT_FOLDER if folder is None else folder)
    if (folder / CIFAR[name].extracted).is_dir() or (folder / CIFAR[name].archive).is_file():
        return _torchvision_source(name, folder, "torchvision archive")
    if any((folder / name).glob("*.parquet")):
        return _parquet_source(name, folder / name)
    return _torchvision_source(name, folder, "torchvision download")


def _torchvision_source(name: str, folder: Path, description: str) -> Source:
    from torchvision.datasets import CIFAR10, CIFAR100  # costs seconds to import

    loader = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
    cifar = CIFAR[name]
    if (folder / cifar.archive).is_file() or not (folder / cifar.extracted).is_dir():
        _download_or_extract(loader, cifar, name, folder)
    try:
        splits = {"train": loader(folder, train=True), "test": loader(folder, train=False)}
    except RuntimeError as error:
        raise ValueError(
            f"{folder / cifar.extracted} is incomplete or damaged; "
            f"replace it by an intact copy, or move it away to have {cifar.title} downloaded"
        ) from error

    def read(split: str, count: int) -> ImageSet:
        images = np.ascontiguousarray(splits[split].data[:count].transpose(0, 3, 1, 2))
        labels = torch.tensor(splits[split].targets[:count], dtype=torch.int64)
        return ImageSet(torch.from_numpy(images), labels)

    available = {split: len(data) for split, data in splits.items()}
    return Source(description, cifar.class_names, available, read)


def _download_or_extract(loader: type, cifar: Cifar, name: str, folder: Path) -> None:
    """Let torchvision extract its archive, downloading it first where it is missing or damaged."""
    from filelock import FileLock

    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Jobs that start side by side must not write the same files.
        writable = os.access(folder, os.W_OK)
        with FileLock(folder / f".{name}.lock") if writable else nullcontext():
            loader(folder, download=True)
    except (OSError, RuntimeError) as error:
        raise ConnectionError(
            f"{cifar.title} is not in '{folder}', and its download failed ({error}). "
            f"There are three ways to have it: (1) put {cifar.archive}, or the folder "
            f"{cifar.extracted} that it holds, into '{folder}'; (2) put parquet files named "
            f"train-*.parquet and test-*.parquet into '{folder / name}'; (3) run this once with "
            f"a network connection and a folder that can be written to"
        ) from error


def _parquet_source(name: str, folder: Path) -> Source:
    files = {split: sorted(folder.glob(f"{split}-*.parquet")) for split in ("train", "test")}
    for split, found in files.items():
        if not found:
            raise ValueError(f"no {split}-*.parquet in '{folder}'; put the {split} files there")
    rows = {
        split: [(file, _usable_rows(file, CIFAR[name])) for file in found]
        for split, found in files.items()
    }

    def read(split: str, count: int) -> ImageSet:
        images = np.empty((count, 3, 32, 32), np.uint8)
        labels = np.empty(count, np.int64)
        decoded = _decoded_rows(rows[split], CIFAR[name].label_column)
        for row, (image, label) in zip(range(count), decoded, strict=False):
            images[row], labels[row] = image, label
        return ImageSet(torch.from_numpy(images), torch.from_numpy(labels))

    available = {
        split: int(sum(usable.sum() for _, usable in files)) for split, files in rows.items()
    }
    return Source("parquet files", CIFAR[name].class_names, available, read)


def _usable_rows(file: Path, cifar: Cifar) -> np.ndarray:
    """Which rows of a parquet file are lossless, as booleans; its labels are checked."""
    from pyarrow.parquet import ParquetFile

    try:
        table = ParquetFile(file).read(columns=["img.path", cifar.label_column])
        paths = table["img"].combine_chunks().field("path").to_pylist()
        labels = table[cifar.label_column].to_pylist()
        wrong = [label for label in labels if label not in range(len(cifar.class_names))]
        if wrong:
            raise ValueError(f"label {wrong[0]!r} is not in 0 .. {len(cifar.class_names) - 1}")
    except UNREADABLE as error:
        raise _unusable(file, error) from error
    return np.array([not (path or "").startswith("lossy/") for path in paths], dtype=bool)


def _decoded_rows(
    files: list[tuple[Path, np.ndarray]], label_column: str
) -> Iterator[tuple[np.ndarray, int]]:
    """Images (3, 32, 32) uint8 and labels of the usable rows, decoded when they are asked for."""
    from pyarrow.parquet import ParquetFile

    for file, usable in files:
        try:
            batches = ParquetFile(file).iter_batches(500, columns=["img.bytes", label_column])
            rows = (row for batch in batches for row in batch.to_pylist())
            for row, keep in zip(rows, usable, strict=True):
                if keep:
                    yield _decode(row["img"]["bytes"]), row[label_column]
        except UNREADABLE as error:
            raise _unusable(file, error) from error


def _decode(png: bytes) -> np.ndarray:
    from PIL import Image

    with Image.open(io.BytesIO(png)) as picture:
        if picture.size != (32, 32):
            raise ValueError(f"an image has {picture.width}x{picture.height} pixels, not 32x32")
        return np.asarray(picture.convert("RGB")).transpose(2, 0, 1)


def _unusable(file: Path, reason: object) -> ValueError:
    return ValueError(
        f"{file} cannot be used ({reason}); replace it by an intact copy, "
        f"or move it out of the folder to do without its rows"
    )
