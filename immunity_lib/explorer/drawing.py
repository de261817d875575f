"""Small pictures as data addresses, drawn in milliseconds: images, heat, outlines of parts."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from io import BytesIO

import matplotlib
import numpy as np
import torch
from torch import Tensor

COLOUR_MAP = "magma"  # rises evenly in lightness: readable without colours, and in print
EVEN = 32 * 32  # a map times this is in units of an even spread
# Okabe and Ito's colours, told apart by colour-blind readers too
PART_COLOURS = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#cc79a7")
SCALE = 4  # screen pixels of an image's pixel


def scale_top(maps: Sequence[Tensor]) -> float:
    """Where one scale for all these maps, each summing to 1, ends: 0.1 % of their pixels lie above.
    In units of an even spread."""
    pixels = torch.cat([one.flatten() for one in maps]) * EVEN
    return max(pixels.kthvalue(int(0.999 * len(pixels))).values.item(), 1.0)


def brightness(heat: Tensor, top: float) -> np.ndarray:
    """0 .. 1 of maps that each sum to 1: the square root of their heat over that of `top`, which is
    in units of an even spread. So wide maps can be seen beside those of a few bright pixels."""
    return np.sqrt(np.clip(heat.numpy() * (EVEN / top), 0, 1))


def heat_colours(heat: Tensor, top: float) -> np.ndarray:
    """RGB (32, 32, 3) uint8 of a map."""
    return matplotlib.colormaps[COLOUR_MAP](brightness(heat, top), bytes=True)[..., :3]


def colours(image: Tensor) -> np.ndarray:
    """RGB (32, 32, 3) uint8 of an image (3, 32, 32) in [0, 1]."""
    return (image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)


def overlaid(image: Tensor, heat: Tensor, top: float) -> np.ndarray:
    """RGB (32, 32, 3) uint8: the image in grey, and the heat over it as far as there is any."""
    grey = colours(image).mean(-1, keepdims=True)
    opacity = brightness(heat, top)[..., None]
    return (0.8 * grey * (1 - opacity) + heat_colours(heat, top) * opacity).astype(np.uint8)


def outlined(rgb: np.ndarray, masks: Tensor) -> np.ndarray:
    """RGB enlarged SCALE times, with the outline of each part (P, 32, 32) in its colour."""
    large = enlarged(rgb)
    for mask, colour in zip(masks.numpy(), PART_COLOURS, strict=False):
        inside = np.pad(enlarged(mask), 1)
        neighbours = inside[:-2, 1:-1] & inside[2:, 1:-1] & inside[1:-1, :-2] & inside[1:-1, 2:]
        large[inside[1:-1, 1:-1] & ~neighbours] = tuple(bytes.fromhex(colour[1:]))
    return large


def enlarged(pixels: np.ndarray) -> np.ndarray:
    """Each pixel of the first two axes as a square of SCALE x SCALE."""
    return pixels.repeat(SCALE, 0).repeat(SCALE, 1)


def data_address(rgb: np.ndarray) -> str:
    """A PNG as a `data:` address, for the source of an HTML image."""
    from PIL import Image

    content = BytesIO()
    Image.fromarray(rgb).save(content, "PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"
