"""One GPU for each job on a machine with several."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

LOOK_AGAIN = 1.0  # seconds


def check_enough(gpus: int, processes: int) -> None:
    """Raises ValueError where there are GPUs, but fewer than processes that train one model."""
    if 0 < gpus < processes:
        raise ValueError(
            f"processes is {processes}, but this machine offers {gpus} GPUs; lower processes"
        )


@contextmanager
def taken_gpus(gpus: str, count: int, runs: Path) -> Iterator[str]:
    """Hold `count` of the GPUs "0,1,2,..." that no other job of this machine holds, and give their
    numbers, as CUDA_VISIBLE_DEVICES takes them; waits where too few are free.

    A job that is killed frees its own: they are held by locks on files beside the folder `runs`.
    """
    numbers = gpus.split(",")
    check_enough(len(numbers), count)
    while True:
        with ExitStack() as held:
            taken = []
            for number in numbers:
                lock = runs.parent / f".gpu-{platform.node()}-{number}.lock"
                try:
                    held.enter_context(FileLock(lock, timeout=0))
                except Timeout:
                    continue
                taken.append(number)
                if len(taken) == count:
                    yield ",".join(taken)
                    return
        time.sleep(LOOK_AGAIN)
