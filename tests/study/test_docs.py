"""README and docs say what is there: files, commands, modules, functions, fields, numbers."""

import json
import pkgutil
import re
import runpy
import sys
from fractions import Fraction
from typing import get_args

import pandas as pd
import pytest
import yaml

from immunity_lib.attacks import ATTACKS
from study import catalogue, measure, store, tables
from study.settings import ROOT, TRAINING, AttackName, Settings, load_preset, preset_names

README = (ROOT / "README.md").read_text()
ARCHITECTURE = (ROOT / "docs/architecture.md").read_text()
NUMBERS = r"\d+\.\d+|\d{3,}"
PAGES = [ROOT / "README.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]
drawing = runpy.run_path(str(ROOT / "docs/draw_imports.py"))
GRAPH, longest_chain = drawing["import_graph"](), drawing["longest_chain"]


def test_A8_the_readme_is_short_and_names_all_authors():
    assert len(README.splitlines()) <= 150 and len(README.encode()) <= 10_000
    paper = yaml.safe_load((ROOT / "CITATION.cff").read_text())["preferred-citation"]
    names = [(author["given-names"], author["family-names"]) for author in paper["authors"]]
    (said,) = re.findall(r"by (Qiao Han.*?)\s\(\[arXiv (.*?)\]\((.*?)\)\)", README, re.DOTALL)
    assert re.split(r", | and ", " ".join(said[0].split())) == [" ".join(one) for one in names]
    assert paper["url"] == said[2] and paper["identifiers"] == [{"type": "other", "value": f"arXiv:{said[1]}"}]
    bibtex = dict(re.findall(r"^  (\w+) += \{(.*?)\},?$", README, re.MULTILINE))
    assert bibtex["author"] == " and ".join(f"{family}, {given}" for given, family in names)
    assert (bibtex["title"], bibtex["year"]) == (paper["title"], str(paper["year"])) and bibtex["eprint"] == said[1]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_commands_lead_somewhere(page):
    text, makefile = page.read_text(), (ROOT / "Makefile").read_text()
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (page.parent / target).exists(), target
    for target in re.findall(r"(?:^|`)make ([a-z][a-z-]+)\b", text, re.MULTILINE):
        assert re.search(rf"^([a-z -]* )?{target}( [a-z -]*)?:", makefile, re.MULTILINE), target
    assert set(re.findall(r"-m ((?:study|immunity_lib)[\w.]*)", text)) <= GRAPH.keys()
    for name in re.findall(r"`(test_\w+.py)`", text):
        assert list((ROOT / "tests").rglob(name)), name


def test_the_readmes_snippet_runs_and_gives_what_it_says():
    exec(re.search(r"```python\n(.*?)```", README, re.DOTALL)[1], names := {})
    said = dict(re.findall(r"^(\w+) = .*# \(([\d, ]+)\)", README, re.MULTILINE))
    assert {name: str(tuple(names[name].shape))[1:-1] for name in ("log_probs", "maps")} == said
    assert (names["maps"].sum((2, 3)) - 1).abs().max() < 1e-5


def test_B6_papermill_as_the_docs_call_it_gives_no_parameter_that_the_notebook_lacks():
    """Of each such it warns, and a preset's file as -f would be thirty of them."""
    found = 0
    for page in [*PAGES, ROOT / "container/entry.sh"]:
        text = page.read_text().replace("\\\n", " ")
        for notebook, options in re.findall(r"papermill (?:notebooks/(\w+)\.ipynb|--cwd)([^`\n]*)", text):
            assert not re.search(r" (-f|-y|-b)\b", options), options
            for path in (ROOT / "notebooks").glob(f"{notebook or '*'}.ipynb"):
                own = next(cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code")
                parameters = {line.split(" = ")[0] for line in own["source"]}
                assert set(re.findall(r"-p (\w+)", options)) <= parameters, (page, path)
                found += 1
    assert found > 8


def table_rows(markdown):
    lines = [re.split(r" *\| *", one.strip("| ")) for one in re.findall(r"^\|.*", markdown, re.M)]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


def test_the_readmes_numbers_are_those_of_the_tables_that_it_names():
    made = table_rows((ROOT / "figures/parts10/table2.md").read_text())
    ours = [row for row in made if row.pop("source", "ours") == "ours"]
    shown = table_rows(README)
    assert len(shown) == 5 and all(row in ours for row in shown)
    assert "not in our source" not in README
    found = README.partition("## What was found")[2].partition("\n|")[0]
    for sentence in re.split(r"^\d\. ", found, flags=re.MULTILINE)[1:]:
        links = re.findall(r"\]\((figures/[^)]+)\)", sentence)
        named = "".join((ROOT / link).read_text() for link in links)
        if "real images" in sentence:  # which have no table of accuracies yet
            named += " ".join(f"{one:.1f}" for one in real_images().groupby(["model", "attack"]).mean())
        assert links and set(re.findall(NUMBERS, sentence)) <= set(re.findall(NUMBERS, named))


def test_the_findings_on_generated_images_are_those_of_their_tables():
    found = (ROOT / "docs/findings.md").read_text().partition(" trainings, generated images\n")[2].partition("\n## ")[0]
    named = "".join((ROOT / f"figures/parts10/{name}.md").read_text() for name in ("claims", "gate_worth"))
    numbers = set(re.findall(r"\d+\.\d+", found))
    assert len(numbers) > 20 and numbers <= set(re.findall(r"\d+\.\d+", named))


def real_images():
    """Of the frames of cifar10 that come with the project: % right by model and attack, by training."""
    paths = sorted((ROOT / "pretrained/cifar10").glob("*/attacks.parquet"))
    frames = pd.concat(
        pd.read_parquet(path).assign(model=path.parent.name.rpartition("-seed")[0], training=path.parent.name)
        for path in paths
    ).query("split == 'test'")
    met = set(frames.query("attack == 'pgd'")["image"])
    few = frames[(frames["attack"] == "clean") & frames["image"].isin(met)].assign(attack="clean, of the attacked")
    by = ["model", "attack", "training"]
    return 100 * pd.concat([frames, few]).groupby(by)["switched"].mean()


def test_what_is_told_of_real_images_is_what_their_frames_have():
    told = (ROOT / "docs/findings.md").read_text().partition("The preset `cifar10`, ")[2].partition("\n## ")[0]
    paths = [*(ROOT / "pretrained/cifar10").glob("*/attacks.parquet")]
    assert len(paths) == 16 and "trainings sixteen are done" in told
    for path in paths:
        frame = pd.read_parquet(path).query("split == 'test'")
        assert f"{(frame['attack'] == 'clean').sum():,} test" in told
        assert "standard" not in path.parent.name or not frame.query("attack == 'pgd'")["switched"].any()
    titles = {"moe-resnet18-standard": "MoE", "moe-mi-resnet18-standard": "MoE+MI",
              "moe-ps-resnet18-standard": "MoE+PS",
              "immunity-resnet18-standard": "Immunity", "standalone-resnet18-standard": "stand-alone ResNet18",
              "moe-resnet18-adversarial": "MoE, adversarial (one training)"}  # fmt: skip
    rows = {row["right"]: row for row in table_rows(told)}
    lines = {"clean, of the attacked": "clean", "fgsm": "FGSM at 8/255", "pgd": "PGD at 8/255"}
    lines |= {f"pgd at {eps}": f"PGD at {eps}" for eps in ("4/255", "2/255")}
    assert len(rows) == len(lines)
    for (model, attack), right in real_images().groupby(["model", "attack"]):
        mean, apart, title = right.mean(), right.std(), titles[model.removeprefix("cifar10-")]
        if attack in lines:
            assert rows[lines[attack]][title] == f"{mean:.1f}" + f" ± {apart:.1f}" * bool(apart > 0) + " %", model
        if attack == "clean":
            assert re.search(rf"\b{mean:.1f} %", told), model


def test_what_is_told_of_switching_is_what_the_tables_of_single_trainings_have():
    told = (ROOT / "docs/findings.md").read_text().partition("## One training\n")[2].partition("**The suite.**")[0]
    for preset in ("demo", "cifar10-small"):
        worth = pd.read_csv(ROOT / f"figures/{preset}/gate_worth.csv").query("column == 'switching'")["value"]
        for value in (worth.min(), worth.max()):
            assert re.search(rf"\b{abs(value):.1f}\b", told), (preset, value)


def test_what_the_docs_name_exists_and_the_other_way_round():
    page, fields = (ROOT / "docs/presets.md").read_text(), {*TRAINING, *Settings.model_fields}
    for name in {*preset_names(), *fields} - {"recipe"}:
        assert f"`{name}`" in page, name
    names = {re.sub(r"^(immunity_lib|study)\.", "", one): one for one in GRAPH if one != "study"}
    assert sorted(re.findall(r"^\| `([\w.]+)` \|", ARCHITECTURE, re.M)) == sorted(names)
    for module, member in re.findall(r"`([a-z][a-z_.]+)\.(\w+)`", ARCHITECTURE):
        assert f"{module}.{member}" in names or pkgutil.resolve_name(f"{names[module]}.{member}")
    attacks = set(get_args(AttackName))  # an attack of the tables has these places
    assert attacks == set(catalogue.ATTACK_TITLES) <= set(ATTACKS)


@pytest.mark.parametrize("name", preset_names())
def test_A2_neighbours_what_the_docs_say_of_a_preset_is_what_it_says(name):
    page, settings = (ROOT / "docs/presets.md").read_text(), load_preset(name)
    (row,) = (one for one in table_rows(page.partition("## Fields")[0]) if one["preset"] == f"`{name}`")
    assert settings.preset == name and catalogue.trained_models(settings)
    recipe, words = settings.recipe, "none one two three four five six".split()
    truths = {
        r"(\d+) experts": recipe.experts, r"(\d+) epochs": recipe.epochs, r"([\d,]+) images": recipe.train_images,
        r"(\w+) seeds": words[len(settings.seeds)], r"at (\S+) of the channels": Fraction(recipe.width),
    }  # fmt: skip
    said = {pattern: re.search(pattern, row["models"]) for pattern in truths}
    assert any(said.values())
    for pattern, match in said.items():
        assert not match or match[1].replace(",", "") == str(truths[pattern]), match[0]
    if name == "demo":
        assert f"trains {len(catalogue.trained_models(settings))} small models" in README


def test_imports_go_one_way_are_shallow_and_drawn(tmp_path):
    said = re.search(r"chain has (\d) modules in `immunity_lib` and (\d) in `study`", ARCHITECTURE)
    for package, longest in zip(("immunity_lib", "study"), said.groups(), strict=True):
        own = [one for one in GRAPH if one.startswith(package)]
        assert max(longest_chain(one, GRAPH, package) for one in own) == int(longest) <= 7
    drawing["draw"](GRAPH, tmp_path / "imports.svg")
    assert (tmp_path / "imports.svg").read_text() == (ROOT / "docs/imports.svg").read_text()


@pytest.mark.slow
def test_an_image_passes_the_modules_that_the_architecture_lists(make_settings, tmp_path):
    passed = set()

    def see(frame, event, _):
        if event == "call" and frame.f_code.co_name != "<module>":
            passed.add(frame.f_globals.get("__name__"))

    settings = make_settings(output_folder=str(tmp_path), epochs=1, attacks=["pgd"])
    name = catalogue.table3_models(settings)[-1]
    sys.setprofile(see)
    try:
        data = store.load_data(settings)
        measure.measure_attacks(settings, name, data)
        measure.measure_scores(settings, name, data)
        tables.summarise(tables.attack_cells(settings, [name]), ["model"])
    finally:
        sys.setprofile(None)
    listed = re.findall(r"^\d+\. `([\w.]+)`", ARCHITECTURE, re.MULTILINE)
    called = {re.sub(r"^(immunity_lib|study)\.", "", one) for one in passed & GRAPH.keys()}
    assert called == set(listed) - {"data.images"} | {"data.parts10"}
    assert len(listed) <= 18
