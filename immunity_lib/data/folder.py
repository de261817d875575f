"""Your own images as a data set: a folder of image files for each class.

Two layouts are valid. `<folder>/train/<class>/*` and `<folder>/test/<class>/*` say which images are
for testing. Of `<folder>/<class>/*` alone, a fifth of every class is: the files whose name has a
hash in the lowest fifth of its range. That is a fifth on average, not to the image; in return,
adding or removing files moves no other file from one split to the other.

Class folders may hold further folders. Names that begin with a dot are passed over, and so are
files that do not end as an image's do (.jpg, .png, ...; torchvision's IMG_EXTENSIONS).
"""

import hashlib
import os
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from immunity_lib.data.image_set import ImageSet, Source

TEST_SHARE = 1 / 5
SIDE = 32
SHOWN = 5  # of the files or classes that are wrong, in an error
LAYOUTS = (
    "valid are <folder>/train/<class>/*.png with <folder>/test/<class>/*.png, or "
    "<folder>/<class>/*.png alone, each with two classes or more"
)


def source(folder: str | os.PathLike) -> Source:
    """The images of a folder, in RGB, at 32x32 pixels: shorter side resized, then centre crop.

    The rows of a split follow the hash of their file names, which mixes the classes: the first k
    are a fair sample. Raises ValueError for a folder that has neither layout, for a class without
    images, and, when they are read, for broken image files.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise ValueError(f"there is no folder '{folder}'; {LAYOUTS}")
    splits = [split for split in ("train", "test") if (folder / split).is_dir()]
    if len(splits) == 1:
        raise ValueError(f"'{folder}' has a folder {splits[0]} without its counterpart; {LAYOUTS}")
    if splits:
        description = "image folder with train/ and test/"
        class_names = _class_names(folder / "train")
        unlike = set(class_names) ^ set(_class_names(folder / "test"))
        if unlike:
            raise ValueError(
                f"'{folder}' has classes in one of train and test only: {_listed(sorted(unlike))}; "
                "give both the same class folders"
            )
        files = {split: _image_files(folder / split, class_names) for split in splits}
    else:
        description = "image folder split by file names"
        class_names = _class_names(folder)
        every = _image_files(folder, class_names)
        files = {
            "train": [file for file in every if _rank(file) >= TEST_SHARE],
            "test": [file for file in every if _rank(file) < TEST_SHARE],
        }
    for split, found in files.items():
        present = {label for _, label in found}
        without = [name for label, name in enumerate(class_names) if label not in present]
        if without:
            raise ValueError(
                f"'{folder}' has no {split} images of {_listed(without)}; "
                "add some (.jpg, .png, ...) or remove the class; where images are few, choose the "
                "test images by laying out train/ and test/"
            )

    def read(split: str, count: int) -> ImageSet:
        chosen = files[split][:count]
        images = _decoded([path for path, _ in chosen], split)
        labels = torch.tensor([label for _, label in chosen], dtype=torch.int64)
        return ImageSet(torch.from_numpy(images), labels)

    available = {split: len(found) for split, found in files.items()}
    return Source(description, class_names, available, read)


def _class_names(folder: Path) -> tuple[str, ...]:
    names = sorted(
        path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")
    )
    if len(names) < 2:
        found = f"only the class folder {names[0]}" if names else "no class folders"
        raise ValueError(f"'{folder}' has {found}; {LAYOUTS}")
    return tuple(names)


def _image_files(folder: Path, class_names: tuple[str, ...]) -> list[tuple[str, int]]:
    """Paths and labels, in the order of the hashes; equal names stay in the order of classes."""
    from torchvision.datasets.folder import is_image_file, make_dataset  # costs seconds to import

    def is_valid(path: str) -> bool:
        parts = Path(path).relative_to(folder).parts
        return is_image_file(path) and not any(part.startswith(".") for part in parts)

    labels = {name: label for label, name in enumerate(class_names)}
    files = make_dataset(folder, labels, is_valid_file=is_valid, allow_empty=True)
    return sorted(files, key=_rank)


def _rank(file: tuple[str, int]) -> float:
    """In 0 .. 1, evenly spread, from the file's name alone."""
    digest = hashlib.sha256(os.fsencode(Path(file[0]).name)).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def _decoded(paths: list[str], split: str) -> np.ndarray:
    """Pixels (B, 3, 32, 32) uint8 of image files; ValueError that names those that are broken."""
    from tqdm import tqdm
    from tqdm.contrib.concurrent import thread_map

    images = np.empty((len(paths), 3, SIDE, SIDE), np.uint8)

    def decode(row: int) -> str:
        try:
            images[row] = pixels(paths[row])
        except Exception as error:  # for a broken file, Pillow raises errors of all kinds
            return f"{paths[row]} ({error})"
        return ""

    done = thread_map(
        decode, range(len(paths)), desc=f"{split} images", leave=False, tqdm_class=tqdm
    )
    broken = [message for message in done if message]
    if broken:
        raise ValueError(
            f"{len(broken)} image files cannot be used: {_listed(broken)}; "
            "replace them by intact copies, or move them out of the folder to do without"
        )
    return images


def pixels(file: str | BinaryIO) -> np.ndarray:
    """Pixels (3, 32, 32) uint8 of an image file: upright, in RGB, shorter side resized, then centre
    crop. Raises ValueError for more than 8 bits a channel, and whatever Pillow does if it is
    broken."""
    from PIL import Image, ImageOps
    from torchvision.transforms import functional

    with Image.open(file) as picture:
        if picture.mode.startswith(("I", "F")):  # Pillow would clip them to white
            raise ValueError(f"pixels of mode {picture.mode}; save it with 8 bits a channel")
        picture.draft(None, (8 * SIDE, 8 * SIDE))  # large JPEGs: decoded at a fraction of the size
        upright = ImageOps.exif_transpose(picture).convert("RGB")
    small = functional.center_crop(functional.resize(upright, [SIDE], antialias=True), [SIDE])
    return np.asarray(small).transpose(2, 0, 1)


def _listed(wrong: list[str]) -> str:
    more = f", and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
    return ", ".join(wrong[:SHOWN]) + more
