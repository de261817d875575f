"""One command from a preset to its tables and figures: what `make reproduce` runs.

Checks the preset, the data and the files of earlier runs before anything is computed, lets
Snakemake make what is missing, and ends with a list of what there is and what it shows. Killed at
any moment, the same command goes on.

On a machine with several GPUs, each job takes one of its own; with the profile of a cluster,
Snakemake submits every job to its scheduler (profiles/).
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from datetime import UTC, datetime
from pathlib import Path

import yaml
from filelock import FileLock, Timeout

from immunity_lib.cluster import profile_folder, requests, submits
from immunity_lib.command_line import make_paths_absolute, preset_parser
from immunity_lib.damage import set_aside_damaged
from immunity_lib.gpus import check_enough
from immunity_lib.plan import ASSUMED_TFLOPS
from immunity_lib.records import read_record, write_atomically
from immunity_lib.settings import ROOT, Settings, load_preset
from immunity_lib.status import printed_status
from immunity_lib.stopping import STOPPED, sigterm_handed_on


def main(arguments: list[str] | None = None) -> int:
    """Run the graph of a preset; returns the exit status."""
    options = _parser().parse_args(arguments)
    # A container's first process is not ended by a signal that it does not handle
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(STOPPED))
    make_paths_absolute(options)
    try:
        for option in ("jobs", "processes", "tflops"):
            value = getattr(options, option)
            if value is not None and not value > 0:
                raise ValueError(f"--{option} is {value}; it must be above 0")
        settings = load_preset(
            options.preset,
            data_folder=options.data,
            output_folder=options.output,
            processes=options.processes,
        )
        if set(settings.output_folder) & set("{}"):
            raise ValueError(
                f"output folder {settings.output_folder!r} has a brace in its name, which stands "
                "for a wildcard in the graph; choose another"
            )
        if options.profile:
            options.profile = str(profile_folder(options.profile))
        config = {
            "preset": options.preset,
            "data_folder": settings.data_folder,
            "output_folder": settings.output_folder,
            "processes": settings.processes,
            **_placement(settings, options),
        }
        from immunity_lib.models import chosen_device, dataset_of

        # Downloads them once, before models train beside each other
        data = [dataset_of(settings, name) for name in settings.datasets]
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    sources = "; ".join(f"{dataset.name} from {dataset.source}" for dataset in data)
    print(f"preset {settings.preset} on {chosen_device()}; {sources}")
    settings.runs.mkdir(parents=True, exist_ok=True)
    try:
        # Held until this process ends, however it ends: so Snakemake's own lock, which a kill
        # would leave behind, is not needed
        with FileLock(settings.runs / ".lock", timeout=0):
            set_aside_damaged(settings)
            status = _run_graph(settings, config, options)
    except Timeout:
        print(
            f"error: preset {settings.preset} is being reproduced by another process; "
            "wait for it, or stop it",
            file=sys.stderr,
        )
        return 2
    if status == 0:
        print(listing(settings))
    else:
        # No job outlives the graph: one that says it runs was killed
        print(
            f"{printed_status(settings, datetime.now(UTC), lost_after=0)}\n"
            f"stopped with status {status}; the same command goes on where this one stopped, and "
            f"the notebook that failed is in {settings.runs / 'notebooks'}",
            file=sys.stderr,
        )
    return status


def listing(settings: Settings) -> str:
    """Every table and figure of the preset, with its path and what it shows."""
    lines = [f"Tables and figures of preset {settings.preset}:"]
    for sidecar in sorted(settings.figures.glob("*.json")):
        files = sorted(
            path for path in sidecar.parent.glob(f"{sidecar.stem}.*") if path.suffix != ".json"
        )
        shown = Path(os.path.relpath(files[0])) if files else sidecar
        endings = ", ".join(path.suffix[1:] for path in files)
        lines.append(f"  {shown.with_suffix('')} ({endings})")
        lines.append(f"      {read_record(sidecar)['caption']}")
    lines.append(f"Executed notebooks: {os.path.relpath(settings.runs / 'notebooks')}")
    return "\n".join(lines)


def _placement(settings: Settings, options: argparse.Namespace) -> dict:
    """Where the jobs run: on "gpus" of this machine, or where a cluster's scheduler puts them, by
    their "requests"."""
    from torch.cuda import device_count

    if options.profile and submits(Path(options.profile)):
        return {"gpus": "", "requests": requests(settings, options.tflops)}
    gpus = device_count()
    check_enough(gpus, settings.processes)
    return {"gpus": ",".join(map(str, range(gpus)))}


def _run_graph(settings: Settings, config: dict, options: argparse.Namespace) -> int:
    from snakemake.cli import main as snakemake

    # A file, since Snakemake would read values on its command line as YAML
    described = settings.runs / "graph.yaml"
    write_atomically(described, yaml.safe_dump(config))
    arguments = [
        "--snakefile", str(ROOT / "Snakefile"),
        "--directory", str(settings.runs),
        "--configfile", str(described),
        "--nolock",
        "--rerun-incomplete",
        "--rerun-triggers", "mtime", "params",
        "--keep-incomplete",  # the executed part of a notebook that failed, to read
        "--quiet", "rules",
    ]  # fmt: skip
    if options.profile:
        arguments += ["--profile", options.profile]
    if "requests" not in config:
        gpus = len(config["gpus"].split(",")) if config["gpus"] else 0
        arguments += ["--cores", str(options.jobs or "all"), "--resources", f"gpu={gpus}"]
    elif options.jobs:
        arguments += ["--jobs", str(options.jobs)]
    with sigterm_handed_on(cluster="requests" in config) as stopped:
        try:
            snakemake(arguments)
            status = 0
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else int(bool(ended.code))
    return STOPPED if stopped.is_set() else status


def _parser() -> argparse.ArgumentParser:
    parser = preset_parser(
        "reproduce", "Make every table and figure of a preset, or what of it is missing."
    )
    parser.add_argument("--jobs", type=int, help="notebooks beside each other (default: all cores)")
    parser.add_argument(
        "--processes", type=int, help="GPUs that train one model together (default: 1)"
    )
    parser.add_argument(
        "--profile", default="", help="a folder of profiles/, as slurm, or the path of your own"
    )
    parser.add_argument(
        "--tflops",
        type=float,
        default=ASSUMED_TFLOPS,
        help="sustained speed of a cluster's GPU, by which a job's time limit is reckoned "
        f"(default: {ASSUMED_TFLOPS:g} TFLOP/s)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
