"""Everything a preset has made, as plain HTML to read and to hand on: what `make site` builds.

Executed notebooks, figures, tables and the stepper lie in one folder, with an index. The pages ask nothing of a
network: equations are MathML, which browsers draw by themselves, and no script is loaded from elsewhere.
"""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import jinja2
from latex2mathml.converter import convert
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from tqdm import tqdm
from traitlets import Unicode

from immunity_lib.files import write_atomically
from study.graph import parse_options, preset_parser
from study.settings import ROOT, Settings
from study.store import read_json

TAG = re.compile(r"\\tag\{(.*?)\}")

# Of nbconvert's page, without the scripts that it would load from elsewhere
PAGE = """{% extends 'lab/index.html.j2' %}
{% block html_head_js_requirejs %}{% endblock %}
{% block html_head_js_mathjax %}<style>
.equation { display: flex; align-items: center; justify-content: center; margin: 1em 0; }
.equation math { flex: 1; }
body { max-width: 1100px; margin: auto; }
</style>{% endblock %}
{% block html_head_js_mermaidjs %}{% endblock %}
{% block body_header %}{{ super() }}<p><a href="../index.html">All notebooks and figures</a></p>
{% endblock %}
"""


class _MathMLRenderer(IPythonRenderer):
    """Markdown with its equations as MathML."""

    def block_math(self, body: str) -> str:
        number = TAG.search(body)
        label = f"<span>({number[1]})</span>" if number else ""
        equation = convert(TAG.sub("", body).strip(), display="block")
        return f'<div class="equation">{equation}{label}</div>'

    def inline_math(self, body: str) -> str:
        return convert(body.strip())


class _PageExporter(HTMLExporter):
    """Notebooks as pages that need no network."""

    raw_template = Unicode(PAGE).tag(config=True)

    @jinja2.pass_context
    def markdown2html(self, context, source: str) -> str:
        renderer = _MathMLRenderer(escape=False, anchor_link_text=self.anchor_link_text)
        return MarkdownWithMath(renderer=renderer).render(source)


def build_site(settings: Settings) -> Path:
    """Write runs/<preset>/site/ and return its index. Raises ValueError if nothing was run yet."""
    executed = sorted((settings.runs / "notebooks").glob("*.ipynb"))
    if not executed:
        raise ValueError(
            f"preset {settings.preset} has no executed notebooks; `make reproduce PRESET={settings.preset}` makes them"
        )
    site, exporter = settings.runs / "site", _PageExporter()
    shutil.rmtree(site, ignore_errors=True)
    pages = [path.stem for path in executed]
    for path in tqdm(executed, "notebooks"):
        try:
            page, _ = exporter.from_filename(str(path))
        except ValueError as error:
            raise ValueError(f"{path} is no whole notebook ({error}); `make reproduce` makes it anew") from error
        write_atomically(site / "notebooks" / f"{path.stem}.html", _link(page, pages))
    shutil.copytree(settings.figures, site / "figures", ignore=shutil.ignore_patterns("records"))
    artefacts = []
    for sidecar in sorted((site / "figures").glob("*.json")):
        content, table = read_json(sidecar), sidecar.with_suffix(".md")
        rows = table.read_text("utf-8").splitlines() if table.exists() else []
        if not {"caption", "files"} <= content.keys():  # a reader's own
            continue
        artefacts.append({
            "name": sidecar.stem, "caption": content["caption"],
            "files": [*content["files"], sidecar.name],
            "table": exporter.markdown2html({}, "\n".join(r for r in rows if r.startswith("|"))),
        })  # fmt: skip
    chapters = {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")}
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True)
    index = environment.get_template("site.html").render(
        preset=settings.preset, artefacts=artefacts,
        chapters=[page for page in pages if page in chapters],
        others=[page for page in pages if page not in chapters],
    )  # fmt: skip
    write_atomically(site / "index.html", index)
    return site / "index.html"


def _link(page: str, pages: Sequence[str]) -> str:
    """Make links from notebook to notebook links from page to page. Of a notebook that runs once for each model, and
    not by itself, the first page is taken."""

    def to_page(link: re.Match) -> str:
        name = link[1]
        found = [one for one in pages if one == name or one.startswith(f"{name}-")]
        return f'href="{found[0]}.html"' if found else link[0]

    return re.sub(r'href="([^"/]+)\.ipynb"', to_page, page)


def main(arguments: Sequence[str] | None = None) -> None:
    """Build the site of a preset; one that cannot be built ends the command with status 2."""
    parser = preset_parser("docs/build_site.py", "Everything a preset has made, as plain HTML.")
    _, settings = parse_options(parser, arguments)
    try:
        print(f"open {build_site(settings)} in a browser")
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
