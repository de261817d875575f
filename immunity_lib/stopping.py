"""SIGTERM, by which schedulers and containers ask a process to end, for the graph as a whole."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

STOPPED = 128 + signal.SIGTERM  # what a shell says of a process that SIGTERM ended


@contextmanager
def sigterm_handed_on(cluster: bool) -> Iterator[threading.Event]:
    """Within it, SIGTERM reaches the running jobs too; the event says whether there was one.

    Snakemake's own answer to SIGTERM is to start no further job and to wait for those that run,
    which takes hours. Told as well, they write their checkpoints and end. On a cluster they are
    cancelled instead, as by Ctrl-C, and its scheduler tells them. In the main thread alone.
    """
    stopped = threading.Event()
    # Snakemake sets a handler of its own; this hears of the signal beside it
    heard, told = socket.socketpair()
    told.setblocking(False)
    before = signal.set_wakeup_fd(told.fileno())

    def listen() -> None:
        while number := heard.recv(1):
            if number[0] == signal.SIGTERM:
                stopped.set()
                if cluster:
                    os.kill(os.getpid(), signal.SIGINT)
                    continue
                for job in psutil.Process().children():
                    job.terminate()

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    try:
        yield stopped
    finally:
        signal.set_wakeup_fd(before)
        told.close()
        thread.join()
        heard.close()
