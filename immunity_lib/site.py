"""Everything a preset has made, as plain HTML to read and to hand on: what `make site` builds.

Executed notebooks, figures, tables and the stepper lie in one folder, with an index. The pages ask
nothing of a network: equations are MathML, which browsers draw by themselves, and no script is
loaded from elsewhere.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import jinja2
from latex2mathml.converter import convert
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from tqdm import tqdm
from traitlets import Unicode

from immunity_lib.command_line import preset_parser
from immunity_lib.records import read_record, write_atomically
from immunity_lib.settings import ROOT, Settings, load_preset

TAG = re.compile(r"\\tag\{(.*?)\}")

# Of nbconvert's page, without the scripts that it would load from elsewhere
PAGE = """{% extends 'lab/index.html.j2' %}
{% block html_head_js_requirejs %}{% endblock %}
{% block html_head_js_mathjax %}
<style>
.equation { display: flex; align-items: center; justify-content: center; margin: 1em 0; }
.equation math { flex: 1; }
body { max-width: 1100px; margin: auto; }
</style>
{% endblock %}
{% block html_head_js_mermaidjs %}{% endblock %}
{% block body_header %}{{ super() }}<p><a href="../index.html">All notebooks and figures</a></p>
{% endblock %}
"""


class _MathMLRenderer(IPythonRenderer):
    """Markdown with its equations as MathML."""

    def block_math(self, body: str) -> str:
        equation = convert(TAG.sub("", body).strip(), display="block")
        number = TAG.search(body)
        said = f"<span>({number[1]})</span>" if number else ""
        return f'<div class="equation">{equation}{said}</div>'

    def inline_math(self, body: str) -> str:
        return convert(body.strip())


class _PageExporter(HTMLExporter):
    """Notebooks as pages that need no network."""

    raw_template = Unicode(PAGE).tag(config=True)

    def markdown2html(self, source: str) -> str:
        renderer = _MathMLRenderer(escape=False, anchor_link_text=self.anchor_link_text)
        return MarkdownWithMath(renderer=renderer).render(source)

    def default_filters(self):
        yield from super().default_filters()
        yield "markdown2html", self.markdown2html


def build(settings: Settings) -> Path:
    """Write runs/<preset>/site/ and return its index. Raises ValueError if nothing was run yet."""
    executed = sorted((settings.runs / "notebooks").glob("*.ipynb"))
    if not executed:
        raise ValueError(
            f"preset {settings.preset} has no executed notebooks; "
            f"`make reproduce PRESET={settings.preset}` makes them"
        )
    site = settings.runs / "site"
    shutil.rmtree(site, ignore_errors=True)
    exporter = _PageExporter()
    pages = [path.stem for path in executed]
    for path in tqdm(executed, "notebooks"):
        try:
            page, _ = exporter.from_filename(str(path))
        except ValueError as error:
            raise ValueError(
                f"{path} is no whole notebook ({error}); `make reproduce` makes it anew"
            ) from error
        write_atomically(site / "notebooks" / f"{path.stem}.html", _linked(page, pages))
    shutil.copytree(settings.figures, site / "figures", ignore=shutil.ignore_patterns("records"))
    chapters = {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")}
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("immunity_lib", "."), autoescape=True
    )
    index = environment.get_template("site.html").render(
        preset=settings.preset,
        chapters=[page for page in pages if page in chapters],
        others=[page for page in pages if page not in chapters],
        artefacts=[_artefact(exporter, sidecar) for sidecar in sorted(site.glob("figures/*.json"))],
        stepper=(site / "figures" / "stepper.html").exists(),
    )
    write_atomically(site / "index.html", index)
    return site / "index.html"


def _linked(page: str, pages: Sequence[str]) -> str:
    """Links from notebook to notebook as links from page to page. Of a notebook that runs once for
    each model, and not by itself, the first page is taken."""

    def to_page(link: re.Match) -> str:
        name = link[1]
        found = [one for one in pages if one.startswith(f"{name}-")]
        if name in pages:
            found = [name]
        return f'href="{found[0]}.html"' if found else link[0]

    return re.sub(r'href="([^"/]+)\.ipynb"', to_page, page)


def _artefact(exporter: _PageExporter, sidecar: Path) -> dict:
    """What the index shows of a table or figure."""
    name, table = sidecar.stem, sidecar.with_suffix(".md")
    rows = table.read_text().splitlines() if table.exists() else []
    return {
        "name": name,
        "caption": read_record(sidecar)["caption"],
        "files": sorted(path.name for path in sidecar.parent.glob(f"{name}.*")),
        "picture": sidecar.with_suffix(".png").exists(),
        "table": exporter.markdown2html("\n".join(row for row in rows if row.startswith("|"))),
    }


def main(arguments: list[str] | None = None) -> int:
    """Build the site of a preset; returns the exit status."""
    options = preset_parser("site", __doc__).parse_args(arguments)
    try:
        settings = load_preset(
            options.preset, data_folder=options.data, output_folder=options.output
        )
        index = build(settings)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"open {index} in a browser")
    return 0


if __name__ == "__main__":
    sys.exit(main())
