"""Several processes that train one model together, each on a GPU of its own where there are GPUs.

Every process holds the whole model and a share of each batch: images[rank::processes]. What the
images of a batch have in common, the processes exchange through `torch.distributed`. Without a
group, as usual, there is one process, and nothing to exchange.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, distributed, multiprocessing, nn
from torch.autograd import Function
from torch.nn.parallel import DistributedDataParallel

from immunity_lib.gpus import check_enough
from immunity_lib.stopping import STOPPED, sigterm_noted

TIMEOUT = timedelta(minutes=10)  # for the others to arrive where this process waits for them


def processes() -> int:
    """How many train together; 1 outside of a group."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank() -> int:
    """Which of them this is, from 0; the first one alone writes files."""
    return distributed.get_rank() if distributed.is_initialized() else 0


class _Sum(Function):
    """Over all processes. Each adds its own loss to what is descended, hence the gradient of what
    one of them gave is the sum of all."""

    @staticmethod
    def forward(ctx, values):
        total = values.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient):
        return _Sum.apply(gradient)


def mean_over_processes(values: Tensor) -> Tensor:
    """Of the tensors that each process has here; can be differentiated any number of times."""
    return values if processes() == 1 else _Sum.apply(values) / processes()


def batch_mean(values: Tensor) -> Tensor:
    """Mean (...) over a whole batch, of which `values` (B, ...) are this process's share."""
    return mean_over_processes(values.mean(0))


def sums(values: Iterable[float]) -> list[float]:
    """Each value, added up over all processes."""
    if processes() == 1:
        return list(values)
    total = torch.tensor(list(values), dtype=torch.float64)
    distributed.all_reduce(total)
    return total.tolist()


def averaged(loss: nn.Module, unused: bool = False) -> nn.Module:
    """A module that returns this process's loss, with gradients that are the mean over all
    processes. unused: whether it has weights that no loss depends on.

    Buffers are not exchanged: the layers that have them exchange what goes into them.
    """
    if processes() == 1:
        return loss
    return DistributedDataParallel(loss, forward_sync_buffers=False, find_unused_parameters=unused)


def agreed(wish: bool) -> bool:
    """Whether one of the processes wishes it; all get the same answer, once all have asked."""
    return sums([wish]) != [0]


def of_the_first(tensor: Tensor) -> Tensor:
    """What the first process holds here; a tensor on the CPU."""
    if processes() > 1:
        distributed.broadcast(tensor, 0)
    return tensor


@contextmanager
def first_goes_first() -> Iterator[None]:
    """Within it, the others begin when the first process is through."""
    if rank():
        agreed(True)
    yield
    if not rank():
        agreed(True)


def train_together(function: Callable, *arguments: Any, processes: int) -> None:
    """Call `function(*arguments)` in this many fresh processes, which form a group.

    The function and its arguments are pickled, so keep them small. SIGTERM is handed on; when all
    have saved what they have and ended with status 143, SystemExit(143) is raised. If one fails,
    the others are ended, and a RuntimeError has its traceback. Raises ValueError where there are
    GPUs, but fewer than processes.
    """
    check_enough(torch.cuda.device_count(), processes)
    threads = max(1, torch.get_num_threads() // processes)
    with TemporaryDirectory() as folder, sigterm_noted() as sigterms:
        group = multiprocessing.spawn(
            _member, (processes, os.getpid(), Path(folder), threads, function, arguments),
            processes, join=False,
        ).processes  # fmt: skip
        try:
            statuses = _awaited(group, sigterms)
        finally:
            for member in group:
                member.kill()
                member.join()
        if sigterms or set(statuses) == {STOPPED}:
            raise SystemExit(STOPPED)
        if set(statuses) != {0}:
            failure = Path(folder) / "failure"
            told = failure.read_text() if failure.exists() else "it left no word"
            raise RuntimeError(
                f"of {processes} processes that train together one failed; their statuses are "
                f"{statuses}, None for one that was still at work. {told}"
            )


def _awaited(group: list, sigterms: list[int]) -> list[int | None]:
    """Statuses once all have ended, or one has failed and the others wait for it in vain."""
    running, told = list(group), False
    while running and all(member.exitcode in (None, 0, STOPPED) for member in group):
        wait([member.sentinel for member in running], timeout=0.2)
        running = [member for member in group if member.exitcode is None]
        if sigterms and not told:
            told = True
            for member in running:
                os.kill(member.pid, signal.SIGTERM)
    return [member.exitcode for member in group]


def _member(
    rank: int, processes: int, starter: int, folder: Path, threads: int,
    function: Callable, arguments: tuple,
) -> None:  # fmt: skip
    """What one of the processes does."""
    # It comes when the process that started this one is gone; jobs in the background ignore it
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if os.getppid() != starter:  # which was gone before this one listened
        return
    torch.set_num_threads(threads)
    if rank:
        sys.stdout = open(os.devnull, "w")  # the first one speaks for all
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(rank)
        backend = "cpu:gloo,cuda:nccl"
    try:
        distributed.init_process_group(
            backend, f"file://{folder}/meeting", TIMEOUT, processes, rank
        )
        function(*arguments)
    except Exception:
        # The first to fail is why the others do
        with suppress(FileExistsError), open(folder / "failure", "x") as file:
            file.write(traceback.format_exc())
        raise
    distributed.destroy_process_group()
