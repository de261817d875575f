"""The site: everything that was made, in pages that need no network."""

import json
import re

import nbformat
import pytest
from build_site import build_site

from study.store import write_artefact

PROSE = r"""# A chapter

With $N!$ gates and $\hat y$,
$$\bar c_i = \sum_{ab} (a, b)\, h_i(a, b) \tag{10}$$
see [the next](01_expert_selection.ipynb), [training](02_training.ipynb) and [nothing](none.ipynb).

<details><summary>Answer</summary>

**folded**

</details>
"""


@pytest.fixture
def made(make_settings, tmp_path):
    """Settings of a preset with three executed notebooks and two artefacts."""
    settings = make_settings(output_folder=str(tmp_path))
    folder = settings.runs / "notebooks"
    folder.mkdir(parents=True)
    output = nbformat.v4.new_output("stream", text="measured")
    cells = [nbformat.v4.new_markdown_cell(PROSE), nbformat.v4.new_code_cell("1", outputs=[output])]
    for name in ("00_start_here", "01_expert_selection", "02_training-parts10-one-model"):
        nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / f"{name}.ipynb")
    table = "A table.\n\n| a | b |\n|:--|:--|\n| <1> | 2 |\n"
    write_artefact(settings, "table1", {"csv": "a,b\n1,2\n", "md": table}, "A table.", [])
    write_artefact(settings, "figure1", {"png": b"", "pdf": b""}, "<img src=x> for US$ and A$.", [])
    write_artefact(settings, "stepper", {"html": "<p>steps</p>"}, "Steps.", [])
    return settings


def test_C7_every_notebook_and_artefact_is_linked_as_text_and_nothing_is_asked_of_a_network(made):
    old = build_site(made).parent / "notebooks/old.html"
    old.write_text("old")
    index = build_site(made)
    page = index.read_text()
    assert not old.exists(), "an older site leaves nothing behind"
    links = re.findall(r'(?:href|src)="([^"]+)"', page)
    assert {
        "notebooks/00_start_here.html", "notebooks/02_training-parts10-one-model.html",
        "figures/figure1.png", "figures/table1.csv", "figures/stepper.html",
    } <= set(links)  # fmt: skip
    assert all((index.parent / link).exists() for link in links)
    assert "&lt;img src=x&gt; for US$ and A$." in page and "<img src=x>" not in page
    assert "<td" in page and "&lt;1&gt;" in page
    for path in index.parent.rglob("*.html"):
        assert not re.search(r"(<script|<link|<img|@import)[^>]*https?://", path.read_text()), path


def test_D1_what_a_sidecar_names_elsewhere_stays_where_it_is_and_a_file_of_the_reader_s_is_none(made, tmp_path):
    mine = tmp_path / "mine"
    mine.write_text("mine")
    named = dict.fromkeys(("../../mine", str(mine)), "0" * 64)
    (made.figures / "hostile.json").write_text(json.dumps({"caption": "Mine.", "files": named, "records": []}))
    (made.figures / "notes.json").write_text('{"of": "mine"}')
    page = build_site(made).read_text()
    assert "Mine." in page and 'id="notes"' not in page and mine.read_text() == "mine"
    assert sorted(tmp_path.iterdir()) == [tmp_path / "figures", mine, tmp_path / "runs"]


def test_equations_are_drawn_by_the_browser_and_links_between_notebooks_lead_to_pages(made):
    page = (build_site(made).parent / "notebooks" / "00_start_here.html").read_text()
    assert page.count("<math") == 3 and "<span>(10)</span>" in page
    assert "$" not in page.split("<main>")[1] and "\\tag" not in page
    assert "<details>" in page and "<strong>folded</strong>" in page and "measured" in page
    assert 'href="01_expert_selection.html"' in page
    assert 'href="02_training-parts10-one-model.html"' in page
    assert 'href="none.ipynb"' in page, "a link to no page stays as it is"
