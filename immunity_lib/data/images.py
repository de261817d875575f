"""Images from files: CIFAR-10 and CIFAR-100, and your own."""

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from functools import partial
from io import BytesIO
from itertools import compress
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from immunity_lib.data.batches import ImageSet, Source

CLASS_NAMES = {
    "cifar10": tuple("airplane automobile bird cat deer dog frog horse ship truck".split()),
    "cifar100": tuple("""apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus
        butterfly camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup
        dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard
        lion lizard lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree
        pear pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal
        shark shrew skunk skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone
        television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm""".split()),
}  # fmt: skip
# Mean and deviation of each channel over the training images in [0, 1].
STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
SPLITS = ("train", "test")
SPLIT_LIKE = {*SPLITS, "training", "testing", "val", "valid", "validation", "dev"}  # no class is called so

# By split: what an error calls an image, its file, its label
Rows = dict[str, list[tuple[str, str | BinaryIO, int]]]
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MOST_PIXELS = 50_000_000  # of one image, at four bytes each
TEST_SHARE = 1 / 5
LAYOUTS = (
    "valid are <folder>/train/<class>/*.png with <folder>/test/<class>/*.png, or, where there are "
    "many images, <folder>/<class>/*.png alone (or .jpg, ...), each with two classes or more"
)


def cifar_source(name: str, folder: Path) -> Source:
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
    rows, lossy, told = {split: [] for split in SPLITS}, 0, []
    for split in SPLITS:
        files = sorted(folder.glob(f"{split}-*.parquet"))
        # Their names say how many there are: a download may have been cut short, or be there twice
        count = max((int(of[1]) for file in files if (of := re.search(r"-of-(\d+)", file.name))), default=len(files))
        if len(files) > count:
            found = f"'{folder}' has {len(files)} {split} files, by their names of {count}"
            raise ValueError(f"{found}; keep one set")
        told += [f"{len(files)} of {count} {split} files"] * (len(files) < count)
        for file in files:
            found, paths = _read_parquet(file, len(CLASS_NAMES[name]))
            exact = [not str(path).startswith("lossy/") for path in paths]
            rows[split] += compress(found, exact)
            lossy += exact.count(False)
        if not rows[split]:
            raise ValueError(f"no {split}-*.parquet in '{folder}', or no images in them; put the {split} files there")
    told += [f"{lossy} lossy rows left out"] * bool(lossy)
    description = "parquet files" + (f" ({', '.join(told)})" if told else "")
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
        if wrong := [label for label in labels if type(label) is not int or label not in range(classes)]:
            raise ValueError(f"label {wrong[0]!r:.40} is not in 0 .. {classes - 1}")
        places = (f"{file} row {row}" for row in range(len(labels)))
        rows = list(zip(places, map(BytesIO, images), labels, strict=True))
        return rows, columns.get("img.path", [None] * len(rows))
    except Exception as error:  # for a damaged file, pyarrow raises errors of all kinds
        raise ValueError(f"{file} cannot be used ({error}); replace it or move it away") from error


def folder_source(folder: Path) -> Source:
    """Your own images: a folder of image files for each class, each image as `pixels` gives it.

    Two layouts are valid. `<folder>/train/<class>/*` and `<folder>/test/<class>/*` say which images are for testing. Of
    `<folder>/<class>/*` alone, it is those whose name has a hash in the lowest fifth of its range: a fifth on average,
    and adding or removing files moves no other file between the splits.

    Class folders may hold further folders. Names that begin with a dot are passed over, and so are files that do not
    end as an image's do (.jpg, .png, ...; torchvision's IMG_EXTENSIONS).

    The rows of a split follow the hash of their file names, which mixes the classes: the first k are a fair sample.
    ValueError for a folder in neither layout and, once read, for broken files."""
    from torchvision.datasets.folder import is_image_file  # costs seconds to import

    rows: Rows = {"train": [], "test": []}
    chosen = [folder / split for split in rows if os.path.isdir(folder / split)]
    roots = chosen or [folder] * os.path.isdir(folder)
    folders = {path.name for root in roots for path in root.iterdir() if path.is_dir()}
    classes = sorted(name for name in folders if not name.startswith("."))
    if len(classes) < 2:
        found = f"has {len(classes)} class folders" if roots else "is no folder"
        raise ValueError(f"'{_text(folder)}' {found}; {LAYOUTS}")
    if not chosen and (odd := [name for name in classes if name.lower() in SPLIT_LIKE]):
        raise ValueError(f"'{_text(folder)}' has {_list(odd)} where classes should be; {LAYOUTS}")
    for root in roots:
        files = [(place, name, label) for label, of in enumerate(classes) for place, name in _files(root / of)]
        for place, name, label in sorted(files, key=lambda file: (_rank(file[1]), file[2], file[0])):
            if is_image_file(name):
                split = root.name if chosen else "test" if _rank(name) < TEST_SHARE else "train"
                rows[split].append((path := os.path.join(place, name), path, label))
    found = {f"{split}/{classes[label]}" for split in rows for *_, label in rows[split]}
    needed = [f"{split}/{name}" for split in rows for name in classes]
    if without := [name for name in needed if name not in found]:
        raise ValueError(f"'{_text(folder)}' has no images for {_list(without)}; {LAYOUTS}")
    description = "image folder " + ("with train/ and test/" if chosen else "split by file names")
    beside = sorted(path.name for path in folder.iterdir() if chosen and path.is_dir() and path.name not in rows)
    if left_out := [name for name in beside if not name.startswith(".")]:
        description += f" ({_list(left_out)} left out)"
    available = {split: len(rows[split]) for split in rows}
    class_names = tuple(map(_text, classes))
    return Source(description, class_names, available, partial(read_images, rows, False))


def _files(folder: Path) -> Iterator[tuple[str, str]]:
    """Folder and name of every file below, hidden ones aside; a folder once, though links lead back to it."""
    seen = set()

    def refuse(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):  # a class that the split lacks, which is told with all of them
            told = f"{_text(error.filename)} cannot be read ({error.strerror})"
            raise ValueError(f"{told}; mend that, or move it") from error

    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        new = {os.path.realpath(place)} - seen
        seen |= new
        folders[:] = [name for name in sorted(folders) if new and not name.startswith(".")]
        yield from ((place, name) for name in names if new and not name.startswith("."))


def _rank(name: str) -> float:
    """In 0 .. 1, evenly spread, from the file's name alone."""
    digest = hashlib.sha256(os.fsencode(name)).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def read_images(rows: Rows, exact: bool, split: str, count: int) -> ImageSet:
    """The first images of a split, by `pixels`; ValueError names those that cannot be used."""
    from tqdm import tqdm
    from tqdm.contrib.concurrent import thread_map

    names, files, labels = zip(*rows[split][:count], strict=True)
    images = np.empty((len(files), 3, 32, 32), np.uint8)

    def fault(row: int) -> str | None:
        try:
            images[row] = pixels(files[row], exact)
        except Exception as error:  # for a broken file, Pillow raises errors of all kinds
            return f"{names[row]} ({error})"

    # 32x32 pixels are decoded faster than handed to a thread; of large images, memory holds few.
    in_threads = partial(thread_map, max_workers=8, leave=False, tqdm_class=tqdm)
    faults = [*filter(None, (map if exact else in_threads)(fault, range(len(files))))]
    if faults:
        remedy = "replace these files by intact copies, or move them out of the folder"
        raise ValueError(f"{len(faults)} images cannot be used: {_list(faults)}; {remedy}")
    return ImageSet(torch.from_numpy(images), torch.tensor(labels))


def pixels(file: str | BinaryIO, exact: bool = False) -> np.ndarray:
    """Pixels (3, 32, 32) uint8 of an image: upright, RGB, shorter side resized, centre cropped.

    Raises ValueError for content in none of FORMATS, whatever the file's name (for some others Pillow starts further
    programs), for more than MOST_PIXELS or 8 bits a channel, and with `exact` for any size but 32x32; for a broken
    file, whatever Pillow does.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError
    from torchvision.transforms import functional

    if isinstance(file, str) and not os.path.isfile(file):  # a pipe would be waited for
        raise ValueError("no file, or a link to none")
    try:
        picture = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError as error:
        raise ValueError(f"no intact image of the formats {', '.join(FORMATS)}") from error
    with picture:
        size = f"{picture.width}x{picture.height} pixels"
        shorter, longer = sorted(picture.size)
        # The second: what a thin strip grows to when its shorter side does.
        if max(shorter * longer, 32 * 32 * longer / shorter) > MOST_PIXELS:
            raise ValueError(f"{size}, over {MOST_PIXELS:,} or too long a strip; make it smaller")
        if exact and picture.size != (32, 32):
            raise ValueError(f"{size}, not 32x32")
        if picture.mode.startswith(("I", "F")):  # Pillow would clip them to white
            raise ValueError(f"pixels of mode {picture.mode}; save it with 8 bits a channel")
        picture.draft(None, (256, 256))  # large JPEGs: decoded at a fraction of their size
        ImageOps.exif_transpose(picture, in_place=True)
        upright = picture if picture.mode == "RGB" else picture.convert("RGB")
        small = functional.resize(upright, [32])
        return np.asarray(functional.center_crop(small, [32])).transpose(2, 0, 1)


def _list(names: Iterable[str]) -> str:
    names = [_text(name) for name in names]
    return ", ".join(names[:5]) + (f", and {len(names) - 5} more" if len(names) > 5 else "")


def _text(path: str | os.PathLike) -> str:
    """A path that can be printed and saved; bytes that are not UTF-8, and what would move a terminal's cursor or turn
    its line around, become \\xe9 and the like."""
    text = os.fsencode(path).decode(errors="backslashreplace")
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)
