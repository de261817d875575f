"""How far the graph of a preset is: `make status`, from any machine that sees its results.

Read from what the jobs write beside their results: `jobs/` says how each stands, and the training logs how long an
epoch takes. The time to go is reckoned from measured epochs and jobs alone."""

import sys
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Annotated

import pandas as pd
from pydantic import AwareDatetime, Field, create_model

from study import catalogue
from study.graph import parse_options, preset_parser, refusing
from study.settings import ROOT, Settings, read_yaml
from study.store import (
    ASKED,
    WEIGHTS,
    find_record,
    own_folder,
    read_if_answered,
    read_json,
    record_path,
    will_have_weights,
)

LOST = 120.0  # seconds without a sign of life, behind which a job counts as killed
TOLD = ["running", "failed", "stopped", "lost", "waiting"]  # states beside "done"
Seconds = Annotated[float, Field(ge=0, lt=1e9)]
# What is read of a line in a training's log, and of a job's record
Epoch = create_model("Epoch", seconds=Seconds)
JobState = create_model("JobState", state=str, error=str, machine=str, seen=AwareDatetime, seconds=Seconds)


def list_jobs(settings: Settings, now: datetime, lost_after: float = LOST) -> pd.DataFrame:
    """A row for each job of the graph, by its name: "notebook", "state", and what its record says (see `job`); of a
    training also the "network", "epochs" in all, those "trained", and their mean time, "epoch", in seconds. A job
    that says it runs but was not seen for `lost_after` seconds was killed: "lost"."""
    jobs = []
    for job, kind in (("02_training", "training"), ("03_attacks", "attacks"), ("06_adaptive_attacks", "adaptive")):
        models = catalogue.measured_models(settings, kind) if kind in ASKED else catalogue.trained_models(settings)
        # But for what comes with the project
        jobs += [
            (job, one, kind) for one in models if find_record(settings, one, kind) == record_path(settings, one, kind)
        ]
    apart = ["02_training"] + ["05_heatmaps"] * (not will_have_weights(settings, catalogue.table3_models(settings)))
    jobs += [(path.stem, None, "") for path in sorted((ROOT / "notebooks").glob("*.ipynb")) if path.stem not in apart]
    rows, of_training = {}, dict.fromkeys(("network", "epochs", "trained", "epoch"))
    for notebook, model, kind in jobs:
        job = f"{notebook}-{model}" if model else notebook
        row = rows[job] = {"notebook": notebook, "state": "waiting", "seconds": None, **of_training}
        with suppress(FileNotFoundError, ValueError):  # one that is damaged counts as not there
            known = JobState(**read_json(settings.runs / "jobs" / f"{job}.json"))
            if known.state != "done" or not model or _is_made(settings, model, kind):
                row |= dict(known) | {"silence": (now - known.seen).total_seconds()}
            if row["state"] == "running" and abs(row["silence"]) > lost_after:  # a clock may have been put back
                row["state"] = "lost"
        if notebook == "02_training":
            times = pd.Series(dtype=float)
            with suppress(FileNotFoundError, ValueError):  # the training writes a damaged log anew
                lines = (own_folder(settings, model) / "log.jsonl").read_text().splitlines()
                times = pd.Series([Epoch.model_validate_json(line).seconds for line in lines], dtype=float)
            row |= {"network": model.expert, "epochs": catalogue.recipe_of(settings, model).epochs}
            row |= {"trained": len(times), "epoch": times.mean()}
    frame = pd.DataFrame.from_dict(rows, orient="index")
    return frame.astype(dict.fromkeys(("seconds", "epochs", "trained", "epoch"), float))


def _is_made(settings: Settings, model: catalogue.ModelName, kind: str) -> bool:
    """Whether what a job made is still there, and of these settings."""
    path = record_path(settings, model, kind)
    beside = path.with_name(WEIGHTS) if kind == "training" else path.with_suffix(".parquet")
    with suppress(OSError, ValueError):
        return beside.exists() and read_if_answered(path, settings, model, kind) is not None
    return False


def seconds_to_go(jobs: pd.DataFrame) -> tuple[float, list[str]]:
    """Work that is left, in seconds of one job after the other, and the notebooks without a measured job, which are not
    in it. An epoch takes what the model's own took, else those of the same network, else those of any; a job of another
    notebook the mean of those that are done."""
    of_network = jobs.groupby("network")["epoch"].transform("mean")
    epoch = jobs["epoch"].fillna(of_network).fillna(jobs["epoch"].mean())
    done = jobs["state"] == "done"
    whole = jobs["seconds"].where(done).groupby(jobs["notebook"]).transform("mean")
    left = (epoch * (jobs["epochs"] - jobs["trained"])).fillna(whole)[~done]
    return left.sum(), sorted(set(jobs["notebook"][left.index[left.isna()]]))


def format_status(settings: Settings, now: datetime, lost_after: float = LOST) -> str:
    """The status as text: a line or two for all jobs, then one for each that runs or went wrong."""
    jobs = list_jobs(settings, now, lost_after)
    count = jobs["state"].value_counts()
    done = f"preset {settings.preset}: {count.get('done', 0)} of {len(jobs)} jobs done"
    lines = [", ".join([done, *(f"{count[state]} {state}" for state in TOLD if state in count)])]
    (seconds, unknown), at_a_time = seconds_to_go(jobs), max(count.get("running", 0), 1)
    if seconds:
        to_go = timedelta(seconds=min(round(seconds / at_a_time), 10**12))  # it holds no more than 10**14
        lines.append(f"to go: about {to_go} with {at_a_time} at a time")
    if unknown:
        lines.append(f"to go, and of which none has ended yet: {', '.join(unknown)}")
    told = jobs[jobs["state"].isin(TOLD[:-1])].sort_values("state", key=lambda s: s.map(TOLD.index))
    for name, job in told.iterrows():
        line = f"  {job.state:8} {name} on {job.machine}, seen {timedelta(seconds=max(round(job.silence), 0))} ago"
        if job.trained > 0:
            line += f": {job.trained:.0f} of {job.epochs:.0f} epochs, {job.epoch:.3g} s each"
        lines.append(f"{line}: {job.error}" if job.state == "failed" else line)
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = preset_parser("-m study.graph.status", "How far a preset is.")
    _, settings = parse_options(parser, arguments)
    if not settings.runs.is_dir():
        print(f"preset {settings.preset} has no results in {settings.runs}: nothing was started")
        return 0
    with suppress(FileNotFoundError, ValueError):
        asked = read_yaml(settings.runs / "graph.yaml").get("pretrained") is True
        settings = settings.model_copy(update={"pretrained": asked})
    with refusing(parser):
        print(format_status(settings, datetime.now(UTC)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
