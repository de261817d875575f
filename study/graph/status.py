"""How far the graph of a preset is: `make status`, from any machine that sees its results.

Read from what the jobs write beside their results: `jobs/` says how each stands, and the training logs how long an
epoch takes. The time to go is reckoned from measured epochs and jobs alone.
"""

import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta

import pandas as pd

from study import catalogue
from study.graph import parse_options, preset_parser
from study.settings import ROOT, Settings
from study.store import DamagedFile, own_folder, read_json

LOST = 120.0  # seconds without a sign of life, behind which a job counts as killed
TOLD = ["running", "failed", "stopped", "lost", "waiting"]  # states beside "done"


def list_jobs(settings: Settings, now: datetime, lost_after: float = LOST) -> pd.DataFrame:
    """A row for each job of the graph, by its name: "notebook", "state", and what its record says (see `job`); of a
    training also the "network", "epochs" in all, those "trained", and their mean time, "epoch", in seconds. A job
    that says it runs but was not seen for `lost_after` seconds was killed: "lost"."""
    per_model = {
        "02_training": catalogue.trained_models(settings),
        "03_attacks": catalogue.attacked_models(settings),
        "06_adaptive_attacks": catalogue.adaptive_models(settings),
    }
    named = [(notebook, model) for notebook in per_model for model in per_model[notebook]]
    notebooks = {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")} - {"02_training"}
    rows = {}
    for notebook, model in [*named, *((notebook, None) for notebook in sorted(notebooks))]:
        job = f"{notebook}-{model}" if model else notebook
        row = {"notebook": notebook, "state": "waiting", "seconds": None}
        with suppress(FileNotFoundError, DamagedFile):
            row |= read_json(settings.runs / "jobs" / f"{job}.json")
            silence = now - datetime.fromisoformat(row["seen"])
            if row["state"] == "running" and silence.total_seconds() > lost_after:
                row["state"] = "lost"
        if notebook == "02_training":
            times = pd.Series(epoch_seconds(settings, model), dtype=float)
            epochs = catalogue.recipe_of(settings, model).epochs
            row |= {"network": model.expert, "epochs": epochs}
            row |= {"trained": len(times), "epoch": times.mean()}
        rows[job] = row
    return pd.DataFrame.from_dict(rows, orient="index").astype({"seconds": float})


def epoch_seconds(settings: Settings, model: catalogue.ModelName) -> list[float]:
    """Seconds of every epoch that a model has been trained for so far; none if its log is damaged, which the training
    writes anew."""
    log = own_folder(settings, model) / "log.jsonl"
    try:
        return [json.loads(line)["seconds"] for line in log.read_text().splitlines()]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return []


def seconds_to_go(jobs: pd.DataFrame) -> tuple[float, list[str]]:
    """Work that is left, in seconds of one job after the other, and the notebooks that are not in it because none of
    their jobs has been measured yet.

    An epoch takes what the model's own took, else those of the same network, else those of any;
    a job of another notebook the mean of those that are done.
    """
    epoch = jobs["epoch"].fillna(jobs.groupby("network")["epoch"].transform("mean"))
    epoch = epoch.fillna(jobs["epoch"].mean())
    done = jobs["state"] == "done"
    whole = jobs["seconds"].where(done).groupby(jobs["notebook"]).transform("mean")
    left = (epoch * (jobs["epochs"] - jobs["trained"])).fillna(whole)[~done]
    return left.sum(), sorted(set(jobs["notebook"][left.index[left.isna()]]))


def format_status(settings: Settings, now: datetime, lost_after: float = LOST) -> str:
    """The status as text: a line or two for all jobs, then one for each that runs or went wrong."""
    jobs = list_jobs(settings, now, lost_after)
    count = jobs["state"].value_counts()
    words = [f"{count[state]} {state}" for state in TOLD if state in count]
    done = f"preset {settings.preset}: {count.get('done', 0)} of {len(jobs)} jobs done"
    lines = [", ".join([done, *words])]
    seconds, unknown = seconds_to_go(jobs)
    at_a_time = max(count.get("running", 0), 1)
    if seconds:
        duration = timedelta(seconds=round(seconds / at_a_time))
        lines.append(f"to go: about {duration} with {at_a_time} at a time")
    if unknown:
        lines.append(f"to go, and of which none has ended yet: {', '.join(unknown)}")
    told = jobs[jobs["state"].isin(TOLD[:-1])].sort_values("state", key=lambda s: s.map(TOLD.index))
    for name, job in told.iterrows():
        ago = timedelta(seconds=round((now - datetime.fromisoformat(job.seen)).total_seconds()))
        line = f"  {job.state:8} {name} on {job.machine}, seen {ago} ago"
        if job.trained > 0:
            line += f": {job.trained:.0f} of {job.epochs:.0f} epochs, {job.epoch:.3g} s each"
        lines.append(f"{line}: {job.error}" if job.state == "failed" else line)
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print how far a preset is; returns the exit status."""
    _, settings = parse_options(preset_parser("-m study.graph.status", "How far a preset is."), arguments)
    if settings.runs.is_dir():
        print(format_status(settings, datetime.now(UTC)))
    else:
        print(f"preset {settings.preset} has no results in {settings.runs}: nothing was started")
    return 0


if __name__ == "__main__":
    sys.exit(main())
