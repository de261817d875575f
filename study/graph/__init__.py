"""The graph of the study as commands: `run` makes a preset's tables and figures, each by a `job`; `status` says how
far it is, and `plan` what it costs. What they share is about a preset."""

import os
import shlex
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from study.settings import Settings, load_preset, preset_names


def preset_parser(command: str, description: str) -> ArgumentParser:
    """A parser of `python <command>` with --preset, --data and --output."""
    parser = ArgumentParser(prog=f"python {command}", description=description)
    told = f"one of {', '.join(preset_names())}, or the path of a YAML file (default: demo)"
    parser.add_argument("--preset", default="demo", help=told)
    parser.add_argument("--data", default="", help="folder of CIFAR (default: data/) or of your own images")
    parser.add_argument("--output", default="", help="where runs/ and figures/ are (default: the project)")
    return parser


def parse_options(parser: ArgumentParser, arguments: Sequence[str] | None = None) -> tuple[Namespace, Settings]:
    """The options and the settings of their preset."""
    options = parser.parse_args(arguments)
    if options.preset not in preset_names() and os.path.isfile(options.preset):
        options.preset = os.path.abspath(options.preset)
    with refusing(parser):
        for name in ("jobs", "jobs_per_gpu", "tflops"):
            if (number := getattr(options, name, None)) is not None and not number > 0:
                raise ValueError(f"--{name.replace('_', '-')} is {number}; it must be above 0")
        changes = {"data_folder": options.data, "output_folder": options.output}
        if "pretrained" in options:
            changes["pretrained"] = options.pretrained
        settings = load_preset(options.preset, **changes)
    return options, settings


@contextmanager
def refusing(parser: ArgumentParser) -> Iterator[None]:
    """What cannot be used within it ends the command in words, with status 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        parser.error(str(error))


def job_command(notebook: str, preset: str | Path, settings: Settings, **further: object) -> str:
    """The shell command that runs one notebook of a preset, by its name or path, as the graph does. further: options of
    `job` that have values."""
    given = {"preset": preset, "data": settings.data_folder, "output": settings.output_folder, **further}
    options = [f"--{option}={value}" for option, value in given.items() if value]
    return shlex.join([sys.executable, "-m", "study.graph.job", notebook, *options])
