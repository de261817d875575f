"""The graph, as a user starts it."""

import subprocess
import sys
from pathlib import Path

from immunity_lib.settings import ROOT


def reproduce_command(output: Path, *options: str, preset: str = "smoke") -> list[str]:
    """What `make reproduce` runs."""
    command = [sys.executable, "-m", "immunity_lib.reproduce", "--preset", preset]
    return [*command, "--output", str(output), *options]


def reproduce(output: Path, *options: str, preset: str = "smoke") -> subprocess.CompletedProcess:
    """Run it to its end."""
    command = reproduce_command(output, *options, preset=preset)
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1500)


def tables(figures: Path, *endings: str) -> dict[str, bytes]:
    """Every table of a folder of figures, by its file's name."""
    endings = endings or ("csv", "md", "tex")
    return {
        path.name: path.read_bytes() for ending in endings for path in figures.glob(f"*.{ending}")
    }
