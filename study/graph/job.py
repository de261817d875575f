"""One notebook of the graph, run in batch: what every job of the Snakefile starts.

Beside papermill, which runs it, this gives it an interpreter and surroundings of its own, takes a free GPU of several,
tells `make status` how the job stands, stops the kernel on SIGTERM and Ctrl-C, and ends when the graph that started it
has been killed. A training that was stopped goes on from its last epoch."""

import itertools
import logging
import os
import platform
import signal
import sys
import tempfile
import time
import traceback
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext, suppress
from datetime import UTC, datetime
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from immunity_lib.files import write_atomically, write_json
from study.catalogue import ModelName
from study.graph import parse_options, preset_parser
from study.settings import ROOT

NOTEBOOKS = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
LOOK_AGAIN, REFRESHED = 1, 20  # seconds between two looks, and between two signs of life
ALLOCATIONS = "SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "JOB_ID"  # variables that name a scheduler's allocation
LONGEST_FOLDER = 60  # characters, of a kernel's sockets: their paths have 107 at most

# The same whoever starts the job, and whatever the shell says of Python, PyTorch's libraries and matplotlib: a sum's
# last bits depend on the number of threads, and tests in a notebook are `assert`.
# One thread each: models that train beside each other use the cores better than one with several. The allocator keeps
# its memory, 4 and 8 GiB, instead of handing it back after every layer.
SURROUNDINGS = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "PYTHONUTF8"), "1")
SURROUNDINGS |= dict.fromkeys(("PYTHONPATH", "PYTHONOPTIMIZE", "PYTHONWARNINGS", "MPLBACKEND"), "")
SURROUNDINGS |= {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**33)}
SURROUNDINGS["ONEDNN_DEFAULT_FPMATH_MODE"] = "STRICT"  # float32 in every digit


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a notebook; returns 0, 1 where a cell failed, 143 or 130 where it was asked to stop."""
    parent, started = os.getppid(), datetime.now(UTC)
    parser = preset_parser("-m study.graph.job", "One notebook of the graph, run in batch.")
    parser.add_argument("notebook", choices=NOTEBOOKS)
    parser.add_argument("--model", type=_model_name, help="one of the preset; default: all")
    parser.add_argument("--gpus", default="", help="GPUs to choose one from, as in 0,1,2,3")
    parser.add_argument("--pretrained", action="store_true", help="what is in pretrained/ counts as done")
    options, settings = parse_options(parser, arguments)
    job = f"{options.notebook}-{options.model}" if options.model else options.notebook
    executed, log = (settings.runs / "notebooks" / f"{job}.{ending}" for ending in ("ipynb", "log"))
    parameters = {"preset": options.preset, **settings.model_dump(include={"data_folder", "output_folder"})}
    parameters |= {"model": str(options.model or ""), "interactive": False, "pretrained": options.pretrained}

    def report(state: str, error: str = "") -> None:
        """Say how the job stands, where other machines can read it too; times are in UTC."""
        now = datetime.now(UTC)
        content = {"state": state, "error": error, "machine": platform.node(), "process": os.getpid()}
        content |= {"gpu": os.environ.get("CUDA_VISIBLE_DEVICES", ""), "started": started.isoformat()}
        content |= {"seen": now.isoformat(), "seconds": (now - started).total_seconds()}
        with suppress(OSError):  # on a full disk, it is the job itself that must say so
            write_json(settings.runs / "jobs" / f"{job}.json", content)

    executed.parent.mkdir(parents=True, exist_ok=True)
    shown = _show_only_prints(log)
    with free_gpu(options.gpus) if options.gpus else nullcontext() as gpu:
        os.environ |= SURROUNDINGS | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu})
        failure, stop = _run(options.notebook, executed, parameters, shown, report, parent)
    if failure and not stop:
        print(f"{job} failed: {failure} (see {log})", file=shown)
    report("stopped" if stop else "failed" if failure else "done", failure)
    return 128 + stop if stop else int(bool(failure))


def _model_name(text: str) -> ModelName:
    try:
        return ModelName.parse(text)
    except ValueError as error:  # of which argparse would tell nothing
        raise ArgumentTypeError(f"invalid name: {error}") from None


def _run(notebook, executed, parameters, shown, report: Callable, parent: int) -> tuple[str, int]:
    """What went wrong, in a line, empty if nothing did; and the signal that asked to stop, or 0.
    papermill hands no signal on to its kernel (github.com/nteract/papermill/issues/508). It runs in a thread, where it
    hears of none; the main thread stops the kernel, and with that papermill."""
    failure, signals = "", []

    def execute() -> None:
        import papermill  # costs a second
        from traitlets.config import Config

        with own_kernel() as sockets:
            # Not TCP: kernels that start beside each other may pick the same free port
            config = Config({"AsyncKernelManager": {"transport": "ipc", "ip": f"{sockets}/kernel"}})
            papermill.execute_notebook(
                ROOT / "notebooks" / f"{notebook}.ipynb", executed, parameters, kernel_name="python3", cwd=ROOT,
                progress_bar=False, stdout_file=shown, config=config,
            )  # fmt: skip

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _: signals.append(received))
    running = ThreadPoolExecutor(1).submit(execute)
    for look in itertools.takewhile(lambda _: not running.done(), itertools.count()):
        if os.getppid() != parent:
            signals.append(signal.SIGTERM)
        for process in psutil.Process().children(recursive=True) if signals else ():
            with suppress(psutil.NoSuchProcess):
                process.terminate()
        if look % (REFRESHED // LOOK_AGAIN) == 0:
            report("running")
        wait([running], LOOK_AGAIN)
    if error := running.exception():  # of the notebook or its kernel: all of it is in the log
        traceback.print_exception(error)
        lines = str(getattr(error, "evalue", error)).strip().splitlines()
        failure = ": ".join([getattr(error, "ename", type(error).__name__), *lines[:1]])
    return failure, signals[0] if signals else 0


@contextmanager
def own_kernel() -> Iterator[str]:
    """Within it, the kernel "python3" is this interpreter, whatever other one is installed under that name, and reads
    none of the user's start-up files and settings; gives a folder for its sockets."""
    folder = None if len(tempfile.gettempdir()) <= LONGEST_FOLDER else "/tmp"
    with tempfile.TemporaryDirectory(prefix="immunity-", dir=folder) as own:
        command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        kernel = {"argv": command, "display_name": "Python 3", "language": "python"}
        write_json(Path(own, "kernels/python3/kernel.json"), kernel)
        places = dict.fromkeys(("JUPYTER_PATH", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR"), own)
        write_atomically(Path(own, "matplotlibrc"), "")  # one that is not there would be the user's own
        os.environ |= places | {"MATPLOTLIBRC": own}
        yield own


@contextmanager
def free_gpu(gpus: str) -> Iterator[str]:
    """Wait for one of the GPUs "0,1,2,...", numbers or UUIDs, each named once for every job it has room for, that no
    other job of this user holds on this machine (of a scheduler: in this allocation), and hold it, by a lock that ends
    with the job; gives its name as CUDA_VISIBLE_DEVICES takes it. Snakemake counts GPUs but tells no job which is its
    own (github.com/snakemake/snakemake/issues/281)."""
    # Two allocations of one node may each call their own GPU 0
    allocation = next(filter(None, map(os.environ.get, ALLOCATIONS)), "")
    folder = Path(tempfile.gettempdir(), f"immunity-gpus-{os.getuid()}{allocation}")
    folder.mkdir(mode=0o700, exist_ok=True)
    names = gpus.split(",")
    for look in itertools.count():
        for place, gpu in enumerate(names):
            with suppress(Timeout), FileLock(folder / f"{gpu}.{names[:place].count(gpu)}.lock", timeout=0):
                yield gpu
                return
        if look == 0:
            print(f"waits until another job leaves one of the GPUs {gpus}", file=sys.stderr, flush=True)
        time.sleep(LOOK_AGAIN)


def _show_only_prints(log: Path):
    """Send what this process and its kernel say to the log; returns where it went before, for a notebook's prints."""
    shown = os.fdopen(os.dup(2), "w", buffering=1)
    with open(log, "w") as file:
        for output in (1, 2):
            os.dup2(file.fileno(), output)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return shown


if __name__ == "__main__":
    sys.exit(main())
