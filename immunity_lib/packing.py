"""Numbers of all images in one line of a record."""

import numpy as np
from torch import Tensor


def packed(values: Tensor) -> str:
    """Of (B,) values, to four digits."""
    return " ".join(f"{value:.4g}" for value in values.tolist())


def unpacked(line: str) -> np.ndarray:
    """The values that `packed` wrote, (B,)."""
    return np.array(line.split(), dtype=float)
