"""What benchmarks share: what they time, and times that compare, as the sides take turns, so that a busy machine slows
them alike."""

import time
from collections.abc import Callable
from statistics import median

import torch

from immunity_lib import ImmunityMoE, build_expert


def random_mixture(
    network: str, width: float, images: int, experts: int = 5
) -> tuple[ImmunityMoE, torch.Tensor, torch.Tensor]:
    """A mixture before any training, and noise (images, 3, 32, 32) with labels for it; all in channels last."""
    torch.manual_seed(0)
    model = ImmunityMoE([build_expert(network, 10, width) for _ in range(experts)])
    noise = torch.rand(images, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    return model.to(memory_format=torch.channels_last), noise, torch.randint(0, 10, (images,))


def take_turns(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call in each round, after one round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if round_:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratios(slower: list[float], faster: list[float]) -> str:
    """Median and range of the round-by-round ratios, as text."""
    found = [one / other for one, other in zip(slower, faster, strict=True)]
    return f"{median(found):.2f} times ({min(found):.2f} to {max(found):.2f})"
