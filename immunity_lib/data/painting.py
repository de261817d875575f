"""Soft-edged shapes on batches of images, drawn in arithmetic that is the same on every machine."""

import numpy as np


def paint(image: np.ndarray, opacity: np.ndarray, colour: np.ndarray | float) -> None:
    """Lay a colour over images (B, 3, 32, 32), in place; opacity (B, 32, 32) in [0, 1]."""
    image += opacity[:, None] * (colour - image)


def ellipse(x: np.ndarray, y: np.ndarray, centre: tuple, radii: tuple) -> np.ndarray:
    """Opacity of an ellipse on a grid of coordinates x and y."""
    across, down = (x - centre[0]) / radii[0], (y - centre[1]) / radii[1]
    return edge((1 - np.sqrt(across * across + down * down)) * np.minimum(*radii))


def edge(inside: np.ndarray) -> np.ndarray:
    """Opacity of a shape from the distance (in pixels) by which a pixel lies inside it."""
    return (inside + 0.5).clip(0, 1)


def wave(turns: np.ndarray) -> np.ndarray:
    """A triangle wave in [0, 1] of period 1."""
    return abs(2 * (turns - np.floor(turns)) - 1)
