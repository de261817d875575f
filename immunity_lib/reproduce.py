"""One command from a preset to its tables and figures: what `make reproduce` runs.

Checks the preset, the data and the files of earlier runs before anything is computed, lets
Snakemake make what is missing, and ends with a list of what there is and what it shows. Killed at
any moment, the same command goes on.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from filelock import FileLock, Timeout

from immunity_lib.records import DamagedFile, read_record, read_tensors, set_aside
from immunity_lib.settings import ROOT, Settings, load_preset, preset_names


def main(arguments: list[str] | None = None) -> int:
    """Run the graph of a preset; returns the exit status."""
    options = _parser().parse_args(arguments)
    preset = options.preset
    if preset not in preset_names() and Path(preset).is_file():
        preset = os.path.abspath(preset)  # notebooks run elsewhere than here
    try:
        settings = load_preset(
            preset,
            data_folder=os.path.abspath(options.data) if options.data else "",
            output_folder=os.path.abspath(options.output) if options.output else "",
        )
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
            set_aside_damaged(settings.runs)
            status = _run_graph(settings, preset, options.jobs)
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
        print(
            f"stopped with status {status}; the same command goes on where this one stopped, and "
            f"the notebook that failed is in {settings.runs / 'notebooks'}",
            file=sys.stderr,
        )
    return status


def set_aside_damaged(runs: Path) -> None:
    """Rename every record and weights file that is truncated or altered; it is made again."""
    readers = {"*.json": read_record, "*.safetensors": read_tensors}
    for pattern, read in readers.items():
        for path in sorted(runs.rglob(pattern)):
            try:
                read(path)
            except DamagedFile as error:
                set_aside(path, f"{error}; it is made anew")


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


def _run_graph(settings: Settings, preset: str, jobs: int | None) -> int:
    from snakemake.cli import main as snakemake

    arguments = [
        "--snakefile", str(ROOT / "Snakefile"),
        "--cores", str(jobs or "all"),
        "--nolock",
        "--rerun-incomplete",
        "--rerun-triggers", "mtime", "params",
        "--keep-incomplete",  # the executed part of a notebook that failed, to read
        "--quiet", "rules",
        "--show-failed-logs",
        "--config", f"preset={preset}", f"data_folder={settings.data_folder}",
        f"output_folder={settings.output_folder}",
    ]  # fmt: skip
    try:
        snakemake(arguments)
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(bool(ended.code))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m immunity_lib.reproduce",
        description="Make every table and figure of a preset, or what of it is missing.",
    )
    parser.add_argument(
        "--preset",
        default="demo",
        help=f"one of {', '.join(preset_names())}, or the path of a YAML file (default: demo)",
    )
    parser.add_argument(
        "--data", default="", help="folder of CIFAR (default: data/) or of your own images"
    )
    parser.add_argument("--output", default="", help="where runs/ and figures/ go")
    parser.add_argument("--jobs", type=int, help="notebooks beside each other (default: all cores)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
