"""The study as pages for any static host: what `make site` builds, in seconds and without running anything.

A chapter is its notebook's text, equations and folded code, and where a cell saves a table or a figure stands the one
that lies in figures/<preset>/. So the pages agree with figures/ by construction, need neither a kernel nor the
CPU hour of `make reproduce`, and a test holds the committed site against its sources. What cells print besides is
left out. The pages ask nothing of a network: what they show lies beside them.
"""

import ast
import posixpath
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

import api
import jinja2
import nbformat
from PIL import Image
from render import heading, markdown, python

from immunity_lib.files import write_json
from study.graph import parse_options, preset_parser
from study.settings import ROOT, Settings
from study.store import checksum, read_json

HERE = Path(__file__).parent
COPIED = ("png", "csv", "html")  # of the files of a table or figure
TABLES = ("table1", "table2", "table3")
LINK = re.compile(r'<a href="(?![a-z]+:|#)([^"#]*)(#[^"]*)?">(.*?)</a>', re.DOTALL)
IMAGE = re.compile(r'<img src="(?![a-z]+:)([^"]*)" alt="([^"]*)"[^>]*>')
EXPECTED = re.compile(r"^What to expect.*?(?=\n\n|\Z)", re.MULTILINE | re.DOTALL)
Artefact = dict[str, Any]


def placed(cells: Sequence[Mapping], names: Iterable[str]) -> dict[str, int]:
    """Which of a notebook's cells make these tables and figures: those that give the name to a function that saves,
    writes or draws. A name with gaps, as in f"explorer_{view}", stands for all that fit it and stand in no other cell.
    """
    exact, fitting = {}, {}
    for index, cell in enumerate(cells):
        for call in ast.walk(ast.parse(cell["source"] if cell["cell_type"] == "code" else "")):
            function = getattr(call, "func", None)
            called = getattr(function, "attr", getattr(function, "id", ""))
            for given in call.args if re.match("(save|write|draw)_", called) else ():
                if isinstance(given, ast.Constant):
                    exact.setdefault(given.value, index)
                elif isinstance(given, ast.JoinedStr):
                    parts = (re.escape(one.value) if isinstance(one, ast.Constant) else r"\w+" for one in given.values)
                    fitting.setdefault("".join(parts), index)
    fits = {name: at for name in names for pattern, at in fitting.items() if re.fullmatch(pattern, name)}
    return fits | {name: exact[name] for name in names if name in exact}


def artefacts(folder: Path) -> dict[str, Artefact]:
    """The tables and figures in a folder, by name; files of a reader's own beside them are none."""
    found = {}
    for sidecar in sorted(folder.glob("*.json")):
        content, name = read_json(sidecar), sidecar.stem
        if "caption" not in content:
            continue
        text = folder / f"{name}.md"
        rows = [row for row in text.read_text("utf-8").splitlines() if row.startswith("|")] if text.exists() else []
        files = {ending: path for ending in COPIED if (path := folder / f"{name}.{ending}").exists()}
        size = Image.open(files["png"]).size if "png" in files else None
        found[name] = {"name": name, "preset": folder.name, "caption": content["caption"], "files": files, "size": size}
        found[name]["table"] = markdown("\n".join(rows), escape=True)
    return found


class Site:
    """Pages, and what they are built from."""

    def __init__(self, figures: Path, folder: Path, first: str):
        """figures: folder of presets; folder: where the pages go; first: the preset that the front page shows."""
        self.figures, self.folder, self.first = figures, folder, first
        made = {path.name: artefacts(path) for path in figures.iterdir() if path.is_dir()}
        self.made = {name: made[name] for name in sorted(made, key=lambda name: (name != first, name)) if made[name]}
        if first not in self.made:
            told = f"preset {first} has no tables or figures in {figures / first}"
            raise ValueError(f"{told}; `make reproduce PRESET={first}` makes them")
        self.notebooks = {path.stem: nbformat.read(path, 4).cells for path in sorted(ROOT.glob("notebooks/*.ipynb"))}
        self.docs = {path.stem: path.read_text("utf-8") for path in sorted(HERE.glob("*.md"))}
        self.titles = {stem: heading(cells[0].source) for stem, cells in self.notebooks.items()}
        self.titles |= {stem: heading(text) for stem, text in self.docs.items()}
        self.where = {  # by preset, notebook and name: the cell
            preset: {stem: placed(cells, made) for stem, cells in self.notebooks.items()}
            for preset, made in self.made.items()
        }
        loader = jinja2.FileSystemLoader(HERE)
        self.templates = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)

    def sources(self) -> dict[str, str]:
        """Checksums of what the pages are made from, by path in the project."""
        docs = ("*.md", "imports.svg", "site*", "pdoc/*", "api.py", "build_site.py", "render.py")
        own = ["README.md", "notebooks/*.ipynb", *(f"docs/{name}" for name in docs)]
        shown = [f"figures/{name}/*.{ending}" for name in self.made for ending in ("json", "md", *COPIED)]
        paths = {path: root for root, some in ((ROOT, own), (self.figures.parent, shown)) for one in some
                 for path in root.glob(one)}  # fmt: skip
        return {path.relative_to(root).as_posix(): checksum(path) for path, root in sorted(paths.items())}

    @cache  # noqa: B019 - a site is built once
    def pages(self, preset: str) -> dict[str, str]:
        """What of the project is where in the site, as seen from a page of this preset."""
        pages = {"README.md": "index.html", "docs/imports.svg": "docs/imports.svg"}
        pages |= {f"docs/{name}.md": f"docs/{name}.html" for name in self.docs}
        pages |= {f"notebooks/{stem}.ipynb": f"{preset}/{stem}.html" for stem in self.notebooks}
        for name in self.made:
            pages[f"figures/{name}"] = f"{name}/{next(iter(self.notebooks))}.html"
            pages |= {f"figures/{name}/{path.name}": f"{name}/{path.name}" for path in self.files(name)}
            for stem, where in self.where[name].items():
                pages |= {f"figures/{name}/{one}.md": f"{name}/{stem}.html#{one}" for one in where}
        return pages

    def files(self, preset: str) -> list[Path]:
        """Those of its tables and figures that the site shows."""
        return [path for one in self.made[preset].values() for path in one["files"].values()]

    def text(self, source: str, page: str, text: str) -> str:
        """HTML of Markdown from a file of the project, for a page of the site. What is on no page of it is named, and
        is no link."""
        preset = page.partition("/")[0]
        pages = self.pages(preset if preset in self.made else self.first)

        def to(target: str) -> str | None:
            found = pages.get(posixpath.normpath(posixpath.join(posixpath.dirname(source), target)))
            return found and posixpath.relpath(found, posixpath.dirname(page) or ".")

        def linked(match: re.Match) -> str:
            target, part, words = match.groups()
            if found := to(target):
                return f'<a href="{found}{part or ""}">{words}</a>'
            return f'<span title="in the project: {escape(target)}">{words}</span>'

        def drawn(match: re.Match) -> str:  # what it shows, in words, where it is not there
            there = to(match[1])
            return match[0].replace(match[1], there, 1) if there else f"<i>{match[2]}</i>"

        return IMAGE.sub(drawn, LINK.sub(linked, markdown(text)))

    def chapter(self, preset: str, stem: str) -> Iterator[dict[str, Any]]:
        """Its cells in order: text, or code and what it makes."""
        for index, cell in enumerate(self.notebooks[stem]):
            if cell.cell_type == "markdown":
                yield {"text": self.text(f"notebooks/{stem}.ipynb", f"{preset}/{stem}.html", cell.source)}
            else:
                made = [self.made[preset][name] for name, at in self.where[preset][stem].items() if at == index]
                yield {"code": python(cell.source), "lines": cell.source.count("\n") + 1, "made": made}

    def table(self, name: str) -> dict[str, Any] | None:
        """A table of the paper in every preset, and what its chapter tells to expect, right before it draws it."""
        for stem, cells in self.notebooks.items():
            if (at := placed(cells, [name]).get(name)) is not None:
                told = EXPECTED.findall("\n\n".join(cell.source for cell in cells[:at] if cell.cell_type == "markdown"))
                text = self.text(f"notebooks/{stem}.ipynb", "index.html", told[-1]) if told else ""
                made = [made[name] for made in self.made.values() if name in made]
                return {"stem": stem, "text": text, "made": made}

    def write(self, page: str, template: str, **content) -> None:
        path, up = self.folder / page, "../" * page.count("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        html = self.templates.get_template(template).render(site=self, up=up, **content)
        path.write_text(re.sub(r"[ \t]+\n", "\n", html), "utf-8")

    def build(self) -> None:
        """Write all pages."""
        for preset in self.made:
            for stem in self.notebooks:
                content = {"preset": preset, "stem": stem, "cells": self.chapter(preset, stem)}
                self.write(f"{preset}/{stem}.html", "site_chapter.html", **content)
            for path in self.files(preset):
                shutil.copyfile(path, self.folder / preset / path.name)
        for stem, text in self.docs.items():
            html = self.text(f"docs/{stem}.md", f"docs/{stem}.html", text)
            self.write(f"docs/{stem}.html", "site_doc.html", title=self.titles[stem], text=html)
        shutil.copyfile(HERE / "site.css", self.folder / "site.css")
        shutil.copyfile(HERE / "imports.svg", self.folder / "docs/imports.svg")
        api.build(self.folder / "api")
        readme = (ROOT / "README.md").read_text("utf-8")
        found = readme.partition("\n## What was found\n")[2].partition("\n## ")[0]
        drawn = {name for where in self.where.values() for names in where.values() for name in names}
        about = "\n\n".join(readme.split("\n\n")[1:3])
        self.write(
            "index.html", "site_front.html", about=self.text("README.md", "index.html", about),
            found=self.text("README.md", "index.html", found), tables=list(map(self.table, TABLES)),
            others=[one for made in self.made.values() for name, one in made.items() if name not in drawn],
        )  # fmt: skip
        write_json(self.folder / "sources.json", self.sources())


def build_site(settings: Settings) -> Path:
    """Write site/ beside figures/, with this preset first, and return its index; an older site leaves nothing behind.
    Raises ValueError if there is nothing to show, or something else than a site in its place."""
    figures = settings.figures.parent
    site, part = figures.with_name("site"), figures.with_name(".site.part")
    if site.exists() and not (site / "sources.json").exists():
        raise ValueError(f"{site} is no site that was built here; move it away")
    shutil.rmtree(part, ignore_errors=True)
    Site(figures, part, settings.preset).build()
    shutil.rmtree(site, ignore_errors=True)
    part.rename(site)
    return site / "index.html"


def main(arguments: Sequence[str] | None = None) -> None:
    """Build the site; one that cannot be built ends the command with status 2."""
    parser = preset_parser("docs/build_site.py", "The study as plain HTML; --preset: the one on its front page.")
    _, settings = parse_options(parser, arguments)
    try:
        print(f"open {build_site(settings)} in a browser")
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
