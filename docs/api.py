"""The library's own pages, made from its docstrings: `python docs/api.py FOLDER`.

They ask nothing of a network: what styles and searches them lies in them and beside them."""

import pkgutil
import re
from argparse import ArgumentParser
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from unittest.mock import patch

import pdoc

import immunity_lib

HERE = Path(__file__).parent
MODULES = ["immunity_lib", *(one.name for one in pkgutil.walk_packages(immunity_lib.__path__, "immunity_lib."))]


def reachable(page: str) -> str:
    """A page of pdoc's whose links all have a name, and on which keys, too, unfold what is folded."""
    page = re.sub(r'<a class="headerlink" href="#([^"]*)"', r'\g<0> aria-label="link to \1"', page)
    return re.sub('(<input [^>]*type="checkbox") aria-hidden="true" tabindex="-1"', r'\1 aria-label="show more"', page)


def build(folder: Path) -> Path:
    """Write a page for each module of `immunity_lib` into a folder, and return the first one."""
    # The two would load scripts; the source, which is beside the pages, would make them three times as large
    pdoc.render.configure(
        docformat="markdown", math=False, mermaid=False, show_source=False, template_directory=HERE / "pdoc"
    )
    with ExitStack() as afterwards:
        for name in immunity_lib.__all__:  # loaded when asked for, and pdoc does not ask
            afterwards.enter_context(patch.object(immunity_lib, name, getattr(immunity_lib, name), create=True))
        for package in (import_module(name) for name in MODULES):
            if hasattr(package, "__path__"):  # else its page would list no modules but those in __all__
                below = [name.rpartition(".")[2] for name in MODULES if name.rpartition(".")[0] == package.__name__]
                afterwards.enter_context(patch.object(package, "__all__", [*package.__all__, *below]))
        pdoc.pdoc("immunity_lib", output_directory=folder)
    for page in folder.rglob("*.html"):
        page.write_text(reachable(page.read_text("utf-8")), "utf-8")
    return folder / "immunity_lib.html"


if __name__ == "__main__":
    parser = ArgumentParser(prog="python docs/api.py", description="The library's pages, made from its docstrings.")
    parser.add_argument("folder", type=Path, help="where they go")
    print(f"open {build(parser.parse_args().folder)} in a browser")
