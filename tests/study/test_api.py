"""The library's own pages: all of it, documented, without a network."""

import inspect
import re
from importlib import import_module

import api
import pytest

from study.settings import ROOT

MODULES = [path.relative_to(ROOT).with_suffix("").parts for path in sorted((ROOT / "immunity_lib").rglob("*.py"))]
MODULES = [".".join(parts).removesuffix(".__init__") for parts in MODULES]


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("api")
    first = api.build(folder)
    return first, {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*.html")}


def test_every_module_has_a_page_that_is_reached_from_the_first(pages):
    first, found = pages
    assert {f"{name.replace('.', '/')}.html" for name in MODULES} == found.keys() - {"index.html"}
    reached, new = set(), {first.relative_to(first.parent).as_posix()}
    while new:
        reached |= new
        links = {
            (first.parent / page).parent / link
            for page in new
            for link in re.findall(r'href="([^"#:$]+\.html)', found[page])
        }
        new = {link.resolve().relative_to(first.parent).as_posix() for link in links} - reached
        assert all(one in found for one in new), new
    assert reached >= found.keys() - {"index.html"}
    assert "eq (1) and section 4.1" in found["immunity_lib/moe.html"] and "class" in found["immunity_lib/moe.html"]
    assert 'id="ImmunityMoE"' in found["immunity_lib.html"], "what is loaded when asked for, too"


def test_no_page_asks_a_network_links_have_a_name_and_keys_reach_all_that_a_mouse_does(pages):
    """Its colours and widths are looked at in a browser."""
    for name, page in pages[1].items():
        asking = r"<(?:script|link|img|iframe|form)\b[^>]*https?://|@import|url\([\"']?https?:|(?:fetch|import)\([\"'`]https?:"
        assert not re.search(asking, page), name
        assert not re.search(r'tabindex="-1"|<a [^>]*href="#[^">]*"></a>', page), name
        assert "<main" not in page or "custom.css" in page and "prefers-color-scheme:dark" in page, name


@pytest.mark.parametrize("name", MODULES)
def test_every_public_function_and_class_says_what_it_is(name):
    module = import_module(name)
    own = [one for one in vars(module).values() if getattr(one, "__module__", "") == name]
    public = [one for one in own if inspect.isroutine(one) or inspect.isclass(one)]
    silent = [one.__qualname__ for one in public if not one.__qualname__.startswith(("_", "<")) and not one.__doc__]
    assert module.__doc__ and not silent, silent


def test_making_them_leaves_the_package_as_it_was(pages):
    import immunity_lib

    assert "moe" not in immunity_lib.__all__ and "images" not in import_module("immunity_lib.data").__all__
