"""Training repeats itself to the bit, and goes on wherever it was stopped; `end_to_end/test_faults.py` kills it."""

import errno
import os
import shutil
import signal
import threading
from itertools import count
from unittest.mock import patch

import pandas as pd
import pytest
import torch
from spoiling import spoil
from torch.optim.optimizer import register_optimizer_step_pre_hook

from immunity_lib import train as training
from immunity_lib.files import DamagedFile, read_tensors, write_tensors
from immunity_lib.train import STOPPED, train

STEPS = 3  # of each of two epochs: 48 images in batches of 16
SIGNALS = {signal.SIGTERM: SystemExit, signal.SIGINT: KeyboardInterrupt}  # SIGINT is Ctrl-C


def checkpoint(folder):
    return folder / "checkpoint.safetensors"


def assert_same_run(*folders):
    """The same weights, momentum, random state and log, to the bit."""
    torch.testing.assert_close(*(read_tensors(checkpoint(one))[0] for one in folders), rtol=0, atol=0)
    logs = (pd.read_json(one / "log.jsonl", lines=True).drop(columns="seconds") for one in folders)
    pd.testing.assert_frame_equal(*logs, check_exact=True, check_like=True)


@pytest.fixture(scope="module")
def recipe(make_recipe):
    return make_recipe(epochs=2)


@pytest.fixture(scope="module")
def uninterrupted(recipe, dataset, tmp_path_factory):
    """The folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    train(recipe, dataset, folder)
    return folder


def stop_training(recipe, dataset, folder, call, number=signal.SIGTERM, name="training_loss"):
    """Train until a signal comes in the middle of this call of a function that training calls."""
    handler, function, calls = signal.getsignal(signal.SIGTERM), getattr(training, name), count(1)

    def interrupted(*arguments):
        if next(calls) == call:
            os.kill(os.getpid(), number)
        return function(*arguments)

    with patch.object(training, name, interrupted), pytest.raises(SIGNALS[number]) as stopped:
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
    recipe, dataset, tmp_path, uninterrupted, capsys, name, call, number
):
    """It costs an epoch at most, also where the log has that already."""
    folder, done = tmp_path / "run", (call - 1) // (STEPS if name == "training_loss" else 1)
    stop_training(recipe, dataset, folder, call, number, name)
    assert checkpoint(folder).exists() == (done > 0)
    assert f"run stopped; the same command goes on after epoch {done}" in capsys.readouterr().out
    torch.rand(5)  # the caller's random state is none of its business
    _, log = train(recipe, dataset, folder)
    assert ("run goes on after epoch" in capsys.readouterr().out) == (done > 0)
    assert_same_run(folder, uninterrupted)
    assert [entry["epoch"] for entry in log] == [1, 2]


def test_G10_adversarial_training_goes_on_too_and_momentum_in_the_memory_format_of_its_weight(
    make_recipe, dataset, tmp_path
):
    """Attacks draw random numbers within the batches. Momentum that is contiguous beside weights that are channels_last
    would make every step after a resume slow."""
    recipe, checked = make_recipe(regime="adversarial", epochs=2), []
    train(recipe, dataset, tmp_path / "uninterrupted")
    stop_training(recipe, dataset, tmp_path / "stopped", STEPS + 2)

    def check(optimiser, *_):
        for weight, state in optimiser.state.items():
            assert state["momentum_buffer"].stride() == weight.stride()
            checked.append(weight.is_contiguous())

    with register_optimizer_step_pre_hook(check):
        train(recipe, dataset, tmp_path / "stopped")
    assert not all(checked)  # the test is not vacuous
    assert_same_run(tmp_path / "stopped", tmp_path / "uninterrupted")


def test_training_outside_the_main_thread_handles_no_signal(recipe, dataset, tmp_path, uninterrupted):
    folder, handler = tmp_path / "thread", signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=train, args=(recipe, dataset, folder))
    thread.start()
    while thread.is_alive():
        assert signal.getsignal(signal.SIGTERM) is handler
        thread.join(0.1)
    assert_same_run(folder, uninterrupted)


def test_a_checkpoint_that_is_old_or_cannot_be_read_now_is_left_where_it_is(recipe, dataset, tmp_path, uninterrupted):
    """From before a field was there; with too many open files, or a storage that is away, it is gone on from later."""
    folder = shutil.copytree(uninterrupted, tmp_path / "run")
    tensors, notes = read_tensors(checkpoint(folder))
    del notes["recipe"]["cutout"]
    write_tensors(checkpoint(folder), tensors, notes)
    with (
        patch("immunity_lib.files.safe_open", side_effect=OSError(errno.EMFILE, "Too many open files")),
        pytest.raises(OSError, match="Too many open files"),
    ):
        train(recipe, dataset, folder)
    train(recipe, dataset, folder)
    assert not list(folder.glob("*.aside-*"))
    assert_same_run(folder, uninterrupted)
    with pytest.raises(DamagedFile, match="absent is not a whole file"):
        read_tensors(tmp_path / "absent")


WEIGHT, ONE = "model.gate.linear.weight", torch.zeros(1)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("truncated", "not a whole file"), ("empty", "not a whole file"), ("foreign", "not a whole file"),
        (lambda tensors, notes: notes.update(recipe={"epochs": 1}), "other settings or data"),
        (lambda tensors, notes: notes.update(data="0" * 64), "other settings or data"),
        (lambda tensors, notes: notes.pop("log"), "'log'"),
        (lambda tensors, notes: tensors.pop("random.cpu"), "random.cpu"),
        (lambda tensors, notes: tensors.pop(WEIGHT), "another version of the code"),
        (lambda tensors, notes: tensors.update({WEIGHT: ONE}), "another version of the code"),
        (lambda tensors, notes: tensors.update({"model.new": ONE}), "another version of the code"),
        (lambda tensors, notes: tensors.update({"momentum.0": ONE}), "another version of the code"),
    ],
)  # fmt: skip
def test_D7_unusable_checkpoint_is_set_aside_and_training_starts_anew(
    recipe, dataset, tmp_path, uninterrupted, capsys, change, reason
):
    folder = shutil.copytree(uninterrupted, tmp_path / "spoilt")
    if isinstance(change, str):
        spoil(checkpoint(folder), change)
    else:
        tensors, notes = read_tensors(checkpoint(folder))
        change(tensors, notes)
        write_tensors(checkpoint(folder), tensors, notes)
    spoilt = checkpoint(folder).read_bytes()
    train(recipe, dataset, folder)
    (aside,) = folder.glob("checkpoint.safetensors.aside-*")
    assert aside.read_bytes() == spoilt
    assert f"set aside as {aside}: " in (message := capsys.readouterr().err)
    assert reason in message and "training starts anew" in message
    assert_same_run(folder, uninterrupted)
