"""Processes that train one model together do what one process does, up to rounding."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch

from immunity_lib import diagnosis, parallel, training
from immunity_lib.data import batches, load_dataset
from immunity_lib.data.batches import evaluation_batches, training_batches
from immunity_lib.models import model_folder, trained_model, training_record
from immunity_lib.objective import training_loss
from immunity_lib.parallel import train_together
from immunity_lib.recipes import ModelName, Recipe
from immunity_lib.records import read_tensors, write_tensors
from immunity_lib.training import TrainingLoss, build_model, train

in_two = partial(train_together, processes=2)

# What stands in each of the gradients compared below, as changes of a recipe of two ResNet18
GRADIENTS = {
    "heat maps": {"method": "immunity"},
    "heat maps of attacked images": {"method": "immunity", "regime": "adversarial"},
    "trades": {"method": "immunity", "regime": "trades"},
    "no heat maps": {"method": "moe"},
    "auxiliary classifier": {
        "method": "standalone",
        "model": {"expert": "pdarts", "layers": 3, "width": 0.1, "auxiliary_weight": 0.4},
    },
    "batch norms without weights": {
        "method": "immunity", "model": {"expert": "robnet-free", "layers": 3, "width": 0.1},
    },
}  # fmt: skip
EPOCHS_DONE = 0.75  # the warm-up is under way
UNEVEN = 44  # images, of which the last batch has 12 of 16


def tiny_data(count=48):
    return load_dataset("parts10", train_images=count, validation_images=16, test_images=32)


def gradients(recipe, dataset):
    """Of one batch: gradients, the state behind it, and the loss's parts on the whole batch."""
    model = build_model(recipe, dataset).train().double()
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            if parameter.ndim == 1:  # batch norms as in the middle of a training
                generator = torch.Generator().manual_seed(index)
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    loss = parallel.averaged(TrainingLoss(model, recipe), bool(recipe.auxiliary_weight))
    generator = torch.Generator().manual_seed(0)
    images, labels = next(training_batches(dataset.splits["train"], 16, generator))
    images = images.double()
    adversarial = None
    if recipe.adversary:  # attacked alike, wherever an image is trained on
        adversarial = (images + 4 / 255 * images.flip(-1).sub(0.5).sign()).clamp(0, 1)
    parts = loss(images, labels, EPOCHS_DONE, adversarial)
    parts.total.backward()
    found = {f"state.{key}": value.clone() for key, value in model.state_dict().items()}
    for key, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[f"gradient.{key}"] = parameter.grad
    values = training._joint_values(parts)
    return found | {f"value.{part}": torch.tensor(value) for part, value in values.items()}


@contextmanager
def in_double_precision():
    """Training within it has rounding errors that do not grow to anything."""

    def doubled(make):
        return lambda *args, **options: (
            (images.double(), labels) for images, labels in make(*args, **options)
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "build_model", lambda *args: build_model(*args).double())
        patch.setattr(training, "training_batches", doubled(training_batches))
        patch.setattr(diagnosis, "evaluation_batches", doubled(evaluation_batches))
        yield


def compute_shares(recipes, folder):
    """Gradients of each recipe, in a folder of each process; then a whole training."""
    recipes = {name: Recipe.model_validate_json(recipe) for name, recipe in recipes.items()}
    for name, recipe in recipes.items():
        found = gradients(recipe, tiny_data())
        write_tensors(folder / str(parallel.rank()) / f"{name}.safetensors", found, {})
    with in_double_precision():
        train(recipes["heat maps"], tiny_data(UNEVEN), folder / "run")


@pytest.fixture(scope="module")
def recipes(make_recipe):
    return {
        name: make_recipe(changes["method"], changes.get("regime", "standard")).model_copy(
            update=changes.get("model", {})
        )
        for name, changes in GRADIENTS.items()
    }


@pytest.fixture(scope="module")
def of_two(recipes, tmp_path_factory):
    """The folder of the gradients of two processes, in a folder for each."""
    folder = tmp_path_factory.mktemp("gradients")
    in_two(compute_shares, {name: one.model_dump_json() for name, one in recipes.items()}, folder)
    return folder


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_of_two_processes_are_those_of_the_joined_batch(name, recipes, dataset, of_two):
    """And so are running statistics and the parts of the loss."""
    expected = gradients(recipes[name], dataset)
    for rank in ("0", "1"):
        found, _ = read_tensors(of_two / rank / f"{name}.safetensors")
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            error = (found[key] - value).double().norm() / value.double().norm().clamp(min=1e-3)
            assert error < 1e-10, (key, error)  # 2e-12 was measured


def assert_alike(folder, expected):
    """Weights, momentum and logs of two runs in double precision are the same but for rounding."""
    one, other = (read_tensors(path / "checkpoint.safetensors") for path in (folder, expected))
    for key, value in other[0].items():
        if not key.startswith("random."):
            torch.testing.assert_close(one[0][key], value, rtol=1e-7, atol=1e-9)
    for entry, known in zip(one[1]["log"], other[1]["log"], strict=True):
        for what in ("cross_entropy", "mutual_information_loss", "position_stability_loss", "loss"):
            assert entry[what] == pytest.approx(known[what], rel=1e-8)
        assert entry["epoch"] == known["epoch"]


def test_training_of_two_processes_ends_where_that_of_one_does(recipes, of_two, tmp_path):
    with in_double_precision():
        _, log = train(recipes["heat maps"], tiny_data(UNEVEN), tmp_path)
        _, found = train(recipes["heat maps"], tiny_data(UNEVEN), of_two / "run")  # loads it
    assert [entry["processes"] for entry in log] == [1, 1, 1]
    assert [entry["processes"] for entry in found] == [2, 2, 2]
    assert_alike(of_two / "run", tmp_path)


def train_and_be_stopped(recipe, folder, batches):
    """The processes are told to end in the middle of the batch after this many."""
    calls = []

    def loss(*arguments):
        calls.append(None)
        if len(calls) > batches and parallel.rank() == 0:
            os.kill(os.getppid(), signal.SIGTERM)
            time.sleep(2)  # until it has reached all processes
        return training_loss(*arguments)

    training.training_loss = loss
    with in_double_precision():
        train(Recipe.model_validate_json(recipe), tiny_data(), folder)


def train_alone_and_be_stopped(recipe, dataset, folder, monkeypatch):
    def loss(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return training_loss(*arguments)

    with monkeypatch.context() as patch, pytest.raises(SystemExit), in_double_precision():
        patch.setattr(training, "training_loss", loss)
        train(recipe, dataset, folder)


@pytest.mark.slow
def test_the_number_of_processes_may_change_in_the_middle_of_an_epoch(
    recipes, dataset, tmp_path, monkeypatch, capfd
):
    recipe, folder = recipes["heat maps"], tmp_path / "changing"
    train_alone_and_be_stopped(recipe, dataset, folder, monkeypatch)
    with pytest.raises(SystemExit) as stopped:
        in_two(train_and_be_stopped, recipe.model_dump_json(), folder, 3)
    assert stopped.value.code == 143 and not multiprocessing.active_children()
    notes = read_tensors(folder / "checkpoint.safetensors")[1]
    assert len(notes["log"]) == 1 and notes["epoch"]["batches"] in (2, 3)
    assert capfd.readouterr().out.count("stopped by SIGTERM after batch") == 2  # once by each run
    with in_double_precision():
        _, log = train(recipe, dataset, folder)
        train(recipe, dataset, tmp_path / "alone")
    assert [(entry["epoch"], entry["processes"]) for entry in log] == [(1, 2), (2, 1), (3, 1)]
    assert_alike(folder, tmp_path / "alone")


def fail_in_one(how):
    if parallel.rank() == 1:
        if how == "an error":
            raise ValueError("the second has had enough")
        os.kill(os.getpid(), signal.SIGKILL)
    parallel.agreed(True)  # waits for the second, which never comes
    time.sleep(600)


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("an error", "ValueError: the second has had enough"),
        pytest.param("a signal", "-9", marks=pytest.mark.slow),
    ],
)
def test_one_that_fails_ends_the_others(how, told):
    with pytest.raises(RuntimeError, match="one failed") as error:
        in_two(fail_in_one, how)
    assert told in str(error.value) and not multiprocessing.active_children()


def at_work(pid):
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()  # ended, but not waited for


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_processes_end_with_the_one_that_started_them(number):
    code = "import time; from immunity_lib.parallel import train_together as together; "
    code += "together(time.sleep, 600, processes=2)"
    parent = subprocess.Popen([sys.executable, "-c", code])
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    while len(started := children.read_text().split()) < 3:  # and one that tracks resources
        time.sleep(0.1)
    time.sleep(1)
    parent.send_signal(number)
    assert parent.wait(60) == (143 if number == signal.SIGTERM else -number)
    deadline = time.monotonic() + 60
    while any(at_work(pid) for pid in started):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
def test_a_model_is_trained_by_processes_and_then_loaded(make_settings, dataset, tmp_path, capfd):
    name = ModelName.parse("parts10-immunity-resnet18-standard-seed0")
    alone, together = (
        make_settings(output_folder=str(tmp_path / str(count)), epochs=1, processes=count)
        for count in (1, 2)
    )
    expected = trained_model(alone, name, dataset).state_dict()
    found = trained_model(together, name, dataset).state_dict()
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-3)
    record = training_record(together, name)
    assert record["processes"] == [2] and training_record(alone, name)["processes"] == [1]
    assert not (model_folder(together, name) / "checkpoint.safetensors").exists()
    assert capfd.readouterr().out.count(f"{name} epoch 1/1") == 2  # once by each run
    trained_model(alone.model_copy(update={"output_folder": together.output_folder}), name, dataset)
    assert "training" not in capfd.readouterr().out  # how many trained it does not matter


def test_shares_of_a_batch_are_equal_and_make_it_up(dataset, monkeypatch):
    """Of 45 images, the last batch has 13, and loses one."""
    image_set = dataset.splits["train"].first(45)

    def share(rank, processes):
        monkeypatch.setattr(batches, "rank", lambda: rank)
        monkeypatch.setattr(batches, "processes", lambda: processes)
        return list(training_batches(image_set, 16, torch.Generator().manual_seed(0), cutout=8))

    whole, first, second = share(0, 1), share(0, 2), share(1, 2)
    assert [len(labels) for _, labels in first] == [len(labels) for _, labels in second]
    assert [len(labels) for _, labels in first] == [8, 8, 6]
    for (images, labels), *shares in zip(whole, first, second, strict=True):
        count = len(labels) // 2 * 2
        for rank, (some_images, some_labels) in enumerate(shares):
            assert torch.equal(some_images, images[rank:count:2])
            assert torch.equal(some_labels, labels[rank:count:2])


def test_batches_that_cannot_be_shared_equally_are_an_error(make_settings, dataset, monkeypatch):
    told = "batch_size is 16, which 3 processes cannot share equally"
    with pytest.raises(ValueError, match=told):
        make_settings(processes=3)
    monkeypatch.setattr(batches, "processes", lambda: 3)  # a recipe's own, of a baseline
    with pytest.raises(ValueError, match=told):
        training_batches(dataset.splits["train"], 16, torch.Generator())


def test_more_processes_than_gpus_are_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="processes is 2, but this machine offers 1 GPUs"):
        in_two(time.sleep, 0)
