"""The library's own pages, made from its docstrings: `python docs/api.py FOLDER`.

They ask nothing of a network: what styles and searches them lies in them and beside them."""

import pkgutil
from argparse import ArgumentParser
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from unittest.mock import patch

import pdoc

import immunity_lib

MODULES = ["immunity_lib", *(one.name for one in pkgutil.walk_packages(immunity_lib.__path__, "immunity_lib."))]


def build(folder: Path) -> Path:
    """Write a page for each module of `immunity_lib` into a folder, and return the first one."""
    # The two would load scripts; the source, which is beside the pages, would make them three times as large
    pdoc.render.configure(docformat="markdown", math=False, mermaid=False, show_source=False)
    with ExitStack() as afterwards:
        for name in immunity_lib.__all__:  # loaded when asked for, and pdoc does not ask
            afterwards.enter_context(patch.object(immunity_lib, name, getattr(immunity_lib, name), create=True))
        for package in (import_module(name) for name in MODULES):
            if hasattr(package, "__path__"):  # else its page would list no modules but those in __all__
                below = [name.rpartition(".")[2] for name in MODULES if name.rpartition(".")[0] == package.__name__]
                afterwards.enter_context(patch.object(package, "__all__", [*package.__all__, *below]))
        pdoc.pdoc("immunity_lib", output_directory=folder)
    return folder / "immunity_lib.html"


if __name__ == "__main__":
    parser = ArgumentParser(prog="python docs/api.py", description="The library's pages, made from its docstrings.")
    parser.add_argument("folder", type=Path, help="where they go")
    print(f"open {build(parser.parse_args().folder)} in a browser")
