"""README says what is there: files, targets, functions, and tables as they were made."""

import pkgutil
import re

from immunity_lib.settings import ROOT, preset_names

README = (ROOT / "README.md").read_text()


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"(?:^|`)make ([a-z][a-z-]+)\b", README, re.MULTILINE)):
        assert re.search(rf"^([a-z -]* )?{target}( [a-z -]*)?:", makefile, re.MULTILINE), target


def test_equations_name_code_that_exists():
    rows = re.findall(r"^\| (?:\(|4|5).*\|(.*)\|$", README, re.MULTILINE)
    names = [name for row in rows for name in re.findall(r"`([a-z_]+\.[\w.]+)`", row)]
    assert len(names) >= 10
    for name in names:
        found = pkgutil.resolve_name(f"immunity_lib.{name}")
        assert callable(found), name


def test_every_preset_is_described():
    for preset in preset_names():
        assert f"| `{preset}` |" in README


def test_its_table_is_the_one_that_the_demo_made():
    made = (ROOT / "figures/demo/table2.md").read_text()
    table = [line for line in made.splitlines() if line.startswith("|")]
    assert table and "\n".join(table) in README
