"""SIGTERM, by which a scheduler or a container warns that it will end a process in some seconds."""

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
def sigterm_noted() -> Iterator[list[int]]:
    """Within it, SIGTERM ends nothing but lands in the list, so that there is time to save what
    was computed. Behind it, SystemExit(143) makes up for one that came.

    Only the main thread can handle signals; in any other, SIGTERM does what it did before.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
    if received:
        raise SystemExit(STOPPED)


@contextmanager
def sigterm_handed_on(cluster: bool) -> Iterator[threading.Event]:
    """Within it, SIGTERM reaches the running jobs of the graph too; the event says whether there
    was one.

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
