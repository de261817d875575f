"""One notebook of the graph, run in batch: what every job of the Snakefile starts.

papermill runs the notebook. Beside that, this takes a free GPU where the machine has several, tells
`make status` how the job stands, hands a scheduler's SIGTERM on to the kernel, which writes a
checkpoint, and ends when the graph that started it has been killed.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

from immunity_lib.command_line import make_paths_absolute
from immunity_lib.gpus import taken_gpus
from immunity_lib.job_state import JobState
from immunity_lib.settings import ROOT, load_preset
from immunity_lib.stopping import STOPPED

LOOK_AT_PARENT = 1.0  # seconds

# The same whoever starts the job: a sum's last bits depend on the number of threads.
# One thread each: models that train beside each other use the cores better than one with several.
# The allocator keeps its memory instead of handing it back after every layer.
KERNEL_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": str(4 * 2**30),
    "MALLOC_TRIM_THRESHOLD_": str(8 * 2**30),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a notebook; returns 0, 1 where a cell failed, 2 for wrong options, 143 where it was asked
    to stop."""
    options = _parser().parse_args(arguments)
    make_paths_absolute(options)
    try:
        settings = load_preset(
            options.preset, data_folder=options.data, output_folder=options.output
        )
        _check_names(options.notebook, options.model)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    job = f"{options.notebook}-{options.model}" if options.model else options.notebook
    executed = settings.runs / "notebooks" / f"{job}.ipynb"
    executed.parent.mkdir(parents=True, exist_ok=True)
    log = executed.with_suffix(".log")
    shown = _only_prints_are_shown(log)
    state = JobState(settings, job)
    parameters = {
        "preset": options.preset, "data_folder": options.data, "output_folder": options.output,
        "interactive": False, "pretrained": False,
    }  # fmt: skip
    if options.model:
        parameters |= {"model": options.model, "processes": options.processes}
    os.environ |= KERNEL_ENVIRONMENT
    with ExitStack() as held:
        if options.gpus:
            gpus = held.enter_context(taken_gpus(options.gpus, options.processes, settings.runs))
            os.environ["CUDA_VISIBLE_DEVICES"] = gpus
        held.enter_context(state.kept_fresh())
        failure, stopped = _run(options.notebook, executed, parameters, shown)
    if failure and not stopped:
        print(f"{job} failed: {failure} (see {log})", file=shown)
    state.end("stopped" if stopped else "failed" if failure else "done", failure)
    return STOPPED if stopped else int(bool(failure))


def _run(notebook: str, executed: Path, parameters: dict, shown) -> tuple[str, bool]:
    """What went wrong, in a line, empty if nothing did; and whether it was asked to stop.

    In a thread of its own, since papermill dies of SIGTERM, and its kernel does within two seconds
    of it: here the main thread hands the signal on and waits, so that a training can write its
    checkpoint.
    """
    failures: list[str] = []
    stop = threading.Event()

    def run() -> None:
        import papermill  # costs a second
        from traitlets.config import Config

        try:
            with TemporaryDirectory(prefix="immunity-") as sockets:
                # Not TCP: kernels that start beside each other may pick the same free port
                transport = {"transport": "ipc", "ip": f"{sockets}/kernel"}
                papermill.execute_notebook(
                    ROOT / "notebooks" / f"{notebook}.ipynb", executed, parameters,
                    kernel_name="python3", cwd=ROOT, progress_bar=False, stdout_file=shown,
                    config=Config({"AsyncKernelManager": transport}),
                )  # fmt: skip
        except Exception as error:  # of the notebook or its kernel: all of it is in the log
            traceback.print_exc()
            failures.append(str(error).strip().splitlines()[-1] if str(error) else repr(error))

    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    thread = threading.Thread(target=run)
    thread.start()
    parent, told = os.getppid(), False
    while thread.is_alive():
        if os.getppid() != parent:
            stop.set()
        if stop.is_set() and not told:
            told = True
            for process in psutil.Process().children(recursive=True):
                process.terminate()
        thread.join(LOOK_AT_PARENT)
    return failures[0] if failures else "", stop.is_set()


def _check_names(notebook: str, model: str) -> None:
    """They become a file's name; whether the preset has the model, the notebook says."""
    known = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
    if notebook not in known:
        raise ValueError(f"unknown notebook {notebook!r}; valid names: {', '.join(known)}")
    if not re.fullmatch("[a-z0-9.-]*", model):
        raise ValueError(f"{model!r} is no model's name")


def _only_prints_are_shown(log: Path):
    """Send what this process and its kernel say to the log, and return where their notebook's own
    prints go: to where all of it went before."""
    shown = os.fdopen(os.dup(2), "w", buffering=1)
    with open(log, "w") as file:
        for said in (1, 2):
            os.dup2(file.fileno(), said)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return shown


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m immunity_lib.batch", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("notebook", help="a file of notebooks/, without its ending")
    parser.add_argument("--preset", required=True, help="name of a preset, or path of a YAML file")
    parser.add_argument("--model", default="", help="one model of the preset; default: all")
    parser.add_argument("--data", default="", help="folder of the images")
    parser.add_argument("--output", default="", help="where runs/ and figures/ go")
    parser.add_argument("--gpus", default="", help="GPUs to choose from, as in 0,1,2,3")
    parser.add_argument("--processes", type=int, default=1, help="GPUs that the job takes")
    return parser


if __name__ == "__main__":
    sys.exit(main())
