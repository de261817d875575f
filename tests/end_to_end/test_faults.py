"""Nothing is lost: killed, out of disk, its data gone, the same command finishes, and its tables are those of an
undisturbed run, byte for byte.

Some forty kills, a few of them in the usual run of the tests; the rest, "node", take an hour. The moments are drawn
from a fixed seed, over the time that an undisturbed run takes."""

import os
import random
import shutil
import signal
import subprocess

import pandas as pd
import psutil
import pytest
import yaml
from graph import job_command, reproduce_command, tables, wait_for
from PIL import Image

from immunity_lib.data import find_source
from study.catalogue import ModelName
from study.settings import ROOT, load_preset
from study.store import checksum, own_folder, record_path

MODEL = ModelName.parse("parts10-immunity-googlenet-standard-seed0")
GRAPH = 240  # seconds that the smoke preset's takes


def often(count, usually):
    """Numbers from 0 to `count`; only the first few run outside of `make test-node`."""
    marks = [pytest.mark.slow] * usually + [pytest.mark.node] * (count - usually)
    return [pytest.param(number, marks=mark) for number, mark in enumerate(marks)]


def kill_all(run):
    os.killpg(run.pid, signal.SIGKILL)


def kill_after(command, seconds, victim=kill_all):
    """Run a command and kill it after some seconds, unless it has ended before."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    run = subprocess.Popen(command, cwd=ROOT, start_new_session=True, **quiet)
    try:
        run.wait(seconds)
    except subprocess.TimeoutExpired:
        victim(run)
        run.wait()


def finish(command, **environment):
    environment = os.environ | environment
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def moment(what, number, seconds):
    return random.Random(f"{what} {number}").uniform(0, seconds)


def settings_of(output, preset="smoke"):
    return load_preset(str(preset), output_folder=str(output))


def assert_same_tables(output, expected, preset="smoke"):
    found, wanted = (tables(settings_of(one, preset).figures) for one in (output, expected))
    assert found.keys() == wanted.keys() and len(wanted) >= 15
    assert not [name for name in wanted if found[name] != wanted[name]]


def weights(output):
    return checksum(own_folder(settings_of(output), MODEL) / "model.safetensors")


@pytest.mark.parametrize("number", often(18, usually=1))
def test_training_killed(smoke, tmp_path, number):
    """In a notebook of its own: the job, its kernel, or both at once."""
    command = job_command("02_training", "smoke", tmp_path, f"--model={MODEL}")

    def kill_kernel(run):
        for one in psutil.Process(run.pid).children(recursive=True):
            one.kill()

    victim = [kill_all, subprocess.Popen.kill, kill_kernel][number % 3]
    kill_after(command, moment("training", number, seconds=15), victim)
    finish(command)
    assert weights(tmp_path) == weights(smoke[0])


@pytest.mark.parametrize("number", often(18, usually=1))
def test_evaluation_killed(smoke, tmp_path, number):
    kind, notebook = [("attacks", "03_attacks"), ("adaptive", "06_adaptive_attacks")][number % 2]
    source, target = (settings_of(output) for output in (smoke[0], tmp_path))
    shutil.copytree(source.runs / "models", target.runs / "models")
    command = job_command(notebook, "smoke", tmp_path, f"--model={MODEL}")
    kill_after(command, moment("evaluation", number, seconds=20))
    finish(command)
    found, expected = (
        pd.read_parquet(record_path(settings, MODEL, kind).with_suffix(".parquet")) for settings in (target, source)
    )
    pd.testing.assert_frame_equal(found, expected)


@pytest.mark.parametrize("number", often(7, usually=1))
def test_graph_killed(smoke, tmp_path, number):
    """All of its processes, or the first of them alone; at another stage of it each time."""
    output, seconds = tmp_path / "output", GRAPH
    if number != 6:  # a part of it is done already
        shutil.copytree(smoke[0], output)
        draw = random.Random(number)
        runs, figures = output / "runs/smoke", output / "figures/smoke"
        if number == 0:  # in the usual run, most: one measurement, and what is drawn from it alone
            draw.choice(sorted(runs.glob("records/*-adversarial-*.attacks.json"))).unlink()
            for path in [*figures.glob("table2.*"), *figures.glob("claims.*")]:
                path.unlink()
        else:
            shutil.rmtree(draw.choice(sorted((runs / "models").iterdir())))
            for record in draw.sample(sorted((runs / "records").iterdir()), 3):
                record.unlink()
            shutil.rmtree(figures)
        seconds /= 8 if number == 0 else 4
    command = reproduce_command(output, "--jobs", "2")
    kill_after(command, moment("graph", number, seconds), [kill_all, subprocess.Popen.kill][number % 2])
    finish(command, OMP_NUM_THREADS="2")  # which would change the last bits of every sum
    assert_same_tables(output, smoke[0])


@pytest.fixture
def small_disk(tmp_path, request):
    """A folder with as much room as asked for, and a function that makes it larger."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={request.param}", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a file system of its own size cannot be mounted here")
    larger = ["mount", "-o", "remount,size=500m", str(folder)]
    yield folder, lambda: subprocess.run(larger, check=True)
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.node
@pytest.mark.parametrize("small_disk", ["700k"], indirect=True)
def test_training_on_a_full_disk(smoke, small_disk):
    """There is room for one checkpoint, and not for two."""
    folder, grow = small_disk
    command = job_command("02_training", "smoke", folder, f"--model={MODEL}")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert not list(folder.rglob(".*.part")), "what could not be written takes up room"
    grow()
    finish(command)
    assert weights(folder) == weights(smoke[0])


@pytest.mark.node
@pytest.mark.parametrize("small_disk", ["8m"], indirect=True)
def test_graph_on_a_full_disk(smoke, small_disk):
    """It runs full in the middle; with room again, the same command finishes."""
    folder, grow = small_disk
    command = reproduce_command(folder)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1500)
    assert done.returncode != 0 and "No space left on device" in done.stdout + done.stderr
    grow()
    finish(command)
    assert_same_tables(folder, smoke[0])


@pytest.mark.node
@pytest.mark.parametrize("gone", ["one image", "a class"])
def test_data_removed_in_the_middle(tmp_path, gone):
    """Of a data set of one's own: what comes behind either says so, or is made anew once the file is back."""
    data = tmp_path / "data"
    for split, count in (("train", 160), ("test", 64)):
        images = find_source("parts10").read(split, count)
        for number, (image, label) in enumerate(zip(images.images, images.labels, strict=True)):
            folder = data / split / f"class{label}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{number}.png")
    fields = yaml.safe_load((ROOT / "presets/smoke.yaml").read_text())
    fields |= {"preset": "own", "dataset": "images", "data_folder": "data", "regimes": ["standard"], "baselines": []}
    fields |= {"train_images": 128, "validation_images": 32, "test_images": 64}
    own = tmp_path / "own.yaml"
    own.write_text(yaml.safe_dump(fields))
    outputs = [tmp_path / "undisturbed", tmp_path / "disturbed"]
    finish(reproduce_command(outputs[0], preset=str(own)))
    command = reproduce_command(outputs[1], preset=str(own))
    victim = data / "test/class3" if gone == "a class" else min((data / "test/class3").iterdir())
    aside, models = tmp_path / "aside", outputs[1] / "runs/own/models"
    run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: run.poll() is not None or len(list(models.glob("*/record.json"))) >= 2, 1500)
    victim.rename(aside)
    _, printed = run.communicate(timeout=1500)
    if gone == "a class":
        assert run.returncode != 0 and "class3" in printed
    aside.rename(victim)
    finish(command)
    assert_same_tables(outputs[1], outputs[0], own)
