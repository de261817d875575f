"""A job of the graph: how it stands, ends, is asked to stop, and takes a GPU of its own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from filelock import FileLock

from immunity_lib import batch, reproduce
from immunity_lib.gpus import taken_gpus
from immunity_lib.recipes import trained_models
from immunity_lib.records import ROOT, read_record, read_tensors, write_record
from immunity_lib.settings import load_preset
from immunity_lib.stopping import STOPPED, sigterm_handed_on

MODEL = "parts10-moe-resnet18-standard-seed0"
LONG = 10_000  # epochs


@pytest.fixture
def preset(tmp_path):
    """A preset file of tiny models that train for ever, and its settings."""
    fields = yaml.safe_load((ROOT / "presets/smoke.yaml").read_text())
    fields |= {"preset": "long", "expert": "resnet18", "compared_experts": ["resnet18"]}
    fields |= {"baselines": [], "epochs": LONG, "train_images": 128, "batch_size": 32}
    path = tmp_path / "long.yaml"
    path.write_text(yaml.safe_dump(fields))
    return path, load_preset(str(path), output_folder=str(tmp_path))


def job(preset, *options):
    path, settings = preset
    return [
        sys.executable, "-m", "immunity_lib.batch", *options, f"--preset={path}",
        f"--output={settings.output_folder}",
    ]  # fmt: skip


def wait_for(found, seconds=60):
    deadline = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def state_of(settings, name):
    return read_record(settings.runs / "jobs" / f"{name}.json")


@pytest.mark.slow
def test_a_notebook_that_runs_says_so_and_one_that_fails_says_why(preset):
    _, settings = preset
    done = subprocess.run(job(preset, "00_start_here"), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert state_of(settings, "00_start_here")["state"] == "done"
    wrong = MODEL.replace("moe", "nothing")
    done = subprocess.run(
        job(preset, "02_training", f"--model={wrong}"), cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1
    state = state_of(settings, f"02_training-{wrong}")
    assert state["state"] == "failed" and wrong in state["error"]
    log = settings.runs / "notebooks" / f"02_training-{wrong}.log"
    assert f"02_training-{wrong} failed: {state['error']} (see {log})" in done.stderr
    assert "Traceback" in log.read_text() and wrong in log.read_text()


@pytest.mark.slow
def test_sigterm_writes_a_checkpoint_and_ends_at_once(preset):
    _, settings = preset
    name = f"02_training-{MODEL}"
    run = subprocess.Popen(
        job(preset, "02_training", f"--model={MODEL}"), cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    checkpoint = settings.runs / "models" / MODEL / "checkpoint.safetensors"
    wait_for(checkpoint.exists)
    below = psutil.Process(run.pid).children(recursive=True)
    run.send_signal(signal.SIGTERM)
    _, printed = run.communicate(timeout=20)
    assert run.returncode == STOPPED
    assert state_of(settings, name)["state"] == "stopped"
    assert "stopped by SIGTERM" in printed
    read_tensors(checkpoint)  # whole
    psutil.wait_procs(below, timeout=10)
    assert not [process for process in below if process.is_running()]


@pytest.mark.slow
def test_a_job_ends_with_the_graph_that_started_it(preset):
    """Killed without a word, the graph leaves nothing behind that trains on."""
    _, settings = preset
    command = job(preset, "02_training", f"--model={MODEL}")
    start = "import subprocess, sys; subprocess.run(sys.argv[1:], stderr=subprocess.DEVNULL)"
    graph = subprocess.Popen([sys.executable, "-c", start, *command], cwd=ROOT)
    wait_for((settings.runs / "models" / MODEL / "log.jsonl").exists)
    below = psutil.Process(graph.pid).children(recursive=True)
    assert len(below) >= 2, "the job and its kernel"
    graph.kill()
    graph.wait()
    _, alive = psutil.wait_procs(below, timeout=20)
    assert not alive
    assert state_of(settings, f"02_training-{MODEL}")["state"] == "stopped"


@pytest.mark.slow
def test_sigterm_to_the_graph_stops_its_jobs(preset):
    path, settings = preset
    graph = subprocess.Popen(
        [sys.executable, "-m", "immunity_lib.reproduce", "--preset", str(path), "--output",
         settings.output_folder, "--jobs", "2"],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_for(lambda: len(list(settings.runs.glob("models/*/checkpoint.safetensors"))) == 2, 120)
    below = psutil.Process(graph.pid).children(recursive=True)
    asked = time.monotonic()
    graph.send_signal(signal.SIGTERM)
    _, printed = graph.communicate(timeout=60)
    assert graph.returncode == STOPPED and "the same command goes on" in printed
    assert "2 stopped" in printed
    assert time.monotonic() - asked < 30
    assert not [process for process in below if process.is_running()]


@pytest.mark.slow
def test_a_node_with_two_gpus_trains_two_models_at_once(tmp_path):
    """However many cores it has; each job sees a GPU of its own (here, of none)."""
    fields = yaml.safe_load((ROOT / "presets/smoke.yaml").read_text())
    fields |= {"expert": "resnet18", "compared_experts": ["resnet18"], "baselines": []}
    preset = tmp_path / "smoke.yaml"
    preset.write_text(yaml.safe_dump(fields))
    settings = load_preset(str(preset), output_folder=str(tmp_path))
    described = tmp_path / "graph.json"
    write_record(described, {"preset": str(preset), "output_folder": str(tmp_path), "gpus": "0,1"})
    models = [str(name) for name in trained_models(settings)[:4]]
    wanted = [str(settings.runs / "models" / name / "record.json") for name in models]
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", *wanted, "--snakefile", str(ROOT / "Snakefile"),
         "--profile", str(ROOT / "profiles/gpu-node"), "--cores", "8", "--resources", "gpu=2",
         "--directory", str(settings.runs), "--configfile", str(described)],
        cwd=tmp_path, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    jobs = [state_of(settings, f"02_training-{name}") for name in models]
    for job in jobs:
        # Two at a time, on different GPUs; those of a job that follows another are free again
        beside = [other for other in jobs if other["started"] <= job["started"] < other["seen"]]
        assert len(beside) <= 2
        assert len({other["gpus"] for other in beside}) == len(beside)
    assert {job["gpus"] for job in jobs} == {"0", "1"}


HOLD = """
import sys, time
from pathlib import Path
from immunity_lib import reproduce
from immunity_lib.gpus import taken_gpus
with taken_gpus(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])) as gpus:
    print(gpus, flush=True)
    time.sleep(60)
"""


def holder(gpus, count, runs):
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, gpus, str(count), str(runs)], stdout=subprocess.PIPE, text=True
    )


def test_jobs_beside_each_other_take_different_gpus(tmp_path):
    """As many at once as there are GPUs; one more waits until another has ended, however."""
    runs = tmp_path / "runs"
    holders = [holder("0,1,2", 1, runs) for _ in range(3)]
    try:
        taken = [one.stdout.readline().strip() for one in holders]
        assert sorted(taken) == ["0", "1", "2"]
        holders.append(holder("0,1,2", 1, runs))
        time.sleep(1.5)
        assert holders[3].poll() is None
        holders[1].kill()
        assert holders[3].stdout.readline().strip() == taken[1]
    finally:
        for one in holders:
            one.kill()
            one.communicate()


def test_a_job_takes_several_gpus_or_none(tmp_path):
    runs = tmp_path / "runs"
    with taken_gpus("0,1,2,3", 2, runs) as first, taken_gpus("0,1,2,3", 2, runs) as second:
        assert (first, second) == ("0,1", "2,3")
    with taken_gpus("0,1", 1, runs) as gpus:
        assert gpus == "0"
        other = holder("0,1", 2, runs)
        time.sleep(2)
        # It did not keep the one that is free
        locks = sorted(runs.parent.rglob(".gpu-*-1.lock"))
        with FileLock(locks[0], timeout=5):
            pass
        other.kill()
        other.communicate()


def test_more_gpus_than_there_are_is_an_error(tmp_path):
    with (
        pytest.raises(ValueError, match="processes is 3, but this machine offers 2 GPUs"),
        taken_gpus("0,1", 3, Path(tmp_path)),
    ):
        pass


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["02_trainings", "--preset=smoke"], "valid names: 00_start_here, 01_expert_selection"),
        (["02_training", "--preset=smoke", "--model=../../x"], "'../../x' is no model's name"),
        (["02_training", "--preset=smokes"], "valid names: cifar10-small, demo, paper, smoke"),
    ],
)
def test_a_job_that_is_none_lists_the_valid_ones(arguments, told, capsys):
    assert batch.main(arguments) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--jobs", "0"], "--jobs is 0; it must be above 0"),
        (["--processes", "0"], "--processes is 0; it must be above 0"),
        (["--tflops", "-1"], "--tflops is -1.0; it must be above 0"),
        (["--processes", "3"], "3 processes cannot share"),
        (["--profile", "slrum"], "valid names: gpu-node, slurm"),
        (["--output", "a{b}"], "has a brace in its name"),
    ],
)
def test_a_wrong_option_is_told_before_anything_runs(options, told, capsys):
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert reproduce.main(["--preset", "smoke", *options]) == 2
    finally:
        signal.signal(signal.SIGTERM, before)
    assert told in capsys.readouterr().err


def test_sigterm_is_heard_beside_another_handler(monkeypatch):
    """Snakemake sets its own handler; children are told all the same."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    heard = []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append("by Snakemake"))
    try:
        with sigterm_handed_on(cluster=False) as stopped:
            assert not stopped.is_set()
            os.kill(os.getpid(), signal.SIGTERM)
            assert child.wait(10) == -signal.SIGTERM
            assert stopped.is_set() and heard == ["by Snakemake"]
        # Behind it, nothing listens any more
        os.kill(os.getpid(), signal.SIGTERM)
        assert heard == ["by Snakemake"] * 2
    finally:
        signal.signal(signal.SIGTERM, before)


def test_on_a_cluster_sigterm_cancels_the_jobs_as_ctrl_c_does():
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        with pytest.raises(KeyboardInterrupt), sigterm_handed_on(cluster=True):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
    finally:
        signal.signal(signal.SIGTERM, before)
