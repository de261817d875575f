"""Models, records and weights on disk: found again, true to what they say, never loaded damaged."""

import shutil
import subprocess
from functools import partial
from unittest.mock import Mock

import pytest
import torch
from publish import publish_weights
from spoiling import spoil

from immunity_lib import files
from immunity_lib.files import DamagedFile, read_tensors, write_atomically, write_tensors
from study import store
from study.catalogue import ModelName, explored_models, members, recipe_of
from study.settings import ROOT, load_preset
from study.store import find_record, own_folder, read_json, read_record, trained_model, write_json

NAME = ModelName.parse("parts10-moe-resnet18-standard-seed0")
PUBLISHED = [path.with_name("record.json") for path in sorted((ROOT / "pretrained").glob("*/*/model.safetensors"))]


def test_an_editor_s_files_are_no_code(tmp_path, monkeypatch):
    """Emacs' lock is a link to nothing."""
    monkeypatch.setattr(store, "ROOT", tmp_path)
    for name in ("a.py", "claims.yaml", "a.py~", "#a.py#", ".a.py.swp", ".ipynb_checkpoints/a-checkpoint.py"):
        write_atomically(tmp_path / "study" / name, "")
    (tmp_path / "study/.#a.py").symlink_to("user@host.1")
    assert [path.name for path in store.code_files()] == ["a.py", "claims.yaml"]
    assert store.provenance()["library"]


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
def training(monkeypatch):
    """What trains, and counts its calls."""
    monkeypatch.setattr(store, "train", spy := Mock(wraps=store.train))
    return spy


@pytest.mark.parametrize("chosen", [None, "2,3", "", "-1", "NoDevFiles"])
def test_G5_a_gpu_that_pytorch_cannot_use_is_named(monkeypatch, tmp_path, chosen):
    """Rather than trained without for days; unless the CPU was chosen, or it is another job's."""
    for name in ("nvidia0", "nvidiactl"):
        (tmp_path / name).touch()
    monkeypatch.setattr(store, "DEVICES", tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(store.os, "environ", {} if chosen is None else {"CUDA_VISIBLE_DEVICES": chosen})
    if chosen in (None, "2,3"):
        with pytest.raises(OSError, match=f"/nvidia0 and CUDA_VISIBLE_DEVICES is {chosen or 'not set'}; mend"):
            store.chosen_device()
        monkeypatch.setattr(store.os, "access", lambda *_: False)
    assert store.chosen_device().type == "cpu"


def test_G6_float32_is_not_rounded_to_less_on_a_gpu_and_records_say_so():
    assert not torch.backends.cudnn.allow_tf32 and torch.get_float32_matmul_precision() == "highest"
    assert store.provenance()["tf32"] is False


def test_D3_neighbours_the_commit_is_this_project_s_whatever_git_is_told(monkeypatch, tmp_path):
    """As in a hook of git, or unpacked inside of another project."""
    own = store._git("rev-parse", "HEAD")
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_COMMON_DIR", "GIT_INDEX_FILE"):
        monkeypatch.setenv(name, str(tmp_path))
    assert store._git("rev-parse", "HEAD") == own
    monkeypatch.setattr(store, "ROOT", ROOT / "study")
    assert store._git("rev-parse", "HEAD") is None


def test_D6_a_model_is_loaded_where_nothing_may_be_written(settings, dataset, training, images, monkeypatch):
    monkeypatch.setattr(store, "FileLock", None)
    folder = own_folder(settings, NAME)
    (folder / ".lock").unlink(missing_ok=True)
    folder.chmod(0o500)  # which root does not notice
    loaded, again = (trained_model(settings, NAME, dataset) for _ in range(2))
    folder.chmod(0o700)
    assert not training.called and not loaded.training
    assert torch.equal(loaded(images, "trained"), again(images, "trained"))


def test_D6_neighbours_a_training_whose_weights_could_not_be_written_ends_as_it_would_have(
    settings, make_settings, dataset, monkeypatch, tmp_path
):
    """Its last checkpoint is all of it; what counts operations must not move a batch norm."""
    again = make_settings(output_folder=str(tmp_path / "again"), epochs=1)
    with monkeypatch.context() as patch:
        patch.setattr(store, "write_tensors", Mock(side_effect=OSError("No space left on device")))
        with pytest.raises(OSError, match="No space left"):
            trained_model(again, NAME, dataset)
    trained_model(again, NAME, dataset)
    assert read_record(again, NAME, "training")["weights"] == read_record(settings, NAME, "training")["weights"]


def test_D4_a_lock_that_nobody_lets_go_is_named(settings, dataset, monkeypatch):
    monkeypatch.setattr(store, "LOCKED", 0.1)
    other = NAME.model_copy(update={"seed": 5})
    folder = store.own_folder(settings, other)
    folder.mkdir(parents=True)
    with store.FileLock(folder / ".lock"), pytest.raises(TimeoutError, match="[.]lock is held"):
        trained_model(settings, other, dataset)


def test_record_says_how_the_model_was_made(settings, dataset):
    record, model = read_record(settings, NAME, "training"), trained_model(settings, NAME, dataset)
    assert record["model"] == str(NAME) and recipe_of(settings, NAME).is_that_of(record["recipe"])
    assert record["data"]["checksum"] == dataset.splits["train"].checksum
    assert record["parameters"] == sum(p.numel() for p in model.parameters())
    assert record["multiply_accumulates"] > 10**5 and [entry["epoch"] for entry in record["log"]] == [1]
    assert record["provenance"]["packages"] and record["provenance"]["library"]
    assert not (own_folder(settings, NAME) / "checkpoint.safetensors").exists()


def test_other_settings_train_anew_and_keep_the_old_model(settings, make_settings, dataset, training, capsys):
    other = make_settings(output_folder=settings.output_folder, epochs=1, learning_rate=0.01)
    old = trained_model(settings, NAME, dataset)
    new = trained_model(other, NAME, dataset)
    assert [call.args[0].learning_rate for call in training.call_args_list] == [0.01]
    assert not old.gate.linear.weight.equal(new.gate.linear.weight)
    for file in ("model.safetensors", "record.json"):
        assert len(list(own_folder(settings, NAME).glob(f"{file}.aside-*"))) == 1
    assert "trained with other settings or other data" in capsys.readouterr().err


def swap_with_another_seed(folder):
    """Whole, of the same shape, and ours: only the record knows better."""
    twin = folder.with_name(folder.name.replace("seed0", "seed1"))
    shutil.copy(twin / "model.safetensors", folder / "model.safetensors")


def rename_a_weight(folder):
    """As another version of the code would have written it."""
    tensors, notes = read_tensors(folder / "model.safetensors")
    tensors["gate.output.weight"] = tensors.pop("gate.linear.weight")
    write_tensors(folder / "model.safetensors", tensors, notes)
    weights = store.checksum(folder / "model.safetensors")
    write_json(folder / "record.json", read_json(folder / "record.json") | {"weights": weights})


@pytest.mark.parametrize(
    "damage",
    [lambda folder: spoil(folder / "model.safetensors", "truncated"),
     lambda folder: spoil(folder / "model.safetensors", "flipped bit"),
     lambda folder: spoil(folder / "record.json", "truncated"),
     lambda folder: write_json(folder / "record.json", {"weights": store.checksum(folder / "model.safetensors")}),
     swap_with_another_seed, rename_a_weight],
)  # fmt: skip
def test_D7_damaged_model_is_set_aside_and_trained_anew(settings, dataset, training, capsys, damage):
    expected = trained_model(settings, NAME, dataset).state_dict()
    folder = own_folder(settings, NAME)
    damage(folder)
    damaged = (folder / "model.safetensors").read_bytes()
    torch.testing.assert_close(trained_model(settings, NAME, dataset).state_dict(), expected, rtol=0, atol=0)
    assert training.call_count == 1
    (aside,) = folder.glob("model.safetensors.aside-*")
    assert aside.read_bytes() == damaged
    assert f"set aside as {aside}" in (message := capsys.readouterr().err) and "the model is trained anew" in message
    for file in ("model.safetensors", "record.json"):  # of a pair that is not whole, nothing is loaded
        (folder / file).unlink()
        trained_model(settings, NAME, dataset)
    assert training.call_count == 3


def test_ensemble_is_the_mean_of_its_members(make_settings, dataset, tmp_path, images, training):
    settings = make_settings(output_folder=str(tmp_path), epochs=1)
    name = NAME.model_copy(update={"method": "ensemble"})
    ensemble = trained_model(settings, name, dataset)
    networks = [trained_model(settings, one, dataset) for one in members(settings, name)]
    assert training.call_count == len(networks) == 2
    with torch.no_grad():
        expected = sum(network(images, gate="trained").exp() for network in networks) / 2
        for gate in (None, "trained", "uniform", "switch"):
            torch.testing.assert_close(ensemble(images, gate).exp(), expected)


def test_more_images_to_attack_than_there_are_is_an_error_before_training(make_settings):
    settings = make_settings(test_images=None, attacked_images=10**6)
    with pytest.raises(ValueError, match="attacked_images is 1000000, but parts10 has only"):
        store.load_data(settings)


def test_B5_cifar_is_looked_for_in_one_folder_wherever_one_stands(make_settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(store, "load_dataset", Mock(side_effect=OSError("asked")))
    with pytest.raises(OSError, match="asked"):
        store.load_data(make_settings(dataset="cifar10"))
    assert store.load_dataset.call_args.args[1] == ROOT / "data"


# Files

TENSORS = {
    "weights": torch.arange(6.0).reshape(2, 3).T, "count": torch.tensor(7), "mask": torch.tensor([True, False]),
    "state": torch.arange(5, dtype=torch.uint8), "empty": torch.zeros(0),
}  # fmt: skip


def test_tensors_and_notes_come_back_as_they_were_and_equal_content_is_equal_bytes(tmp_path):
    for name in ("a", "b"):
        write_tensors(tmp_path / name, TENSORS, {"name": "a", "epochs": [1, 2]})
    tensors, notes = read_tensors(tmp_path / "a")
    assert notes == {"name": "a", "epochs": [1, 2]}
    torch.testing.assert_close(tensors, TENSORS, rtol=0, atol=0, check_stride=False)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_what_is_not_whole_or_no_record_is_named(tmp_path):
    path, record = tmp_path / "short", '{"accuracy": [0.5], "model": "ä"}'.encode()
    write_tensors(path, TENSORS, {})
    for read, content in ((read_json, record), (read_tensors, path.read_bytes())):
        for length in (0, 5, len(content) // 2, len(content) - 3):
            path.write_bytes(content[:length])
            with pytest.raises(DamagedFile, match="short is not a whole"):
                read(path)
    path.write_text("[1, 2]")
    with pytest.raises(DamagedFile, match=r"short holds no record, but '\[1, 2\]'"):
        read_json(path)


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, failing):
    write_atomically(tmp_path / "deep" / "file", "old")
    monkeypatch.setattr(files.os, failing, Mock(side_effect=OSError("no space left on device")))
    with pytest.raises(OSError, match="no space left"):
        write_atomically(tmp_path / "deep" / "file", "new")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["file"]
    assert (tmp_path / "deep" / "file").read_text() == "old"


def test_a_table_of_one_model_is_not_written(make_settings, tmp_path):
    one = make_settings(output_folder=str(tmp_path), model=str(NAME))
    store.write_artefact(one, "table9", {"csv": "a,b\n"}, "Caption.", [])
    assert not one.figures.exists()


def test_a_preset_of_the_project_with_other_settings_leaves_its_figures_as_they_are(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(store, "ROOT", tmp_path)
    monkeypatch.setattr("study.settings.ROOT", tmp_path)
    kept = load_preset("smoke").figures / "table9.csv"
    write = partial(store.write_artefact, name="table9", caption="Caption.", records=[])
    write(load_preset("smoke"), contents={"csv": "its own"})
    write(load_preset("smoke", epochs=7, seeds=[5]), contents={"csv": "another's"})
    assert kept.read_text() == "its own"
    assert "table9 is not saved" in (told := capsys.readouterr().out) and "another seeds, epochs;" in told
    write(load_preset("smoke", epochs=7, output_folder=str(tmp_path / "own")), contents={"csv": "another's"})
    assert (tmp_path / "own/figures/smoke/table9.csv").read_text() == "another's"


def test_rounded_weights_leave_the_project_s_figures_as_they_are(capsys, monkeypatch, tmp_path):
    """A look at what comes along would put its records beside tables that rest on others."""
    monkeypatch.setattr(store, "ROOT", tmp_path)
    monkeypatch.setattr("study.settings.ROOT", tmp_path)
    looked, settings = tmp_path / "looked.json", load_preset("demo")
    shipped = read_json(store.PRETRAINED / "demo" / str(NAME) / "record.json")
    for weights, saved in ((shipped["weights"], False), (shipped["rounding"]["from"], True)):
        write_json(looked, {"kind": "scores", "model": str(NAME), "weights": [weights], "provenance": {}})
        store.write_artefact(settings, "table9", {"csv": "a,b\n"}, "Caption.", [looked])
        assert (settings.figures / "records" / f"{NAME}.scores.json").exists() == saved
        assert ("table9 is not saved: it would overwrite that of demo" in capsys.readouterr().out) != saved


@pytest.mark.parametrize("change", [{"model": "../../outside"}, {"kind": "attacks"}])
def test_a_record_about_something_else_is_damaged(settings, change):
    """Its words would name a file."""
    path = own_folder(settings, NAME) / "record.json"
    write_json(path, read_json(path) | change)
    with pytest.raises(DamagedFile, match="is not about the training of"):
        store.read_if_answered(path, settings, NAME, "training")


# Weights that come with the project


def test_every_measurement_that_comes_along_names_its_frame():
    frames = sorted(store.PRETRAINED.glob("*/*/*.parquet"))
    assert len(frames) > 200
    for path in frames:
        assert read_json(path.with_suffix(".json"))["frame"] == store.checksum(path), path


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.parent.name)
def test_published_weights_are_whole_and_of_the_preset_and_the_history_as_they_are_now(path):
    record, weights = read_json(path), path.with_name("model.safetensors")
    assert record["weights"] == store.checksum(weights)
    assert {one.dtype for one in read_tensors(weights)[0].values() if one.is_floating_point()} == {torch.float16}
    recipe = recipe_of(load_preset(path.parts[-3]), ModelName.parse(path.parent.name))
    assert recipe.is_that_of(record["recipe"])
    assert record["rounding"]["expert_answers_kept"] > 0.99
    assert not record["provenance"]["uncommitted_changes"]
    if (ROOT / ".git").exists() and not (ROOT / ".git" / "shallow").exists():
        asked = ["git", "merge-base", "--is-ancestor", record["provenance"]["commit"], "HEAD"]
        assert subprocess.run(asked, cwd=ROOT).returncode == 0


def test_the_demo_s_models_are_there_without_training(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "train", None)
    settings = load_preset("demo", output_folder=str(tmp_path))
    published = {path.parent.name for path in PUBLISHED if path.parts[-3] == "demo"}
    assert published == set(map(str, explored_models(settings))) and len(published) == 8
    assert trained_model(settings, explored_models(settings)[3], store.load_data(settings))


@pytest.fixture
def published(settings, dataset, tmp_path, monkeypatch):
    """The folder of a model that was trained and published, in folders of the test's own."""
    monkeypatch.setattr(store, "PRETRAINED", tmp_path / "pretrained")
    publish_weights(settings, NAME, dataset)
    return store.pretrained_folder(settings, NAME)


def test_what_was_trained_here_goes_first_and_what_is_published_answers_alike(
    published, settings, dataset, images, training
):
    record = read_json(published / "record.json")
    assert find_record(settings, NAME, "training").parent == settings.runs / "models" / str(NAME)
    own = trained_model(settings, NAME, dataset)
    weights = read_record(settings, NAME, "training")["weights"]
    assert weights == record["rounding"]["from"] != record["weights"]
    assert store.weights_of(settings, NAME, published / "scores.json") == [weights]
    shutil.rmtree(settings.runs)
    found = trained_model(settings, NAME, dataset)
    assert not training.called and next(found.parameters()).dtype == torch.float32
    torch.testing.assert_close(found(images, "uniform").exp(), own(images, "uniform").exp(), rtol=0, atol=5e-3)
    # What is measured here now is of the rounded weights, and not of the training's
    assert store.weights_of(settings, NAME, store.record_path(settings, NAME, "scores")) == [record["weights"]]
    assert store.weights_of(settings, NAME, published / "scores.json") == [weights]
    assert read_record(settings, NAME, "training") == record


@pytest.mark.parametrize("changes", [{"pretrained": False}, {"learning_rate": 0.01}])
def test_reproducing_and_other_settings_train_anew_which_hides_nothing(
    published, settings, make_settings, dataset, changes, training
):
    other = make_settings(output_folder=settings.output_folder, epochs=1, **changes)
    shutil.rmtree(settings.runs)
    with pytest.raises(FileNotFoundError, match="is not trained with these settings yet.*OUTPUT="):
        read_record(other, NAME, "training")
    trained_model(other, NAME, dataset)
    assert training.call_count == 1
    assert recipe_of(other, NAME).is_that_of(read_record(other, NAME, "training")["recipe"])
    same_recipe = recipe_of(other, NAME) == recipe_of(settings, NAME)
    assert (find_record(settings, NAME, "training").parent != published) == same_recipe


@pytest.mark.parametrize(
    ("file", "damage"),
    [("model.safetensors", "truncated"), ("record.json", "truncated"), ("record.json", "roundings"),
     ("model.safetensors", "left out")],
)  # fmt: skip
def test_D8_damaged_ones_stay_and_are_not_used(published, settings, dataset, capsys, training, file, damage):
    """A record that came without weights is no model, which is nothing to be told of."""
    shutil.rmtree(settings.runs)
    if damage == "roundings":  # a name where fields should be
        write_json(published / file, read_json(published / file) | {"rounding": "float16"})
    elif damage == "left out":
        (published / file).unlink()
    else:
        spoil(published / file, damage)
    store._say_once.cache_clear()
    trained_model(settings, NAME, dataset)
    told = "is not used" in capsys.readouterr().out
    assert training.call_count == 1 and told == (published / file).exists() == (damage != "left out")
    assert not list(published.glob("*.aside-*"))
    assert find_record(settings, NAME, "training").parent == settings.runs / "models" / str(NAME)
