"""Images that a reader brings: made to fit, with a note on what was changed, or refused."""

from __future__ import annotations

from io import BytesIO

import torch
from torch import Tensor

from immunity_lib.data.folder import SIDE, pixels

LARGEST = 20_000_000  # bytes


def own_image(content: bytes, name: str) -> tuple[Tensor, list[str]]:
    """An image file's content as (3, 32, 32) in [0, 1], and what was changed to get there.

    Raises ValueError that says why a file is refused, and what would do.
    """
    from PIL import Image

    if len(content) > LARGEST:
        raise ValueError(f"{name} has {len(content):,} bytes; at most {LARGEST:,} are read")
    try:
        with Image.open(BytesIO(content)) as picture:
            notes = _changes(picture)
        image = torch.from_numpy(pixels(BytesIO(content)).copy()) / 255
    except ValueError as error:
        raise ValueError(f"{name} is refused: {error}") from error
    except Exception as error:  # for a broken file, Pillow raises errors of all kinds
        raise ValueError(
            f"{name} cannot be read as an image; give an intact PNG, JPEG or WebP file"
        ) from error
    return image, notes


def _changes(picture) -> list[str]:
    notes = []
    if getattr(picture, "n_frames", 1) > 1:
        notes.append(f"the first of its {picture.n_frames} frames is taken")
    if "A" in picture.getbands() or "transparency" in picture.info:
        notes.append("its transparency is dropped")
    if picture.mode not in ("RGB", "RGBA"):
        notes.append(f"its mode {picture.mode} becomes RGB")
    width, height = picture.size
    if width != height:
        notes.append("the middle square of it is taken")
    if (width, height) != (SIDE, SIDE):
        notes.append(f"{width}x{height} pixels become {SIDE}x{SIDE}")
    return notes
