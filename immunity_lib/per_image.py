"""Numbers of all images in one line of a record, and what follows from them over attacks."""

from collections.abc import Collection, Iterable

import numpy as np
from torch import Tensor


def packed(values: Tensor) -> str:
    """Of (B,) values, to four digits."""
    return " ".join(f"{value:.4g}" for value in values.tolist())


def unpacked(line: str) -> np.ndarray:
    """The values that `packed` wrote, (B,)."""
    return np.array(line.split(), dtype=float)


def worst_case(
    attacks: Iterable[dict], families: Collection[str] | None = None
) -> dict[str, np.ndarray]:
    """Over attacks, image by image: "failure", the highest failure probability over the gate, and
    "uniform" and "trained", 1 where any attack fools that gate; each (B,). families: of attacks,
    None for all."""
    attacks = [entry for entry in attacks if families is None or entry["family"] in families]
    right = {
        gate: np.min([unpacked(entry["per_image"][gate]) for entry in attacks], axis=0)
        for gate in ("gates", "uniform", "trained")
    }
    failure = 1 - right.pop("gates") / attacks[0]["gates"]
    return {"failure": failure} | {gate: 1 - least for gate, least in right.items()}


def success_within(failure: np.ndarray, queries: int) -> float:
    """Probability that an attacker who may try so often succeeds, mean over images: 1 - (1 - q)^k
    for an image that fails with probability q at each try."""
    return float((1 - (1 - failure) ** queries).mean())
