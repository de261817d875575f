"""The site: what was made, in pages that need no network; and the committed one shows what is committed."""

import json
import re
from html import escape

import pytest
from build_site import Site, build_site, placed
from PIL import Image

from study.settings import ROOT
from study.store import read_json, write_artefact

SITE = ROOT / "site"
PAGES = sorted(set(SITE.rglob("*.html")) - set(SITE.glob("api/**/*")))  # those are of test_api.py
HOSTILE = "<img src=x> for US$ and A$."


def cells(*sources):
    return [{"cell_type": "code", "source": source} for source in sources]


@pytest.fixture(scope="module")
def made(make_settings, tmp_path_factory):
    """Settings of a preset with three artefacts and two files that are none."""
    folder = tmp_path_factory.mktemp("made")
    settings = make_settings(output_folder=str(folder))
    Image.new("RGB", (40, 30)).save(folder / "picture.png")
    picture = (folder / "picture.png").read_bytes()
    table = "A table.\n\n| a | b |\n|:--|:--|\n| <1> | <img src=y> |\n"
    write_artefact(settings, "table2", {"csv": "a,b\n1,2\n", "md": table}, "A table.", [])
    write_artefact(settings, "figure2", {"png": picture, "pdf": b""}, HOSTILE, [])
    write_artefact(settings, "stepper", {"html": "<p>steps</p>"}, "Steps.", [])
    elsewhere = dict.fromkeys(("../../picture.png", str(folder / "picture.png")), "0" * 64)
    (settings.figures / "hostile.json").write_text(json.dumps({"caption": "Mine.", "files": elsewhere}))
    (settings.figures / "notes.json").write_text('{"of": "mine"}')
    return settings


@pytest.fixture(scope="module")
def index(made):
    (old := made.figures.parents[1] / "site/demo/old.html").parent.mkdir(parents=True)
    old.write_text("old")
    (made.figures.parents[1] / "site/sources.json").write_text("{}")
    index = build_site(made)
    assert not old.exists(), "an older site leaves nothing behind"
    return index


# The one that is committed


def test_it_is_what_would_be_built_from_what_is_committed_now(tmp_path):
    """Of the presets that it shows: others may lie beside them, from a run of the reader's own."""
    known = read_json(SITE / "sources.json")
    site = Site(ROOT / "figures", tmp_path, "demo")
    site.made = {name: made for name, made in site.made.items() if f"figures/{name}/claims.json" in known}
    changed = {path for path, _ in known.items() ^ site.sources().items()}
    assert "README.md" in known and not changed, "`make site` builds it anew"
    site.build()
    built, committed = ({path.relative_to(of): path for path in of.rglob("*.*")} for of in (tmp_path, SITE))
    assert built.keys() == committed.keys()
    # How a signature is printed depends on Python's version
    same = [path for path in built if path.parts[0] != "api"]
    assert not [path for path in same if built[path].read_bytes() != committed[path].read_bytes()]
    copies = [path for path in same if path.suffix in (".png", ".csv") or path.name == "stepper.html"]
    assert len(copies) > 40
    assert not [path for path in copies if built[path].read_bytes() != (ROOT / "figures" / path).read_bytes()]
    assert sum(path.stat().st_size for path in SITE.rglob("*")) < 12_000_000, "it fits a repository"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(SITE).as_posix())
def test_C7_its_links_and_pictures_are_there_and_nothing_is_asked_of_a_network(page):
    assert_whole(page)


def assert_whole(page):
    text = page.read_text()
    assert not re.search(r"""(src=|srcset=|<link[^>]* href=|@import |url\()["']?(https?:)?//|fetch\(|XMLHttp""", text)
    for target in re.findall(r'(?:href|src)="([^"]+)"', text):
        if not re.match("https:|data:", target):
            path, _, part = target.partition("#")
            assert (there := page.parent / path if path else page).is_file(), target
            assert not part or f'id="{part}"' in there.read_text(), target
    assert all('alt="' in picture for picture in re.findall("<img[^>]*>", text))


def test_every_table_and_figure_of_the_demo_has_one_place_and_chapters_stand_in_the_paper_s_order():
    site = Site(ROOT / "figures", SITE, "demo")
    assert sorted(name for where in site.where["demo"].values() for name in where) == sorted(site.made["demo"])
    front = (SITE / "index.html").read_text()
    linked = re.findall(r'href="demo/(\d\d_\w+)\.html"', front.partition('<h2 id="chapters"')[2])
    assert linked == sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
    parts = ('<h2 id="found"', 'id="figure2"', "<iframe", 'id="demo-table1"', '<h2 id="chapters"')
    order = [front.index(part) for part in parts]
    assert order == sorted(order), "the finding comes first"


# How it is built


def test_a_name_is_placed_where_it_is_given_to_what_saves_it_and_a_pattern_takes_what_is_left():
    notebook = cells(
        'find_record(settings, name, "attacks")',
        'for view in views:\n    save_figure(settings, figure, f"explorer_{view}", captions["gates"], [])',
        'paths = tables.write_table(settings, table, "gates", caption, [])',
        'draw_heatmaps(moe, "figure2", "attacks or gates")\nsave_figure(settings, figure, "explorer_methods", "", [])',
    )
    names = ["attacks", "explorer_attack", "explorer_methods", "gates", "figure2", "table1"]
    assert placed(notebook, names) == {"explorer_attack": 1, "gates": 2, "figure2": 3, "explorer_methods": 3}


def test_captions_and_tables_stay_text_and_every_page_is_whole(index):
    page = index.read_text()
    assert escape(HOSTILE) in page and "<img src=x>" not in page
    assert "&lt;1&gt;" in page and "<img src=y>" not in page and "A table." in page
    assert "Mine." in page and 'id="tiny-notes"' not in page
    for path in sorted(set(index.parent.rglob("*.html")) - set(index.parent.glob("api/**/*"))):
        if path.name != "stepper.html" and path.parent.name != "docs" and path != index:
            assert_whole(path)


def test_D1_what_a_sidecar_names_elsewhere_stays_where_it_is(index, made):
    folder = made.figures.parents[1]
    assert {path.name for path in folder.iterdir()} == {"figures", "picture.png", "site"}
    copied = {path.name for path in (index.parent / "tiny").iterdir() if path.suffix != ".html"}
    assert copied == {"table2.csv", "figure2.png"}


def test_a_chapter_has_its_text_equations_and_folded_code_and_what_was_made_where_it_is_made(index):
    page = (index.parent / "tiny/00_start_here.html").read_text()
    assert "<h1 " in page and page.count("<math") > 40 and "<span>(10)</span>" in page
    main = page.partition("<main")[2].partition("</main>")[0]
    assert "\\tag" not in page and "$" not in re.sub("<pre.*?</pre>|<math.*?</math>", "", main, flags=re.DOTALL)
    folded = re.findall(r'<details class="code"><summary>code, \d+ lines?</summary><div class="highlight"><pre', page)
    assert len(folded) == page.count('<details class="code">') > 15
    assert 'href="01_expert_selection.html"' in page and 'href="../docs/findings.html"' in page
    page = (index.parent / "tiny/03_attacks.html").read_text()
    assert page.index(">Table 2<") < page.index('<figure id="table2">') < page.index(">What the gate contributes<")


def test_a_link_to_what_is_on_no_page_is_named_and_is_no_link(index):
    page = (index.parent / "docs/findings.html").read_text()
    assert '<span title="in the project: ../study/claims.yaml">claims.yaml</span>' in page


def test_a_folder_that_is_no_site_is_left_alone_and_a_preset_without_figures_is_refused(make_settings, tmp_path):
    settings = make_settings(output_folder=str(tmp_path))
    settings.figures.mkdir(parents=True)
    with pytest.raises(ValueError, match="has no tables or figures"):
        build_site(settings)
    (tmp_path / "site").mkdir()
    (tmp_path / "site/mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="move it away"):
        build_site(settings)
    assert (tmp_path / "site/mine.txt").read_text() == "mine"
