"""What the graph takes over its notebooks' own time, in a run of a preset from nothing.

Goal: at most 10 % at preset demo. A notebook's own time is papermill's, from its kernel's start
to its end. To it the graph adds, for each job, the process that starts it, and what Snakemake does
before, between and after jobs. Takes as long as the preset: `python -m benchmarks.graph demo`.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from study.settings import ROOT, load_preset


def own_times(runs: Path) -> dict[str, float]:
    """Seconds of every executed notebook, by its name, as papermill says."""
    return {
        path.stem: json.loads(path.read_text())["metadata"]["papermill"]["duration"]
        for path in (runs / "notebooks").glob("*.ipynb")
    }


def spans(runs: Path) -> dict[str, tuple[float, float]]:
    """When Snakemake started and ended every job, by the name of its notebook."""
    found = {}
    for path in (runs / ".snakemake" / "metadata").rglob("*"):
        if path.is_file():
            job = json.loads(path.read_text())
            found[Path(job["log"][0]).stem] = job["starttime"], job["endtime"]
    return found


def without_job(spans: list[tuple[float, float]]) -> float:
    """Seconds between the first start and the last end in which no job ran."""
    idle, latest = 0.0, min(start for start, _ in spans)
    for start, end in sorted(spans):
        idle += max(start - latest, 0.0)
        latest = max(latest, end)
    return idle


def main(preset: str = "demo") -> None:
    with tempfile.TemporaryDirectory() as folder:
        runs = load_preset(preset, output_folder=folder).runs
        command = [sys.executable, "-m", "study.graph.run", "--preset", preset]
        started = time.time()
        subprocess.run([*command, "--output", folder], cwd=ROOT, check=True)
        ended = time.time()
        report(own_times(runs), spans(runs), started, ended)


def report(own: dict, spans: dict, started: float, ended: float) -> None:
    """Print the parts of the overhead; jobs by the name of their notebook."""
    assert own.keys() == spans.keys(), own.keys() ^ spans.keys()
    notebooks = sum(own.values())
    by_job = sum(end - start for start, end in spans.values()) - notebooks
    first, last = min(spans.values())[0], max(end for _, end in spans.values())
    beside = (first - started) + (ended - last) + without_job(list(spans.values()))
    print(
        f"{len(own)} notebooks, {notebooks:.0f} s of their own, in {ended - started:.0f} s\n"
        f"overhead {(by_job + beside) / notebooks:.1%}: starting each job {by_job:.0f} s "
        f"({by_job / len(own):.1f} s a job), Snakemake without a job {beside:.0f} s"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
