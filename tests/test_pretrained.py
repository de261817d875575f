"""The weights that come with the project: whole, true to their records, and never in the way."""

import json
import shutil
import subprocess

import pytest
import torch

from immunity_lib import models, results
from immunity_lib.models import model_folder, trained_model, training_record
from immunity_lib.pretrained import publish
from immunity_lib.recipes import ModelName, explored_models, recipe
from immunity_lib.records import read_record, read_tensors
from immunity_lib.results import attack_record, record_path, score_record
from immunity_lib.settings import ROOT, load_preset

PUBLISHED = sorted((ROOT / "pretrained").glob("*/*/record.json"))
NAME = ModelName.parse("parts10-moe-resnet18-standard-seed0")


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.parent.name)
def test_each_is_whole_and_of_the_preset_as_it_is_now(path):
    record = read_record(path)
    tensors, _ = read_tensors(path.with_name("model.safetensors"), record["weights"])
    assert all(
        not one.is_floating_point() or one.dtype == torch.float16 for one in tensors.values()
    )
    settings = load_preset(path.parts[-3])
    name = ModelName.parse(path.parent.name)
    assert record["recipe"] == recipe(settings, name).model_dump(mode="json")
    assert record["rounding"]["expert_answers_kept"] > 0.99
    scores = read_record(path.with_name("scores.json"))
    assert scores["model"] == str(name) and scores["weights"] == [record["weights"]]


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="the history is not here")
@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.parent.name)
def test_each_was_made_by_a_commit_of_this_history(path):
    for record in (path, path.with_name("scores.json")):
        made_by = read_record(record)["provenance"]
        assert not made_by["uncommitted_changes"]
        asked = ["git", "merge-base", "--is-ancestor", made_by["commit"], "HEAD"]
        known = subprocess.run(asked, cwd=ROOT, capture_output=True)
        shallow = ROOT / ".git" / "shallow"
        assert known.returncode == 0 or shallow.exists()


def test_the_demo_has_every_variant_under_both_regimes():
    settings = load_preset("demo")
    found = {path.parent.name for path in PUBLISHED if path.parts[-3] == "demo"}
    assert found == set(map(str, explored_models(settings))) and len(found) == 8


def test_the_demo_s_models_are_there_without_training(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "train", None)
    settings = load_preset("demo", output_folder=str(tmp_path))
    dataset = models.dataset_of(settings)
    name = explored_models(settings)[3]
    model = trained_model(settings, name, dataset)
    test = dataset.splits["test"].first(250)
    with torch.no_grad():
        right = model(test.images / 255, "uniform").argmax(-1) == test.labels
    assert right.float().mean() > 0.7
    assert training_record(settings, name)["model"] == str(name)


@pytest.fixture
def project(make_settings, dataset, tmp_path, monkeypatch):
    """Settings with a model trained and published, in folders of the test's own."""
    monkeypatch.setattr(models, "PRETRAINED", tmp_path / "pretrained")
    settings = make_settings(output_folder=str(tmp_path), epochs=1)
    trained_model(settings, NAME, dataset)
    assert publish(settings, NAME, dataset)
    return settings


def test_what_was_trained_here_goes_first(project, dataset):
    assert model_folder(project, NAME) == project.runs / "models" / str(NAME)
    assert training_record(project, NAME)["weights"] != published_record(project)["weights"]


def published_record(settings):
    return read_record(models.PRETRAINED / settings.preset / str(NAME) / "record.json")


def test_without_it_the_published_model_answers_alike(project, dataset, images, monkeypatch):
    own = trained_model(project, NAME, dataset)
    shutil.rmtree(project.runs)
    monkeypatch.setattr(models, "train", None)
    found = trained_model(project, NAME, dataset)
    torch.testing.assert_close(
        found(images, "uniform").exp(), own(images, "uniform").exp(), rtol=0, atol=5e-3
    )
    assert next(found.parameters()).dtype == torch.float32
    assert published_record(project)["rounding"]["from"] != published_record(project)["weights"]


def test_scores_of_published_weights_come_with_them(project, dataset, monkeypatch):
    shutil.rmtree(project.runs)
    published = read_record(models.PRETRAINED / project.preset / str(NAME) / "scores.json")
    monkeypatch.setattr(results, "_scores", None)
    assert score_record(project, NAME, dataset) == published
    assert published["weights"] == [published_record(project)["weights"]]
    assert record_path(project, NAME, "scores").exists(), "a figure can name it as its source"


def test_scores_of_published_weights_are_not_taken_for_those_of_others(project, dataset):
    """Trained here again, to the same weights before rounding."""
    record = score_record(project.model_copy(update={"pretrained": False}), NAME, dataset)
    assert record["weights"] != [published_record(project)["weights"]]


def test_a_result_names_the_weights_it_was_measured_on(project, dataset):
    """So what was measured on published weights is measured anew once the model is trained."""
    shutil.rmtree(project.runs)
    record = attack_record(project, NAME, dataset)
    assert published_record(project)["weights"] in json.dumps(record)
    again = project.model_copy(update={"pretrained": False})
    trained_model(again, NAME, dataset)
    assert published_record(project)["weights"] not in json.dumps(
        attack_record(project, NAME, dataset)
    )


@pytest.mark.parametrize("changes", [{"pretrained": False}, {"learning_rate": 0.01}])
def test_reproducing_and_other_settings_train_anew(project, dataset, changes, monkeypatch):
    shutil.rmtree(project.runs)
    trained = []
    train = models.train
    monkeypatch.setattr(models, "train", lambda *a, **k: trained.append(a) or train(*a, **k))
    trained_model(project.model_copy(update=changes), NAME, dataset)
    assert len(trained) == 1


def test_damaged_ones_are_left_where_they_are_and_not_used(project, dataset, capsys):
    shutil.rmtree(project.runs)
    path = models.PRETRAINED / project.preset / str(NAME) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    trained_model(project, NAME, dataset)
    assert "come with the project are not used" in capsys.readouterr().out
    assert path.exists() and not list(path.parent.glob("*.aside-*"))
    assert model_folder(project, NAME) == project.runs / "models" / str(NAME)


def test_what_is_not_trained_is_not_published(project, dataset):
    other = ModelName.parse("parts10-immunity-resnet18-standard-seed0")
    assert not publish(project, other, dataset)
    assert not (models.PRETRAINED / project.preset / str(other)).exists()
