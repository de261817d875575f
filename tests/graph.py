"""The graph as a user starts it."""

import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from study.settings import ROOT


def reproduce_command(output: Path, *options: str, preset: str = "smoke") -> list[str]:
    """What `make reproduce` runs."""
    command = [sys.executable, "-m", "study.graph.run", "--preset", preset]
    return [*command, "--output", str(output), *options]


def reproduce(output: Path, *options: str, preset: str = "smoke") -> subprocess.CompletedProcess:
    """Run it to its end."""
    command = reproduce_command(output, *options, preset=preset)
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1500)


def job_command(notebook: str, preset: Path | str, output: Path | str, *options: str) -> list[str]:
    """What the graph runs for one of its jobs."""
    command = [sys.executable, "-m", "study.graph.job", notebook, f"--preset={preset}"]
    return [*command, f"--output={output}", *options]


def tables(figures: Path, *endings: str) -> dict[str, bytes]:
    """Every table of a folder of figures, by its file's name."""
    endings = endings or ("csv", "md", "tex")
    return {path.name: path.read_bytes() for ending in endings for path in figures.glob(f"*.{ending}")}


def wait_for(happened, seconds: float = 120) -> None:
    """Until it has happened; a failure of the test if it does not within that time."""
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def free_ports(count: int) -> list[int]:
    """Of this machine, different ones."""
    with ExitStack() as held:
        probes = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [probe.getsockname()[1] for probe in probes]
