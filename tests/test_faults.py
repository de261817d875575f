"""Nothing is lost: killed, out of disk, its files damaged or gone, the same command finishes, and
its tables are those of an undisturbed run, byte for byte.

Fifty kills in all, a few of them in the usual run of the tests; the rest, marked "node", take half
an hour. The moments are drawn from a fixed seed, over the time that the undisturbed run took.
"""

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
import yaml
from graph import reproduce_command, tables
from PIL import Image
from spoiling import spoil

from immunity_lib.data import parts
from immunity_lib.models import own_folder
from immunity_lib.recipes import ModelName
from immunity_lib.records import ROOT, read_record, read_tensors
from immunity_lib.settings import load_preset

MODEL = ModelName.parse("parts10-immunity-resnet18-standard-seed0")


def often(count, usually):
    """Numbers from 0 to `count`; only the first few run outside of `make test-node`."""
    marks = [pytest.mark.slow] * usually + [pytest.mark.node] * (count - usually)
    return [pytest.param(number, marks=mark) for number, mark in enumerate(marks)]


def killed(command, seconds, victim=lambda run: os.killpg(run.pid, signal.SIGKILL)):
    """Run a command and kill it after some seconds, unless it has ended before."""
    run = subprocess.Popen(
        command, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        run.wait(seconds)
    except subprocess.TimeoutExpired:
        victim(run)
        run.wait()


def finished(command, **environment):
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True,
        timeout=1500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def moment(what, number, seconds):
    return random.Random(f"{what} {number}").uniform(0, seconds)


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    """The smallest preset whose graph has every kind of job."""
    fields = yaml.safe_load((ROOT / "presets/smoke.yaml").read_text())
    fields |= {"preset": "short", "regimes": ["standard"], "baselines": [], "weight_factors": []}
    fields |= {"expert": "resnet18", "compared_experts": ["resnet18"], "epochs": 3}
    fields |= {"train_images": 128, "batch_size": 32, "judged_images": 8, "attacked_images": 32}
    path = tmp_path_factory.mktemp("preset") / "short.yaml"
    path.write_text(yaml.safe_dump(fields))
    return path


def graph(preset, output):
    return reproduce_command(output, "--jobs", "2", preset=str(preset))


def job(preset, output, notebook):
    return [
        sys.executable, "-m", "immunity_lib.batch", notebook, f"--preset={preset}",
        f"--output={output}", f"--model={MODEL}",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(preset, tmp_path_factory):
    """A run of the graph that nothing disturbed, and how long it took, in seconds."""
    output = tmp_path_factory.mktemp("undisturbed")
    started = time.monotonic()
    # What a shell says of threads would change the last bits of every sum
    finished(graph(preset, output), OMP_NUM_THREADS="2")
    return output, time.monotonic() - started


def settings_of(preset, output):
    return load_preset(str(preset), output_folder=str(output))


def drawn(preset, output, *endings):
    return tables(settings_of(preset, output).figures, *endings)


def assert_same_tables(preset, output, expected):
    found, wanted = drawn(preset, output), drawn(preset, expected)
    assert found.keys() == wanted.keys() and len(wanted) >= 15
    assert not [name for name in wanted if found[name] != wanted[name]]


def weights(preset, output):
    """Their checksum: where long bytes differ, pytest would search for hours how to show it."""
    file = own_folder(settings_of(preset, output), MODEL) / "model.safetensors"
    return hashlib.sha256(file.read_bytes()).hexdigest()


# --- kills


@pytest.mark.parametrize("number", often(18, usually=2))
def test_training_killed(preset, undisturbed, tmp_path, number):
    """In a notebook of its own: the job, its kernel, or both at once."""
    expected, _ = undisturbed
    command = job(preset, tmp_path, "02_training")
    victims = [
        lambda run: os.killpg(run.pid, signal.SIGKILL),
        lambda run: run.kill(),
        lambda run: [one.kill() for one in psutil.Process(run.pid).children(recursive=True)],
    ]
    killed(command, moment("training", number, seconds=15), victims[number % 3])
    finished(command)
    assert weights(preset, tmp_path) == weights(preset, expected)


def numbers(preset, output, kind):
    path = settings_of(preset, output).runs / f"records/{MODEL}.{kind}.json"
    return [
        {what: value for what, value in entry.items() if what != "seconds"}
        for entry in read_record(path)["result"]["attacks"]
    ]


@pytest.mark.parametrize("number", often(18, usually=2))
def test_evaluation_killed(preset, undisturbed, tmp_path, number):
    expected, _ = undisturbed
    kind, notebook = [("attacks", "03_attacks"), ("adaptive", "06_adaptive_attacks")][number % 2]
    settings = settings_of(preset, tmp_path)
    source = settings_of(preset, expected).runs
    shutil.copytree(source / "models", settings.runs / "models")
    command = job(preset, tmp_path, notebook)
    killed(command, moment("evaluation", number, seconds=20))
    finished(command)
    assert numbers(preset, tmp_path, kind) == numbers(preset, expected, kind)


@pytest.mark.parametrize("number", often(14, usually=1))
def test_graph_killed(preset, undisturbed, tmp_path, number):
    """All of its processes, or the first of them alone; at another stage of it each time."""
    expected, seconds = undisturbed
    output = tmp_path / "output"
    if number % 7 != 6:  # a part of it is done already
        shutil.copytree(expected, output)
        draw = random.Random(number)
        runs, figures = output / "runs/short", output / "figures/short"
        for folder in draw.sample(sorted((runs / "models").iterdir()), 2):
            shutil.rmtree(folder)
        for record in draw.sample(sorted((runs / "records").iterdir()), 3):
            record.unlink()
        shutil.rmtree(figures)
        seconds /= 2
    victims = [lambda run: os.killpg(run.pid, signal.SIGKILL), lambda run: run.kill()]
    killed(graph(preset, output), moment("graph", number, seconds), victims[number % 2])
    finished(graph(preset, output))
    assert_same_tables(preset, output, expected)


# --- a full disk


@pytest.fixture
def small_disk(tmp_path, request):
    """A folder with as much room as asked for, and a function that makes it larger."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={request.param}", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a file system of its own size cannot be mounted here")

    def grow():
        subprocess.run(["mount", "-o", "remount,size=500m", str(folder)], check=True)

    yield folder, grow
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("small_disk", ["1m"], indirect=True)
def test_training_on_a_full_disk(preset, undisturbed, small_disk):
    """There is room for one set of weights, and not for two."""
    folder, grow = small_disk
    command = job(preset, folder, "02_training")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert not list(folder.rglob(".*.part")), "what could not be written takes up room"
    grow()
    finished(command)
    assert weights(preset, folder) == weights(preset, undisturbed[0])


@pytest.mark.node
@pytest.mark.parametrize("small_disk", ["8m"], indirect=True)
def test_graph_on_a_full_disk(preset, undisturbed, small_disk):
    """It runs full in the middle; with room again, the same command finishes."""
    folder, grow = small_disk
    done = subprocess.run(
        graph(preset, folder), cwd=ROOT, capture_output=True, text=True, timeout=1500
    )
    assert done.returncode != 0
    assert "No space left on device" in done.stdout + done.stderr
    grow()
    finished(graph(preset, folder))
    assert_same_tables(preset, folder, undisturbed[0])


# --- damaged and missing files


@pytest.mark.parametrize(
    "how",
    [
        pytest.param("truncated", marks=pytest.mark.slow),
        pytest.param("altered", marks=pytest.mark.node),
        pytest.param("empty", marks=pytest.mark.node),
    ],
)
def test_files_of_every_kind_damaged(preset, undisturbed, tmp_path, how):
    expected, _ = undisturbed
    output = tmp_path / "output"
    shutil.copytree(expected, output)
    runs, figures = output / "runs/short", output / "figures/short"
    damaged = [
        runs / f"models/{MODEL}/model.safetensors",
        runs / "models/parts10-moe-resnet18-standard-seed0/record.json",
        runs / "records/parts10-moe-mi-resnet18-standard-seed0.attacks.json",
        runs / "records/parts10-moe-resnet18-standard-seed0.scores.json",
        runs / "records/parts10-moe-resnet18-standard-seed0.adaptive.json",
        runs / "notebooks/04_ablation.ipynb",
        runs / "jobs/07_claims.json",
        runs / "graph.yaml",
        figures / "table1.csv", figures / "table2.md", figures / "table3.tex",
        figures / "figure2.png", figures / "figure1.pdf", figures / "stepper.html",
        figures / "claims.json", sorted(figures.glob("records/*.json"))[0],
    ]  # fmt: skip
    for path in damaged:
        spoil(path, how)
    before = drawn(preset, expected, "csv", "md", "tex", "png")
    done = finished(graph(preset, output))
    for path in damaged:
        assert path.exists(), path
    for path in damaged[:-8]:
        assert f"{path.name}.aside-" in done.stderr or path.name == "graph.yaml", path
    read_tensors(damaged[0])
    after = drawn(preset, output, "csv", "md", "tex", "png")
    assert not [name for name in before if after.get(name) != before[name]]


@pytest.mark.node
@pytest.mark.parametrize("gone", ["one image", "a class"])
def test_data_removed_in_the_middle(preset, tmp_path, gone):
    """Of a data set of one's own: what comes behind either says so, or is made anew once the file
    is back."""
    data = tmp_path / "data"
    for split, count in (("train", 160), ("test", 64)):
        images = parts.source().read(split, count)
        for number, (image, label) in enumerate(zip(images.images, images.labels, strict=True)):
            folder = data / split / f"class{label}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{number}.png")
    fields = yaml.safe_load(preset.read_text()) | {"dataset": "images", "data_folder": "data"}
    fields |= {"train_images": 128, "validation_images": 32, "test_images": 64}
    own = tmp_path / "own.yaml"
    own.write_text(yaml.safe_dump(fields))
    outputs = [tmp_path / "undisturbed", tmp_path / "disturbed"]
    finished(graph(own, outputs[0]))
    command = graph(own, outputs[1])
    victim = data / "test" / "class3"
    if gone == "one image":
        victim = sorted(victim.iterdir())[0]
    aside = tmp_path / "aside"
    run = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    models = outputs[1] / "runs/short/models"
    while run.poll() is None and len(list(models.glob("*/record.json"))) < 2:
        time.sleep(0.2)
    victim.rename(aside)
    _, printed = run.communicate(timeout=1500)
    if gone == "a class":
        assert run.returncode != 0 and "class3" in printed
    aside.rename(victim)
    finished(command)
    assert_same_tables(own, outputs[1], outputs[0])


def test_fifty_kills():
    """As this file says."""
    kills = (test_training_killed, test_evaluation_killed, test_graph_killed)
    counts = [len(test.pytestmark[0].args[1]) for test in kills]
    assert sum(counts) == 50
