"""How a job of the graph stands, as a small record that other machines can read too."""

from __future__ import annotations

import os
import platform
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime

from immunity_lib.records import write_record
from immunity_lib.settings import Settings

REFRESHED = 20.0  # seconds between two signs of life


class JobState:
    """`runs/<preset>/jobs/<job>.json`, rewritten every REFRESHED seconds while the job runs.

    "state": "running", "done", "failed" with its "error", or "stopped" by a scheduler. A job that
    was killed says "running" and is no longer "seen". Times are in UTC.
    """

    def __init__(self, settings: Settings, job: str):
        self.path = settings.runs / "jobs" / f"{job}.json"
        self.started = datetime.now(UTC)
        self._ended = threading.Event()

    @contextmanager
    def kept_fresh(self) -> Iterator[None]:
        """Within it, the job runs, and its record says so again and again."""
        thread = threading.Thread(target=self._refresh, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._ended.set()
            thread.join()

    def end(self, state: str, error: str = "") -> None:
        """The last word: "done", "failed" or "stopped"."""
        self._write(state, error)

    def _refresh(self) -> None:
        while True:
            self._write("running", "")
            if self._ended.wait(REFRESHED):
                return

    def _write(self, state: str, error: str) -> None:
        now = datetime.now(UTC)
        content = {
            "kind": "job",
            "job": self.path.stem,
            "state": state,
            "error": error,
            "machine": platform.node(),
            "process": os.getpid(),
            "gpus": os.environ.get("CUDA_VISIBLE_DEVICES", ""),
            "started": self.started.isoformat(timespec="seconds"),
            "seen": now.isoformat(timespec="seconds"),
            "seconds": round((now - self.started).total_seconds(), 1),
        }
        with suppress(OSError):  # on a full disk, it is the job itself that must say so
            write_record(self.path, content)
