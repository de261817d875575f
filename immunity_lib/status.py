"""How far the graph of a preset is: `make status`, from any machine that sees its results.

Read from what the jobs write beside their results: `jobs/` says how each stands, and the training
logs how long an epoch takes. The time to go is reckoned from measured epochs and jobs alone.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from statistics import mean

from immunity_lib.command_line import preset_parser
from immunity_lib.job_state import REFRESHED
from immunity_lib.recipes import (
    ModelName,
    attacked_models,
    judged_models,
    recipe,
    trained_models,
)
from immunity_lib.records import DamagedFile, read_record
from immunity_lib.settings import ROOT, Settings, load_preset

LOST = 6 * REFRESHED  # seconds
STATES = ("done", "running", "failed", "stopped", "lost", "waiting")
PER_MODEL = {
    "02_training": trained_models,
    "03_attacks": attacked_models,
    "06_adaptive_attacks": judged_models,
}


@dataclass(frozen=True)
class JobStatus:
    """A job of the graph, and how it stands.

    state: one of STATES; "stopped" by a scheduler, "lost" when it was killed without a word.
    record: as `JobState` writes it; empty for a job that has none.
    """

    notebook: str
    model: ModelName | None
    state: str
    record: dict
    run_for: timedelta

    def __str__(self) -> str:
        return f"{self.notebook}-{self.model}" if self.model else self.notebook

    @property
    def trains(self) -> bool:
        return self.notebook == "02_training"


def jobs_of(settings: Settings, now: datetime, lost_after: float = LOST) -> list[JobStatus]:
    """Every job of the preset's graph and how it stands, in the order of the notebooks.

    lost_after: seconds without a sign of life, behind which a job that runs counts as killed.
    """
    named: list[tuple[str, ModelName | None]] = [
        (notebook, model) for notebook, models in PER_MODEL.items() for model in models(settings)
    ]
    # Training alone makes no table of its own
    drawing = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
    named += [(notebook, None) for notebook in drawing if notebook != "02_training"]
    silence = timedelta(seconds=lost_after)
    return [_job_status(settings, notebook, model, now, silence) for notebook, model in named]


def _job_status(
    settings: Settings, notebook: str, model: ModelName | None, now: datetime, silence: timedelta
) -> JobStatus:
    job = f"{notebook}-{model}" if model else notebook
    try:
        record = read_record(settings.runs / "jobs" / f"{job}.json")
    except (FileNotFoundError, DamagedFile):
        # From before jobs kept records, or none yet
        executed = settings.runs / "notebooks" / f"{job}.ipynb"
        state = "done" if executed.exists() else "waiting"
        return JobStatus(notebook, model, state, {}, timedelta())
    state = record["state"]
    seen, started = (datetime.fromisoformat(record[when]) for when in ("seen", "started"))
    if state == "running" and now - seen > silence:
        state = "lost"
    return JobStatus(notebook, model, state, record, now - started)


def epochs_of(settings: Settings, model: ModelName) -> list[float]:
    """Seconds of every epoch that a model has been trained for so far; none if its log is damaged,
    which the training writes anew."""
    log = settings.runs / "models" / str(model) / "log.jsonl"
    try:
        return [json.loads(line)["seconds"] for line in log.read_text().splitlines()]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return []


def seconds_to_go(settings: Settings, jobs: list[JobStatus]) -> tuple[float, list[str]]:
    """Work that is left, in seconds of one job after the other, and the notebooks that are not in
    it because none of their jobs has been measured yet."""
    epochs = {job.model: epochs_of(settings, job.model) for job in jobs if job.trains}
    # What a training takes beside its epochs: the kernel, the libraries, the data
    beside = [
        job.record["seconds"] - sum(epochs[job.model])
        for job in jobs
        if job.trains and job.state == "done" and job.record
    ]
    left, unknown = 0.0, set()
    for job in jobs:
        if job.state == "done":
            continue
        if job.trains:
            seconds = _of_epochs(settings, job.model, epochs)
        else:
            seconds = _of_same_notebook(job, jobs)
        if seconds is None:
            unknown.add(job.notebook)
            continue
        starting = mean(beside) if beside and job.trains else 0.0
        run = job.run_for.total_seconds() if job.state == "running" and not job.trains else 0.0
        left += max(seconds + starting - run, 0.0)
    return left, sorted(unknown)


def _of_epochs(settings: Settings, model: ModelName, epochs: dict) -> float | None:
    """What is left of a training, by its own epochs or else by those of the models most like it."""

    def likeness(other: ModelName) -> int:
        fields = ("expert", "method", "regime", "dataset")
        return sum(getattr(other, field) == getattr(model, field) for field in fields)

    measured = [other for other, seconds in epochs.items() if seconds]
    if not measured:
        return None
    most = max(map(likeness, measured))
    alike = [model] if epochs[model] else [one for one in measured if likeness(one) == most]
    left = recipe(settings, model).epochs - len(epochs[model])
    return left * mean(mean(epochs[one]) for one in alike)


def _of_same_notebook(job: JobStatus, jobs: list[JobStatus]) -> float | None:
    """The mean time of the same notebook's finished jobs."""
    finished = [
        other.record["seconds"]
        for other in jobs
        if other.notebook == job.notebook
        and (other.model is None) == (job.model is None)
        and other.state == "done"
        and other.record
    ]
    return mean(finished) if finished else None


def printed_status(settings: Settings, now: datetime, lost_after: float = LOST) -> str:
    """The status as text: a line or two for all jobs, then one for each that runs or went wrong."""
    jobs = jobs_of(settings, now, lost_after)
    count = {state: sum(job.state == state for job in jobs) for state in STATES}
    said = [f"{count['done']} of {len(jobs)} jobs done"]
    said += [f"{count[state]} {state}" for state in STATES[1:] if count[state]]
    lines = [f"preset {settings.preset}: {', '.join(said)}"]
    if count["done"] < len(jobs):
        at_a_time = max(count["running"], 1)
        left, unknown = seconds_to_go(settings, jobs)
        to_go = [f"about {duration(left / at_a_time)} with {at_a_time} at a time"]
        if unknown:
            measured = to_go if left else []
            to_go = [*measured, f"{', '.join(unknown)}, of which none has ended yet"]
        lines.append(f"to go: {', and '.join(to_go)}")
    for state in ("running", "failed", "stopped", "lost"):
        lines += [f"  {_line(settings, job, now)}" for job in jobs if job.state == state]
    return "\n".join(lines)


def _line(settings: Settings, job: JobStatus, now: datetime) -> str:
    line = f"{job.state:8} {job} on {job.record['machine']}"
    if job.state != "running":
        ago = now - datetime.fromisoformat(job.record["seen"])
        line += f", {duration(ago.total_seconds())} ago"
        if job.state == "failed":
            log = settings.runs / "notebooks" / f"{job}.log"
            return f"{line}: {job.record['error']} (see {os.path.relpath(log)})"
        return f"{line}; the same command goes on from where it was"
    line += f" for {duration(job.run_for.total_seconds())}"
    if not job.trains:
        return line
    seconds, epochs = epochs_of(settings, job.model), recipe(settings, job.model).epochs
    if seconds:
        left = (epochs - len(seconds)) * mean(seconds)
        line += f": {len(seconds)} of {epochs} epochs, {mean(seconds):.3g} s each, "
        return f"{line}about {duration(left)} to go"
    return f"{line}: in the first of {epochs} epochs"


def duration(seconds: float) -> str:
    """As people say it: 40 s, 12 min, 3 h 20 min, 2 d 4 h."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d {hours % 24} h"


def main(arguments: list[str] | None = None) -> int:
    """Print how far a preset is; returns 0, or 1 where a job has failed and none runs."""
    parser = preset_parser(
        "status", "How far the graph of a preset is, from its logs and records alone."
    )
    options = parser.parse_args(arguments)
    try:
        settings = load_preset(
            options.preset, data_folder=options.data, output_folder=options.output
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not settings.runs.is_dir():
        print(f"preset {settings.preset} has no results in {settings.runs}: nothing was started")
        return 0
    print(printed_status(settings, datetime.now(UTC)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
