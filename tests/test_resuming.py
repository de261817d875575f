"""Training repeats itself to the bit, and survives a kill at any moment."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from spoiling import spoil

from immunity_lib import records, training
from immunity_lib.objective import training_loss
from immunity_lib.records import read_tensors, write_tensors
from immunity_lib.training import train

STEPS = 3  # of each of three epochs: 48 images in batches of 16


def weights(folder):
    """State of the model at the last checkpoint."""
    return read_tensors(folder / "checkpoint.safetensors")[0]


def assert_same_weights(found, expected):
    assert found.keys() == expected.keys()
    different = [key for key in expected if not torch.equal(found[key], expected[key])]
    assert not different


def without_times(log):
    return [{what: entry[what] for what in entry if what != "seconds"} for entry in log]


def logged(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def uninterrupted(make_recipe, dataset, tmp_path_factory):
    """The folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    train(make_recipe(), dataset, folder)
    return folder


def assert_same_run(folder, expected):
    """The same weights, momentum, random state and log, to the bit."""
    assert_same_weights(weights(folder), weights(expected))
    assert without_times(logged(folder)) == without_times(logged(expected))


def interrupt_after(monkeypatch, batches):
    """Training is killed in the middle of the batch that follows this many."""
    calls = []

    def loss(*arguments):
        calls.append(None)
        if len(calls) > batches:
            raise KeyboardInterrupt
        return training_loss(*arguments)

    monkeypatch.setattr(training, "training_loss", loss)


@pytest.mark.parametrize("batches", [1, STEPS, STEPS + 2, 2 * STEPS + 1])
def test_interrupted_run_ends_where_an_uninterrupted_one_does(
    make_recipe, dataset, tmp_path, monkeypatch, uninterrupted, batches
):
    folder = tmp_path / "interrupted"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, batches)
        train(make_recipe(), dataset, folder)
    done = batches // STEPS
    assert (folder / "checkpoint.safetensors").exists() == (done > 0)
    torch.rand(5)  # the caller's random state is none of its business
    _, log = train(make_recipe(), dataset, folder)
    assert_same_run(folder, uninterrupted)
    assert log == logged(folder) and [entry["epoch"] for entry in log] == [1, 2, 3]


def test_a_checkpoint_that_could_not_be_written_costs_one_epoch(
    make_recipe, dataset, tmp_path, monkeypatch, uninterrupted
):
    """Killed between the second epoch's log and its checkpoint: the log must not show it twice."""
    folder, replace = tmp_path / "interrupted", os.replace

    def fail(source, target):
        if str(target).endswith("checkpoint.safetensors") and target.exists():
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(records.os, "replace", fail)
        train(make_recipe(), dataset, folder)
    assert len(logged(folder)) == 2
    train(make_recipe(), dataset, folder)
    assert_same_run(folder, uninterrupted)


def sigterm_during(monkeypatch, name, call):
    """SIGTERM comes in the middle of this call of a function that training calls."""
    calls, function = [], getattr(training, name)

    def signalled(*arguments):
        calls.append(None)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return function(*arguments)

    monkeypatch.setattr(training, name, signalled)


def stopped_training(recipe, dataset, folder, monkeypatch, name, call):
    """Notes of the checkpoint that a SIGTERM leaves."""
    handler = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        sigterm_during(patch, name, call)
        train(recipe, dataset, folder)
    assert stopped.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is handler
    return read_tensors(folder / "checkpoint.safetensors")[1]


@pytest.mark.parametrize("batches", [1, STEPS, STEPS + 2])
def test_run_stopped_by_sigterm_goes_on_from_the_batch_just_done(
    make_recipe, dataset, tmp_path, monkeypatch, uninterrupted, capsys, batches
):
    folder = tmp_path / "stopped"
    notes = stopped_training(make_recipe(), dataset, folder, monkeypatch, "training_loss", batches)
    epochs, further = divmod(batches - 1, STEPS)
    assert len(notes["log"]) == epochs and notes["epoch"]["batches"] == further + 1
    place = f"after batch {further + 1} of {STEPS} of epoch {epochs + 1}; the same command"
    assert f"stopped stopped by SIGTERM {place}" in capsys.readouterr().out
    train(make_recipe(), dataset, folder)
    assert_same_run(folder, uninterrupted)


def test_run_stopped_after_every_batch_ends_where_an_uninterrupted_one_does(
    make_recipe, dataset, tmp_path, monkeypatch
):
    """Attacks draw random numbers within the batches too."""
    recipe = make_recipe(regime="adversarial", epochs=2)
    train(recipe, dataset, tmp_path / "uninterrupted")
    seconds = []
    for _ in range(2 * STEPS):
        notes = stopped_training(
            recipe, dataset, tmp_path / "stopped", monkeypatch, "training_loss", 1
        )
        seconds.append(notes["epoch"]["seconds"])
    _, log = train(recipe, dataset, tmp_path / "stopped")
    assert_same_run(tmp_path / "stopped", tmp_path / "uninterrupted")
    for epoch, entry in enumerate(log):  # the parts of an epoch add up
        parts = seconds[epoch * STEPS : (epoch + 1) * STEPS]
        assert 0 < parts[0] < parts[1] < parts[2] <= entry["seconds"] + 0.005


@pytest.mark.parametrize("name", ["diagnose", "write_log", "save_checkpoint"])
def test_sigterm_at_an_epoch_s_end_leaves_its_checkpoint(
    make_recipe, dataset, tmp_path, monkeypatch, uninterrupted, capsys, name
):
    folder = tmp_path / "stopped"
    notes = stopped_training(make_recipe(), dataset, folder, monkeypatch, name, 1)
    assert len(notes["log"]) == 1 and "epoch" not in notes
    assert "stopped by SIGTERM after epoch 1 of 3; the same" in capsys.readouterr().out
    train(make_recipe(), dataset, folder)
    assert_same_run(folder, uninterrupted)


def test_training_outside_the_main_thread_handles_no_signal(
    make_recipe, dataset, tmp_path, uninterrupted
):
    folder, handler = tmp_path / "thread", signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=train, args=(make_recipe(), dataset, folder))
    thread.start()
    while thread.is_alive():
        assert signal.getsignal(signal.SIGTERM) is handler
        thread.join(0.1)
    assert_same_run(folder, uninterrupted)


KILLED_RUN = """
import sys
from pathlib import Path
import torch
from immunity_lib.data import load_dataset
from immunity_lib.recipes import Recipe
from immunity_lib.training import train
torch.set_num_threads(1)
dataset = load_dataset("parts10", train_images=48, validation_images=16, test_images=32)
train(Recipe.model_validate_json(sys.argv[1]), dataset, Path(sys.argv[2]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_run_ended_by_a_signal_goes_on(make_recipe, dataset, tmp_path, number):
    recipe = make_recipe(epochs=6)
    folder = tmp_path / "ended"
    run = subprocess.Popen(
        [sys.executable, "-c", KILLED_RUN, recipe.model_dump_json(), str(folder)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while run.poll() is None and not (folder / "checkpoint.safetensors").exists():
        time.sleep(0.01)
    sent = time.monotonic()
    run.send_signal(number)
    status = run.wait()
    assert status == (143 if number == signal.SIGTERM else -signal.SIGKILL)
    assert time.monotonic() - sent < 10  # a batch takes a fraction of a second
    assert len(read_tensors(folder / "checkpoint.safetensors")[1]["log"]) < 6
    train(recipe, dataset, folder)
    train(recipe, dataset, tmp_path / "uninterrupted")
    assert_same_run(folder, tmp_path / "uninterrupted")


@pytest.mark.parametrize(
    "how", ["truncated", "empty", "flipped bit", "foreign", "of another kind", "other settings"]
)
def test_unusable_checkpoint_is_set_aside_and_training_starts_anew(
    make_recipe, dataset, tmp_path, uninterrupted, capsys, how
):
    folder = tmp_path / "spoilt"
    checkpoint = folder / "checkpoint.safetensors"
    if how == "other settings":
        train(make_recipe(epochs=1), dataset, folder)
    else:
        shutil.copytree(uninterrupted, folder)
    if how == "of another kind":
        write_tensors(checkpoint, {"weights": torch.ones(2)}, {"name": "a model"})
    elif how != "other settings":
        spoil(checkpoint, how)
    spoilt = checkpoint.read_bytes()
    capsys.readouterr()
    train(make_recipe(), dataset, folder)
    (aside,) = folder.glob("checkpoint.safetensors.aside-*")
    assert aside.read_bytes() == spoilt
    assert f"set aside as {aside}" in (message := capsys.readouterr().err)
    assert "training starts anew" in message
    assert_same_run(folder, uninterrupted)


@pytest.mark.parametrize("adversary", ["pgd", "ffgsm"])
def test_adversarial_training_repeats_itself_and_differs_from_standard(
    make_recipe, dataset, tmp_path, adversary
):
    recipe = make_recipe("moe", "adversarial", adversary=adversary, epochs=1)
    for run in ("once", "again"):
        train(recipe, dataset, tmp_path / run)
        torch.rand(3)
    assert_same_run(tmp_path / "again", tmp_path / "once")
    train(make_recipe("moe", epochs=1), dataset, tmp_path / "standard")
    assert logged(tmp_path / "standard")[0]["loss"] != logged(tmp_path / "once")[0]["loss"]
