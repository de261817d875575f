"""CIFAR-10 and CIFAR-100: from torchvision's archives, from parquet files, or by download."""

import os
from contextlib import nullcontext
from functools import partial
from io import BytesIO
from itertools import compress
from pathlib import Path

import torch

from immunity_lib.data.batches import ImageSet, Source
from immunity_lib.data.images import read_images

CLASS_NAMES = {
    "cifar10": tuple("airplane automobile bird cat deer dog frog horse ship truck".split()),
    "cifar100": tuple("""apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle
        bowl boy bridge bus butterfly camel can castle caterpillar cattle chair chimpanzee clock
        cloud cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish forest fox girl
        hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree
        motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck
        pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal
        shark shrew skunk skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper
        table tank telephone television tiger tractor train trout tulip turtle wardrobe whale
        willow_tree wolf woman worm""".split()),
}  # fmt: skip
# Mean and deviation of each channel over the training images in [0, 1].
STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
SPLITS = ("train", "test")


def source(name: str, folder: Path) -> Source:
    """The first that there is: torchvision's archive, packed or extracted, in `folder`; parquet files in
    `folder/<name>`; a download into `folder`.

    Raises ValueError for a file that is damaged or holds something else, and ConnectionError where there are no
    images and the download fails.
    """
    from filelock import FileLock
    from torchvision import datasets  # costs seconds to import

    archive = getattr(datasets, name.upper())
    packed, extracted = folder / archive.filename, folder / archive.base_folder
    found = packed.is_file() or extracted.is_dir()
    if not found and any((folder / name).glob("*.parquet")):
        return _parquet_source(name, folder / name)
    # An extracted folder alone is only read; beside an archive, it is repaired from that.
    download = packed.is_file() or not extracted.is_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Jobs that start side by side must not write the same files.
        lock = FileLock(folder / f".{name}.lock", timeout=1800)
        with lock if download and os.access(folder, os.W_OK) else nullcontext():
            data = {split: archive(folder, split == "train", download=download) for split in SPLITS}
    except (OSError, RuntimeError) as error:
        if found and not datasets.utils.check_integrity(packed, archive.tgz_md5):
            damaged = packed if packed.is_file() else extracted
            remedy = "replace it by an intact copy, or move it away to have it downloaded"
            raise ValueError(f"{damaged} is incomplete or damaged ({error}); {remedy}") from error
        raise ConnectionError(
            f"{name} is not in '{folder}', and could not be downloaded or extracted ({error}). "
            f"Either (1) put {packed.name}, or the folder {extracted.name} that it holds, into "
            f"'{folder}'; (2) put train-*.parquet and test-*.parquet into '{folder / name}'; or "
            "(3) run this once with a network connection and a folder that can be written to"
        ) from error

    def read(split: str, count: int) -> ImageSet:
        images = torch.from_numpy(data[split].data[:count]).movedim(3, 1).contiguous()
        return ImageSet(images, torch.tensor(data[split].targets[:count]))

    available = {split: len(data[split]) for split in SPLITS}
    description = "torchvision archive" if found else "torchvision download"
    return Source(description, CLASS_NAMES[name], available, read)


def _parquet_source(name: str, folder: Path) -> Source:
    """Files train-*.parquet and test-*.parquet, as Hugging Face publishes CIFAR.

    Image files of 32x32 pixels are in a column img or image, as {bytes, path} or as bytes alone; labels in a column
    fine_label or else label. Rows whose path begins with "lossy/" went through JPEG: they are left out, since
    robustness is measured on exact pixels, and counted.
    """
    rows, lossy = {split: [] for split in SPLITS}, 0
    for split in SPLITS:
        files = sorted(folder.glob(f"{split}-*.parquet"))
        if not files:
            raise ValueError(f"no {split}-*.parquet in '{folder}'; put the {split} files there")
        for file in files:
            found, paths = _read_parquet(file, len(CLASS_NAMES[name]))
            exact = [not str(path).startswith("lossy/") for path in paths]
            rows[split] += compress(found, exact)
            lossy += exact.count(False)
    description = "parquet files" + (f" ({lossy} lossy rows left out)" if lossy else "")
    available = {split: len(rows[split]) for split in SPLITS}
    return Source(description, CLASS_NAMES[name], available, partial(read_images, rows, True))


def _read_parquet(file: Path, classes: int) -> tuple[list[tuple[str, BytesIO, int]], list]:
    """The rows of a file as `read_images` takes them, and the path that each gives, or None."""
    from pyarrow.parquet import ParquetFile

    try:
        table = ParquetFile(file).read(["img", "image", "fine_label", "label"]).flatten()
        columns = {k.replace("image", "img"): cells for k, cells in table.to_pydict().items()}
        images = columns.get("img.bytes", columns.get("img"))
        labels = columns.get("fine_label", columns.get("label"))
        if images is None or labels is None:
            raise ValueError("it needs a column img or image, of image files, and a column label")
        if wrong := [label for label in labels if label not in range(classes)]:
            raise ValueError(f"label {wrong[0]!r} is not in 0 .. {classes - 1}")
        places = (f"{file} row {row}" for row in range(len(labels)))
        rows = list(zip(places, map(BytesIO, images), labels, strict=True))
        return rows, columns.get("img.path", [None] * len(rows))
    except Exception as error:  # for a damaged file, pyarrow raises errors of all kinds
        raise ValueError(f"{file} cannot be used ({error}); replace it or move it away") from error
