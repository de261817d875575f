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

from immunity_lib import files
from immunity_lib import train as training
from immunity_lib.files import read_tensors, write_tensors
from immunity_lib.train import STOPPED, train, training_loss

STEPS = 3  # of each of two epochs: 48 images in batches of 16
SIGNALS = {signal.SIGTERM: SystemExit, signal.SIGINT: KeyboardInterrupt}  # SIGINT is Ctrl-C


def checkpoint(folder):
    return folder / "checkpoint.safetensors"


def logged(folder):
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def assert_same_run(folder, expected):
    """The same weights, momentum, random state and log, to the bit."""
    ours, theirs = (read_tensors(checkpoint(one))[0] for one in (folder, expected))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert logged(folder) == logged(expected)


@pytest.fixture(scope="module")
def recipe(make_recipe):
    return make_recipe(epochs=2)


@pytest.fixture(scope="module")
def uninterrupted(recipe, dataset, tmp_path_factory):
    """The folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    train(recipe, dataset, folder)
    return folder


def stop_training(recipe, dataset, folder, monkeypatch, call, number=signal.SIGTERM,
                  name="training_loss"):  # fmt: skip
    """Train until a signal comes in the middle of this call of a function that training calls."""
    handler, function, calls = signal.getsignal(signal.SIGTERM), getattr(training, name), []

    def interrupted(*arguments):
        calls.append(None)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return function(*arguments)

    with monkeypatch.context() as patch, pytest.raises(SIGNALS[number]) as stopped:
        patch.setattr(training, name, interrupted)
        train(recipe, dataset, folder)
    assert signal.getsignal(signal.SIGTERM) is handler
    assert number != signal.SIGTERM or stopped.value.code == STOPPED == 143


@pytest.mark.parametrize(
    ("name", "call", "number"),
    [
        ("training_loss", 1, signal.SIGINT), ("training_loss", 1, signal.SIGTERM),
        ("training_loss", STEPS + 1, signal.SIGTERM), ("training_loss", 2 * STEPS, signal.SIGINT),
        ("diagnose", 2, signal.SIGINT), ("write_atomically", 2, signal.SIGTERM),
        ("_save", 2, signal.SIGTERM),
    ],
)  # fmt: skip
def test_D17_ctrl_c_and_sigterm_alike_end_training_at_once_and_it_goes_on(
    recipe, dataset, tmp_path, monkeypatch, uninterrupted, capsys, name, call, number
):
    """It costs an epoch at most, also where the log has that already."""
    folder, done = tmp_path / "run", (call - 1) // (STEPS if name == "training_loss" else 1)
    stop_training(recipe, dataset, folder, monkeypatch, call, number, name)
    assert checkpoint(folder).exists() == (done > 0)
    assert f"run stopped; the same command goes on after epoch {done}" in capsys.readouterr().out
    torch.rand(5)  # the caller's random state is none of its business
    _, log = train(recipe, dataset, folder)
    assert ("run goes on after epoch" in capsys.readouterr().out) == (done > 0)
    assert_same_run(folder, uninterrupted)
    assert [entry["epoch"] for entry in log] == [1, 2]


def test_adversarial_training_goes_on_where_it_stopped_too(
    make_recipe, dataset, tmp_path, monkeypatch
):
    """Attacks draw random numbers within the batches."""
    recipe = make_recipe(regime="adversarial", epochs=2)
    train(recipe, dataset, tmp_path / "uninterrupted")
    stop_training(recipe, dataset, tmp_path / "stopped", monkeypatch, STEPS + 2)
    train(recipe, dataset, tmp_path / "stopped")
    assert_same_run(tmp_path / "stopped", tmp_path / "uninterrupted")


def test_what_a_full_disk_leaves_is_not_in_the_way(
    recipe, dataset, tmp_path, monkeypatch, uninterrupted
):
    def fail(source, target):
        raise OSError("No space left on device")

    folder = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(files.os, "replace", fail)
        train(recipe, dataset, folder)
    assert not list(folder.iterdir())
    train(recipe, dataset, folder)
    assert_same_run(folder, uninterrupted)


def test_G10_momentum_goes_on_in_the_memory_format_of_its_weight(
    recipe, dataset, tmp_path, monkeypatch
):
    """Contiguous beside channels_last, every step after a resume would be slow."""
    stop_training(recipe, dataset, tmp_path / "run", monkeypatch, STEPS + 1)
    made, make = [], training.make_optimiser
    monkeypatch.setattr(training, "make_optimiser", lambda *of: made.append(make(*of)) or made[0])
    checked = []

    def loss(*arguments):
        for weight, state in made[0].state.items():
            assert state["momentum_buffer"].stride() == weight.stride()
            checked.append(weight.is_contiguous())
        return training_loss(*arguments)

    monkeypatch.setattr(training, "training_loss", loss)
    train(recipe, dataset, tmp_path / "run")
    assert not all(checked)  # the test is not vacuous


def test_training_outside_the_main_thread_handles_no_signal(
    recipe, dataset, tmp_path, uninterrupted
):
    folder, handler = tmp_path / "thread", signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=train, args=(recipe, dataset, folder))
    thread.start()
    while thread.is_alive():
        assert signal.getsignal(signal.SIGTERM) is handler
        thread.join(0.1)
    assert_same_run(folder, uninterrupted)


ENDED_RUN = """
import json, sys
from fractions import Fraction
from pathlib import Path
import torch
from immunity_lib.data import load_dataset
from immunity_lib.train import Recipe, train
torch.set_num_threads(1)
dataset = load_dataset("parts10", train_images=48, validation_images=16, test_images=32)
fields = json.loads(sys.argv[1])
fields |= {name: Fraction(fields[name]) for name in ("eps", "step_size")}
train(Recipe(**fields), dataset, Path(sys.argv[2]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_run_ended_by_a_signal_goes_on(make_recipe, dataset, tmp_path, number):
    recipe = make_recipe(epochs=6)
    folder = tmp_path / "ended"
    run = subprocess.Popen(
        [sys.executable, "-c", ENDED_RUN, json.dumps(recipe.as_json()), str(folder)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while run.poll() is None and not checkpoint(folder).exists():
        time.sleep(0.01)
    run.send_signal(number)
    status = run.wait(60)  # a batch takes a fraction of a second
    assert status == (STOPPED if number == signal.SIGTERM else -number)
    assert len(read_tensors(checkpoint(folder))[1]["log"]) < 6
    train(recipe, dataset, folder)
    train(recipe, dataset, tmp_path / "uninterrupted")
    assert_same_run(folder, tmp_path / "uninterrupted")


def without(tensors, key):
    return {name: one for name, one in tensors.items() if name != key}


def shortened(tensors, key):
    return tensors | {key: tensors[key][:1]}


WEIGHT = "model.gate.linear.weight"
# What became of a checkpoint's tensors and notes, and what is said of it
SPOILT = {
    "truncated": (spoil, "not a whole file"),
    "empty": (spoil, "not a whole file"),
    "foreign": (spoil, "not a whole file"),
    "other settings": (lambda t, n: (t, n | {"recipe": {"epochs": 1}}), "settings or data"),
    "other data": (lambda t, n: (t, n | {"data": "0" * 64}), "settings or data"),
    "another kind": (lambda t, n: (t, {"name": "a model"}), "'log'"),
    "a weight less": (lambda t, n: (without(t, WEIGHT), n), "another version of the code"),
    "a weight more": (lambda t, n: (t | {"model.new": t[WEIGHT].clone()}, n), "another version of"),
    "other shapes": (lambda t, n: (shortened(t, WEIGHT), n), "another version of the code"),
    "other momentum": (lambda t, n: (shortened(t, "momentum.0"), n), "another version of"),
    "no random state": (lambda t, n: (without(t, "random.cpu"), n), "random.cpu"),
}


@pytest.mark.parametrize("how", SPOILT)
def test_D7_unusable_checkpoint_is_set_aside_and_training_starts_anew(
    recipe, dataset, tmp_path, uninterrupted, capsys, how
):
    folder, (change, reason) = shutil.copytree(uninterrupted, tmp_path / "spoilt"), SPOILT[how]
    if change is spoil:
        spoil(checkpoint(folder), how)
    else:
        write_tensors(checkpoint(folder), *change(*read_tensors(checkpoint(folder))))
    spoilt = checkpoint(folder).read_bytes()
    capsys.readouterr()
    train(recipe, dataset, folder)
    (aside,) = folder.glob("checkpoint.safetensors.aside-*")
    assert aside.read_bytes() == spoilt
    message = capsys.readouterr().err
    assert f"set aside as {aside}: " in message and reason in message
    assert "training starts anew" in message
    assert_same_run(folder, uninterrupted)
