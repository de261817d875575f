"""What the commands of the project have in common: they are about a preset."""

import argparse
import os
from pathlib import Path

from immunity_lib.settings import preset_names


def preset_parser(
    command: str, description: str, *, default: str = "demo", output: bool = True
) -> argparse.ArgumentParser:
    """A parser of `python -m immunity_lib.<command>` with --preset, --data and, unless the command
    neither reads nor writes results, --output."""
    parser = argparse.ArgumentParser(
        prog=f"python -m immunity_lib.{command}", description=description
    )
    parser.add_argument(
        "--preset",
        default=default,
        help=f"one of {', '.join(preset_names())}, or the path of a YAML file (default: {default})",
    )
    parser.add_argument(
        "--data", default="", help="folder of CIFAR (default: data/) or of your own images"
    )
    if output:
        parser.add_argument(
            "--output", default="", help="where runs/ and figures/ are (default: the project)"
        )
    return parser


def make_paths_absolute(options: argparse.Namespace) -> None:
    """Of the preset's file, --data and --output: kernels are started elsewhere than the command."""
    if options.preset not in preset_names() and Path(options.preset).is_file():
        options.preset = os.path.abspath(options.preset)
    for folder in ("data", "output"):
        if getattr(options, folder):
            setattr(options, folder, os.path.abspath(getattr(options, folder)))
