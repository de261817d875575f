"""What each job of the graph asks a scheduler for: time and memory, from the plan.

Reckoned once before the jobs are submitted. A job that ran out of either is tried again with more.
"""

from __future__ import annotations

import math
from pathlib import Path

from immunity_lib.plan import hours, planned_jobs
from immunity_lib.recipes import single, swept_models, table1_models, table3_models
from immunity_lib.settings import ROOT, Settings, read_yaml

PROFILES = ROOT / "profiles"
# Of what is asked for: the plan's speed is a guess, and a job that waits in a queue a little longer
# loses less than one that is ended
MARGIN = 2.0
STARTING = 10  # minutes, for the kernel, the libraries and the data
LIBRARIES = 4000  # MB of a process that has loaded them


def requests(settings: Settings, tflops: float) -> dict[str, dict[str, int]]:
    """Of every job that computes with models: minutes of wall-clock time and MB of memory.

    tflops: sustained speed of a GPU of the cluster, or of a core where it has none.
    """
    planned = {job.name: job for job in planned_jobs(settings)}
    memory = LIBRARIES + math.ceil(max(job.memory for job in planned.values()) / 1e6)

    def request(multiply_accumulates: float) -> dict[str, int]:
        minutes = STARTING + MARGIN * 60 * hours(multiply_accumulates, tflops)
        return {"runtime": math.ceil(minutes), "mem_mb": memory}

    asked = {}
    for name, job in planned.items():
        asked[f"02_training-{name}"] = request(job.training / settings.processes)
        asked[f"03_attacks-{name}"] = request(job.attacks)
        asked[f"06_adaptive_attacks-{name}"] = request(job.judging)
    ablation = table3_models(settings)
    scored = {
        "01_expert_selection": table1_models(settings),
        "04_ablation": ablation + swept_models(settings),
        "05_heatmaps": ablation,
    }
    for notebook, names in scored.items():
        asked[notebook] = request(sum(planned[one].scores for one in single(settings, names)))
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
