"""The cards of the weights that come with the project say what their records and tables say, and no more."""

import csv
import re
import shutil

import pytest
import yaml
from cards import card, write_cards

from study import store
from study.catalogue import ModelName
from study.settings import ROOT, load_preset
from study.tables import wilson_interval

SHIPPED = sorted((ROOT / "pretrained").glob("*/*/model.safetensors"))
FOLDER = ROOT / "pretrained/demo/parts10-moe-resnet18-standard-seed0"
NAME = ModelName.parse(FOLDER.name)


def parts(text):
    """The front matter and the text of a card."""
    empty, head, body = re.split(r"^---$", text, maxsplit=2, flags=re.MULTILINE)
    assert empty == ""
    return yaml.safe_load(head), body


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.parent.name)
def test_every_card_is_that_of_its_record_and_tables_as_they_are_now_and_what_the_hub_reads(path):
    preset, name = path.parts[-3:-1]
    remedy = f"older than its record or tables; run: python pretrained/publish.py --cards --preset {preset}"
    made = card(load_preset(preset), ModelName.parse(name))
    assert path.with_name("README.md").read_text() == made, remedy
    assert max(map(len, made.splitlines())) <= 115
    head, body = parts(made)
    assert head["license"] == "mit" and head["library_name"] == "immunity" and head["metrics"] == ["accuracy"]
    assert all(isinstance(one, str) for key in ("tags", "datasets") for one in head[key])
    ((index,),) = [head["model-index"]]
    assert index["name"] == path.parent.name and len(index["results"]) == 1
    result = index["results"][0]
    assert result["task"] == {"type": "image-classification"} and {"name", "type", "split"} == result["dataset"].keys()
    for one in result["metrics"]:
        assert one["type"] == "accuracy" and 0 <= one["value"] <= 100
        what = one["name"].removeprefix("accuracy in %, ")
        assert f"| {what} | {one['value']:.1f} |" in body
    assert f'shipped_model("{"/".join(path.parts[-3:-1])}")' in body
    assert "no defence to rely on" in body and "It is one training" in body


def test_a_card_has_the_tables_numbers_with_their_intervals():
    head, body = parts((FOLDER / "README.md").read_text())
    shown = {one["name"].split(", ", 1)[1]: one["value"] for one in head["model-index"][0]["results"][0]["metrics"]}
    rows = list(csv.DictReader((ROOT / "figures/demo/table2.csv").read_text().splitlines()))
    told = {one["column"]: one for one in rows if (one["training"], one["model"]) == ("standard", "MoE")}
    for attack in ("clean", "FGSM", "BIM", "MIM", "PGD"):
        assert shown[attack] == round(float(told[attack]["value"]), 1)
        low, high = wilson_interval(float(told[attack]["value"]), float(told[attack]["images"]))
        assert f"| {low:.1f} to {high:.1f} | {float(told[attack]['images']):.0f} images, figures/demo/table2" in body
    rows = csv.DictReader((ROOT / "figures/demo/gate_worth.csv").read_text().splitlines())
    worst = [
        one for one in rows if [one["training"], one["model"], one["column"]] == ["standard", "MoE", "all attacks"]
    ]
    assert shown["all adaptive attacks"] == round(float(worst[0]["value"]), 1)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A copy of one model that ships, which a test may change."""
    monkeypatch.setattr(store, "PRETRAINED", tmp_path)
    return shutil.copytree(FOLDER, tmp_path / "demo" / FOLDER.name)


def test_a_card_follows_its_record_and_shows_no_numbers_of_another_training(elsewhere):
    settings, before = load_preset("demo"), (FOLDER / "README.md").read_text()
    record = store.read_json(elsewhere / "record.json")
    record["log"][-1]["accuracy"] = 0.123
    store.write_json(elsewhere / "record.json", record)
    write_cards(settings)
    changed = (elsewhere / "README.md").read_text()
    assert changed != before and "| held-out, clean | 12.3 |" in changed and "| PGD | " in changed
    record["rounding"]["from"] = "0" * 64
    store.write_json(elsewhere / "record.json", record)
    head, body = parts(card(settings, NAME))
    assert "| PGD | " not in body and "it was not tested" in body and "all adaptive attacks" not in body
    assert head["model-index"][0]["results"][0]["dataset"]["split"] == "validation"


def test_what_is_a_mean_of_several_trainings_is_said(elsewhere, tmp_path):
    """As tables of several seeds hold it."""
    settings = load_preset("demo", output_folder=str(tmp_path))
    shutil.copytree(ROOT / "figures/demo", settings.figures)
    table = settings.figures / "table2.csv"
    table.write_text(re.sub(r"(standard,MoE,PGD,%,[\d.]+),,1,", r"\1,2.5,3,", table.read_text()))
    assert re.search(
        r"\| PGD \| .* \| 100 images, mean of 3 trainings, figures/demo/table2.csv \|", card(settings, NAME)
    )
