"""What images and labels must be, checked where they come in from outside."""

from __future__ import annotations

from torch import Tensor

ROUNDING = 1e-6  # a float32 image plus a float32 perturbation may miss its bounds by this much


def check_images(images: Tensor) -> None:
    """Raise ValueError unless the images lie in [0, 1]."""
    low, high = images.min().item(), images.max().item()
    if not (-ROUNDING <= low and high <= 1 + ROUNDING):  # so phrased that NaN fails
        raise ValueError(
            f"images must lie in [0, 1], found {low:g} to {high:g}: divide 8-bit images by 255, "
            "and do not normalise them, since normalisation is the model's first layer"
        )


def check_labels(labels: Tensor, classes: int) -> None:
    """Raise ValueError unless the labels lie in 0 .. classes - 1."""
    low, high = labels.min().item(), labels.max().item()
    if low < 0 or high >= classes:
        raise ValueError(
            f"labels must lie in 0 to {classes - 1}, found {low} to {high}: the model has "
            f"{classes} classes; build it with num_classes={high + 1} or mend the labels"
        )
