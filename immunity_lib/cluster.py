"""What each job of the graph asks a scheduler for: time and memory, from the plan.

Reckoned once before the jobs are submitted. A job that ran out of either is tried again with more.
"""

from __future__ import annotations

import math
from pathlib import Path

from immunity_lib.plan import hours, planned_jobs
from immunity_lib.settings import ROOT, Settings, read_yaml

PROFILES = ROOT / "profiles"
# Of what is asked for: the plan's speed is a guess, and a job that waits in a queue a little longer
# loses less than one that is ended
MARGIN = 2.0
STARTING = 10  # minutes, for the kernel, the libraries and the data
LIBRARIES = 4000  # MB of a process that has loaded them


def requests(settings: Settings, tflops: float) -> dict[str, dict[str, int]]:
    """Of every job that works on one model: minutes of wall-clock time and MB of memory.

    tflops: sustained speed of a GPU of the cluster, or of a core where it has none.
    """
    asked = {}
    for job in planned_jobs(settings):
        work = {
            "02_training": job.training / settings.processes,
            "03_attacks": job.attacks,
            "06_adaptive_attacks": job.judging,
        }
        for notebook, multiply_accumulates in work.items():
            minutes = STARTING + MARGIN * 60 * hours(multiply_accumulates, tflops)
            asked[f"{notebook}-{job.name}"] = {
                "runtime": math.ceil(minutes),
                "mem_mb": LIBRARIES + math.ceil(job.memory / 1e6),
            }
    return asked


def profile_folder(name: str) -> Path:
    """Where a profile lies, by its name in profiles/ or by its path.

    Raises ValueError that lists the valid names."""
    for folder in (PROFILES / name, Path(name)):
        if (folder / "config.yaml").is_file():
            return folder.resolve()
    known = ", ".join(sorted(path.parent.name for path in PROFILES.glob("*/config.yaml")))
    raise ValueError(
        f"unknown profile {name!r}; valid names: {known}, or the path of a folder that holds a "
        "config.yaml"
    )


def submits(profile: Path) -> bool:
    """Whether a profile hands its jobs to a scheduler, rather than running them on this machine."""
    return read_yaml(profile / "config.yaml").get("executor", "local") != "local"
