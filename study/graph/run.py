"""One command from a preset to its tables and figures: what `make reproduce` runs.

Refuses what cannot end well before anything is computed, lets Snakemake make what is missing, and lists what there
is and what it shows. Killed at any moment, the same command goes on. Of several GPUs, each job takes one of its own;
with the profile of a cluster (profiles/), Snakemake submits every job to its scheduler."""

import os
import platform
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import psutil
import yaml
from filelock import FileLock, Timeout

from study.graph import parse_options, preset_parser
from study.graph.checks import gives_gpus, look_ahead
from study.graph.plan import ASSUMED_TFLOPS, requests
from study.graph.status import format_status
from study.settings import ROOT, Settings
from study.store import DamagedFile, chosen_device, read_json, write_atomically


def main(arguments: Sequence[str] | None = None) -> int:
    parser = preset_parser("-m study.graph.run", "Make what is missing of a preset's tables and figures.")
    parser.add_argument("--jobs", type=int, help="notebooks beside each other (default: all cores)")
    parser.add_argument("--profile", default="", help="a folder of profiles/, as slurm, or a path")
    told = "sustained speed of a cluster's GPU in TFLOP/s, for time limits (%(default)g)"
    parser.add_argument("--tflops", type=float, default=ASSUMED_TFLOPS, help=told)
    told = "jobs on one GPU, where its memory has room for them (%(default)d; which is fastest is not measured)"
    parser.add_argument("--jobs-per-gpu", type=int, default=1, help=told)
    told = "go on from what comes with the project: what is trained and measured in pretrained/ counts as done"
    parser.add_argument("--pretrained", action="store_true", help=told)
    options, settings = parse_options(parser, arguments)
    lock = settings.runs / ".lock"
    try:
        profile, data, gpus = look_ahead(settings, options.profile, options.jobs, options.jobs_per_gpu)
        given = {"data_folder", "output_folder", "pretrained"}
        config = {"preset": options.preset} | settings.model_dump(include=given)
        # Of your own images, one name may stand for other images tomorrow
        config["data"] = {name: [one.checksum for one in found.splits.values()] for name, found in data.items()}
        # As figures name the classes
        config["classes"] = {name: list(found.class_names) for name, found in data.items()}
        if gpus is None:
            config["requests"] = requests(settings, options.tflops, gives_gpus(profile))
            limits = ["--jobs", str(options.jobs)] if options.jobs else []
        else:
            gpus = gpus * options.jobs_per_gpu
            config["gpus"] = ",".join(gpus)
            limits = ["--cores", str(options.jobs or "all"), "--resources", f"gpu={len(gpus)}"]
        sources = "; ".join(f"{name} from {found.source}" for name, found in data.items())
        print(f"preset {settings.preset} on {chosen_device()}; {sources}", flush=True)
        settings.runs.mkdir(parents=True, exist_ok=True)
        # Held until this process ends, however it ends; Snakemake's own lock, left out, would outlive a kill
        with FileLock(lock, timeout=0):
            touch_future_files(settings)
            status = _run_snakemake(settings, config, profile, limits)
    except Timeout:
        told = f"preset {settings.preset} is being reproduced by another process, which holds {lock}, seen from"
        wait = "wait for it, or stop it; if it runs no more, on any machine, remove that file"
        parser.error(f"{told} {platform.node()}: {wait}")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if status == 0:
        print(list_results(settings))
    else:
        # No job outlives the graph: one that says it runs was killed
        print(format_status(settings, datetime.now(UTC), lost_after=0), file=sys.stderr)
        told = f"stopped with status {status}; the same command goes on where this one stopped, and the notebooks, with"
        print(f"{told} a log of each that failed, are in {settings.runs / 'notebooks'}", file=sys.stderr)
    return status


def touch_future_files(settings: Settings) -> None:
    """Give files that are dated in the future the present's date: Snakemake would take all that is made from them for
    older, and fail. Raises ValueError that names one that cannot be touched."""
    code = (ROOT / name for name in ("immunity_lib", "study", "notebooks"))
    for path in (p for one in (*code, settings.runs, settings.figures) for p in one.rglob("*")):
        if path.lstat().st_mtime > time.time():
            try:
                os.utime(path, follow_symlinks=False)
            except OSError as error:
                raise ValueError(f"{path} is dated in the future; touch it") from error
            print(f"{path} was dated in the future, and is dated now", file=sys.stderr)


def list_results(settings: Settings) -> str:
    """Every table and figure of the preset, with its path and what it shows."""
    lines = [f"Tables and figures of preset {settings.preset}:"]
    for sidecar in sorted(settings.figures.glob("*.json")):
        endings = {path.suffix[1:] for path in sidecar.parent.glob(f"{sidecar.stem}.*")} - {"json"}
        with suppress(DamagedFile, KeyError):
            lines.append(f"  {os.path.relpath(sidecar.with_suffix(''))} ({', '.join(sorted(endings))})")
            lines.append(f"      {read_json(sidecar)['caption']}")
    return "\n".join([*lines, f"Executed notebooks: {os.path.relpath(settings.runs / 'notebooks')}"])


def _run_snakemake(settings: Settings, config: dict, profile: Path | None, limits: list[str]) -> int:
    os.environ.pop("SNAKEMAKE_PROFILE", None)  # --profile alone says where the jobs run
    os.environ["XDG_CACHE_HOME"] = str(settings.runs / ".cache")  # which it needs: the user's may be read-only
    from snakemake.cli import main as snakemake

    # A file, since Snakemake would read values on its command line as YAML
    described = settings.runs / "graph.yaml"
    write_atomically(described, yaml.safe_dump(config))
    arguments = [
        "--snakefile", str(ROOT / "Snakefile"), "--directory", str(settings.runs), "--configfile", str(described),
        "--workflow-profile", "none", "--nolock", "--quiet", "rules", "--rerun-triggers", "mtime", "params",
        "--rerun-incomplete", "--keep-incomplete",  # the executed part of a notebook that failed, to read
        *limits, *(("--profile", str(profile)) if profile else ()),
    ]  # fmt: skip
    signals, status = hand_on_signals(), 0
    try:
        snakemake(arguments)
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(bool(ended.code))
    except KeyboardInterrupt:  # before it had begun
        status = 1
    return 128 + signals[0] if signals else status


def hand_on_signals() -> list[int]:
    """From now on, SIGTERM and Ctrl-C end the running jobs of the graph too, those of a cluster by its scheduler; their
    numbers land in the list. Snakemake itself answers SIGTERM by waiting for the jobs that run, which takes hours
    (github.com/snakemake/snakemake/issues/448); Ctrl-C it takes from a terminal, which tells the jobs too."""
    from snakemake.scheduling.job_scheduler import JobScheduler

    signals: list[int] = []

    def stop(number, _) -> None:
        signals.append(number)
        for job in psutil.Process().children():
            with suppress(psutil.NoSuchProcess):
                job.terminate()
        if len(signals) == 1:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, stop)
    JobScheduler.exit_gracefully = staticmethod(stop)  # its handler of SIGTERM
    return signals


if __name__ == "__main__":
    sys.exit(main())
