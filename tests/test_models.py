"""A model is trained once, found again by its name, and never mistaken for another."""

import shutil

import pytest
import torch

from immunity_lib import models
from immunity_lib.models import model_folder, trained_model, training_record
from immunity_lib.recipes import ModelName, members, recipe
from immunity_lib.records import read_record, write_record

NAME = ModelName.parse("parts10-moe-resnet18-standard-seed0")


@pytest.fixture(scope="module")
def trained_folder(make_settings, dataset, tmp_path_factory):
    """An output folder in which the model, one epoch long, and its twin of seed 1 are trained."""
    folder = tmp_path_factory.mktemp("models")
    settings = make_settings(output_folder=str(folder), epochs=1)
    for seed in (0, 1):
        trained_model(settings, NAME.model_copy(update={"seed": seed}), dataset)
    return folder


@pytest.fixture
def settings(make_settings, trained_folder, tmp_path):
    """Settings whose output folder is a copy, which a test may spoil."""
    shutil.copytree(trained_folder, tmp_path, dirs_exist_ok=True)
    return make_settings(output_folder=str(tmp_path), epochs=1)


@pytest.fixture
def trainings(monkeypatch):
    """The recipes that were trained, from now on."""
    seen, train = [], models.train

    def spy(wanted, *arguments, **options):
        seen.append(wanted)
        return train(wanted, *arguments, **options)

    monkeypatch.setattr(models, "train", spy)
    return seen


def same_state(one, other):
    return all(torch.equal(one[key], other[key]) for key in one.keys() | other.keys())


def test_model_is_loaded_when_it_is_there(settings, dataset, trainings, images):
    loaded = trained_model(settings, NAME, dataset)
    assert not trainings and not loaded.training
    again = trained_model(settings, NAME, dataset)
    assert torch.equal(loaded(images, "trained"), again(images, "trained"))


def test_loaded_model_is_the_one_that_was_trained(make_settings, dataset, tmp_path, images):
    settings = make_settings(output_folder=str(tmp_path), epochs=1)
    fresh = trained_model(settings, NAME, dataset)
    assert same_state(fresh.state_dict(), trained_model(settings, NAME, dataset).state_dict())
    assert not (model_folder(settings, NAME) / "checkpoint.safetensors").exists()


def test_record_says_how_the_model_was_made(settings, dataset):
    record = training_record(settings, NAME)
    model = trained_model(settings, NAME, dataset)
    assert record["model"] == str(NAME)
    assert record["recipe"] == recipe(settings, NAME).model_dump(mode="json")
    assert record["data"]["checksum"] == dataset.splits["train"].checksum
    assert record["parameters"] == sum(p.numel() for p in model.parameters())
    assert [entry["epoch"] for entry in record["log"]] == [1]


def test_other_settings_train_anew_and_keep_the_old_model(settings, dataset, trainings, capsys):
    other = settings.model_copy(update={"learning_rate": 0.01})
    old = trained_model(settings, NAME, dataset)
    new = trained_model(other, NAME, dataset)
    assert [one.learning_rate for one in trainings] == [0.01]
    assert not same_state(old.state_dict(), new.state_dict())
    folder = model_folder(settings, NAME)
    assert len(list(folder.glob("model.safetensors.aside-*"))) == 1
    assert len(list(folder.glob("record.json.aside-*"))) == 1
    assert "trained with other settings or other data" in capsys.readouterr().err


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def flip_a_bit(folder):
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-10] ^= 4
    path.write_bytes(content)


def swap_with_another_seed(folder):
    """Whole, of the same shape, and ours: only the record knows better."""
    twin = folder.with_name(folder.name.replace("seed0", "seed1"))
    shutil.copy(twin / "model.safetensors", folder / "model.safetensors")


def edit_the_record(folder):
    path = folder / "record.json"
    path.write_text(path.read_text().replace('"seconds"', '"minutes"'))


def lose_a_field(folder):
    record = read_record(folder / "record.json")
    del record["recipe"]
    write_record(folder / "record.json", record)


@pytest.mark.parametrize(
    "spoil", [truncate, flip_a_bit, swap_with_another_seed, edit_the_record, lose_a_field]
)
def test_damaged_model_is_set_aside_and_trained_anew(settings, dataset, trainings, capsys, spoil):
    expected = trained_model(settings, NAME, dataset).state_dict()
    folder = model_folder(settings, NAME)
    spoil(folder)
    spoilt = (folder / "model.safetensors").read_bytes()
    found = trained_model(settings, NAME, dataset)
    assert len(trainings) == 1
    assert same_state(found.state_dict(), expected)
    (aside,) = folder.glob("model.safetensors.aside-*")
    assert aside.read_bytes() == spoilt
    assert f"set aside as {aside}" in (message := capsys.readouterr().err)
    assert "the model is trained anew" in message


@pytest.mark.parametrize("lost", ["model.safetensors", "record.json"])
def test_model_without_weights_or_record_is_trained_anew(settings, dataset, trainings, lost):
    expected = trained_model(settings, NAME, dataset).state_dict()
    (model_folder(settings, NAME) / lost).unlink()
    assert same_state(trained_model(settings, NAME, dataset).state_dict(), expected)
    assert len(trainings) == 1


def test_ensemble_is_the_mean_of_its_members(make_settings, dataset, tmp_path, images, trainings):
    settings = make_settings(output_folder=str(tmp_path), epochs=1)
    name = NAME.model_copy(update={"method": "ensemble"})
    ensemble = trained_model(settings, name, dataset)
    networks = [trained_model(settings, one, dataset) for one in members(settings, name)]
    assert len(trainings) == len(networks) == 2
    with torch.no_grad():
        expected = sum(network(images, gate="trained").exp() for network in networks) / 2
        for gate in (None, "trained", "uniform", "switch"):
            torch.testing.assert_close(ensemble(images, gate).exp(), expected)


def test_more_images_to_attack_than_there_are_is_an_error_before_training(make_settings):
    settings = make_settings(test_images=None, attacked_images=10**6)
    with pytest.raises(ValueError, match="attacked_images is 1000000, but parts10 has only"):
        models.dataset_of(settings)
