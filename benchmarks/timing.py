"""Times that compare: the sides take turns, so that a busy machine slows them alike."""

import time
from collections.abc import Callable
from statistics import median


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
