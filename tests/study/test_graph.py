"""The graph's commands: how a job runs and ends, what the front door refuses, and what the status says."""

import os
import re
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from unittest.mock import Mock

import psutil
import pytest
import torch
import yaml
from filelock import FileLock
from graph import job_command, reproduce_command, wait_for

from study import store
from study.catalogue import measured_models, recipe_of, trained_models
from study.graph import checks, job, plan, run, status
from study.graph.cost import cost_of
from study.settings import ROOT, load_preset
from study.store import WEIGHTS, own_folder, read_json, record_path, write_atomically, write_json

MODEL = "parts10-moe-resnet18-standard-seed0"


def smoke_preset(folder, **changes):
    """A preset file of one small network, and its settings with that folder for its results."""
    small = {"expert": "resnet18", "compared_experts": ["resnet18"], "baselines": []}
    fields = yaml.safe_load((ROOT / "presets/smoke.yaml").read_text()) | small | changes
    (folder / "mine.yaml").write_text(yaml.safe_dump(fields))
    return folder / "mine.yaml", load_preset(str(folder / "mine.yaml"), output_folder=str(folder))


def state_of(settings, name):
    return read_json(settings.runs / "jobs" / f"{name}.json")


# --- a job


@pytest.mark.slow
def test_B2_B3_B4_a_job_runs_its_own_interpreter_wherever_it_is_started(tmp_path):
    """Beside another kernel of the same name, a start-up file and a long TMPDIR; and for a user whose home cannot be
    written to, with a window for figures, settings of matplotlib and Jupyter, and packages of his own."""
    kernel = tmp_path / "jupyter/kernels/python3"
    startup = tmp_path / "ipython/profile_default/startup"
    temporary = tmp_path / ("t" * (82 - len(str(tmp_path))))
    for folder in (kernel, startup, temporary):
        folder.mkdir(parents=True)
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nfigure.dpi: nothing\n")
    (tmp_path / "jupyter/jupyter_config.json").write_text("{")
    (tmp_path / "jupyter/matplotlib.py").write_text("raise ImportError('of another Python')")
    write_json(kernel / "kernel.json", {"argv": ["false"], "display_name": "x", "language": "x"})
    (startup / "00.py").write_text(f"from math import pi; open('{tmp_path}/ran', 'w').close()")
    places = dict.fromkeys(("JUPYTER_PATH", "JUPYTER_CONFIG_DIR", "PYTHONPATH"), tmp_path / "jupyter")
    places |= dict.fromkeys(("HOME", "XDG_CACHE_HOME", "MPLCONFIGDIR", "PYTHONSTARTUP"), "/dev/null/x")
    places |= {"IPYTHONDIR": tmp_path / "ipython", "TMPDIR": temporary, "MATPLOTLIBRC": tmp_path / "matplotlibrc"}
    told = {"MPLBACKEND": "TkAgg", "LC_ALL": "C", "PYTHONOPTIMIZE": "1", "COLUMNS": "7", "TQDM_DISABLE": "1"}
    environment = os.environ | {name: str(path) for name, path in places.items()} | told
    command = job_command("00_start_here", "smoke", tmp_path)
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert read_json(tmp_path / "runs/smoke/jobs/00_start_here.json")["state"] == "done"
    assert not (tmp_path / "ran").exists()


def test_B2_neighbours_a_kernel_computes_alike_whatever_a_shell_says():
    told = {"MKL_NUM_THREADS": "7", "OMP_NUM_THREADS": "7", "PYTHONOPTIMIZE": "1", "PYTHONWARNINGS": "error"}
    asked = "import sys, torch; print(torch.get_num_threads(), __debug__, sys.flags.utf8_mode, sys.warnoptions)"
    environment = os.environ | told | {"PYTHONUTF8": "0", "PYTHONPATH": "/x"} | job.SURROUNDINGS
    found = subprocess.check_output([sys.executable, "-c", asked], env=environment)
    assert found.split() == [b"1", b"True", b"1", b"[]"]


@pytest.mark.slow
def test_B10_a_job_that_fails_says_the_error_and_its_first_line(tmp_path):
    wrong = MODEL.replace("resnet18", "densenet121")
    command = job_command("02_training", "smoke", tmp_path, f"--model={wrong}")
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    state = read_json(tmp_path / f"runs/smoke/jobs/02_training-{wrong}.json")
    assert state["state"] == "failed"
    assert state["error"].startswith("ValueError: ") and wrong in state["error"]
    log = tmp_path / f"runs/smoke/notebooks/02_training-{wrong}.log"
    assert f"02_training-{wrong} failed: {state['error']} (see {log})" in done.stderr
    assert "Traceback" in log.read_text()


@pytest.fixture
def training(tmp_path):
    """A command's process and those below it, once so many models have one epoch of ten thousand; the settings."""

    def start(command_of, models=1):
        preset, settings = smoke_preset(tmp_path, preset="long", epochs=10_000, train_images=128, batch_size=32)
        started = subprocess.Popen(
            command_of(preset, settings.output_folder), cwd=ROOT, text=True, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, start_new_session=True,  # a shell in the background has Ctrl-C ignored
        )  # fmt: skip
        checkpoints = "models/*/checkpoint.safetensors"
        wait_for(lambda: len(list(settings.runs.glob(checkpoints))) == models, 300)
        return started, psutil.Process(started.pid).children(recursive=True), settings

    return start


TRAINING_JOB = lambda preset, output: job_command("02_training", preset, output, f"--model={MODEL}")  # noqa: E731
TWO_JOBS = lambda preset, output: reproduce_command(output, "--jobs", "2", preset=str(preset))  # noqa: E731


def still_running(processes):
    return [one for one in processes if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(("command_of", "models"), [(TRAINING_JOB, 1), (TWO_JOBS, 2)])
def test_what_is_asked_to_stop_ends_with_all_below_it_and_keeps_the_last_epoch(training, number, command_of, models):
    """A graph also where it is asked again while it waits for its jobs."""
    started, below, settings = training(command_of, models)
    for _ in range(models):
        started.send_signal(number)
        time.sleep(0.2)
    _, printed = started.communicate(timeout=60)
    assert started.returncode == 128 + number
    assert ("2 stopped" in printed and "the same command goes on" in printed) == (models == 2)
    assert below and not still_running(below)
    names = [checkpoint.parent.name for checkpoint in settings.runs.glob("models/*/checkpoint.safetensors")]
    assert [state_of(settings, f"02_training-{name}")["state"] for name in names] == ["stopped"] * models


@pytest.mark.slow
def test_a_job_ends_with_the_graph_that_started_it(training):
    """Killed without a word, the graph leaves nothing behind that trains on."""
    start = "import subprocess, sys; subprocess.run(sys.argv[1:], stderr=subprocess.DEVNULL)"
    graph, below, settings = training(lambda *given: [sys.executable, "-c", start, *TRAINING_JOB(*given)])
    assert len(below) >= 2, "the job and its kernel"
    graph.kill()
    graph.wait()
    wait_for(lambda: not still_running(below), 30)
    assert state_of(settings, f"02_training-{MODEL}")["state"] == "stopped"


# --- GPUs


@pytest.mark.parametrize(
    ("inherited", "count", "expected"),
    [("7, GPU-d5b7a1cc,3", 2, ["7", "GPU-d5b7a1cc"]), (None, 2, ["0", "1"]), ("", 0, []), ("NoDevFiles", 0, []),
     ("MIG-1, MIG-2", 1, ["MIG-1", "MIG-2"]),
     *((named, 0, None) for named in ("0", "2,3", "GPU-d5b7a1cc", "MIG-GPU-d5b7a1cc/1/0"))],
)  # fmt: skip
def test_D2_G3_G5_jobs_take_gpus_of_the_inherited_list(monkeypatch, inherited, count, expected):
    """Those that are named and not found are told beforehand."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    monkeypatch.setattr("torch.cuda.is_available", lambda: count > 0)
    monkeypatch.setattr(os, "environ", {} if inherited is None else {"CUDA_VISIBLE_DEVICES": inherited})
    if expected is None:
        with pytest.raises(ValueError, match=f"CUDA_VISIBLE_DEVICES is '{inherited}', but PyTorch finds no GPU.*-1"):
            checks.visible_gpus()
    else:
        assert checks.visible_gpus() == expected


@pytest.mark.parametrize(
    ("text", "given"),
    [("", True), ("set-resources: {train: {runtime: 9}, ablation: {gpu: 0}}", True),
     ("set-resources: {train: {runtime: 9, gpu: 0}}", False), ("set-resources: ['train:gpu=0']", False)],
)  # fmt: skip
def test_G9_memory_of_a_gpu_is_not_asked_of_its_node_nor_more_cores_than_a_job_uses(tmp_path, text, given):
    (tmp_path / "config.yaml").write_text(f"executor: slurm\n{text}\n")
    assert checks.gives_gpus(tmp_path) == given
    assert checks.gives_gpus(ROOT / "profiles/slurm")
    assert job.SURROUNDINGS["OMP_NUM_THREADS"] == "1" and "threads:" not in (ROOT / "Snakefile").read_text()


HOLD = """
import sys, time
from study.graph import job
with job.free_gpu(sys.argv[1]) as gpu:
    print(gpu, flush=True)
    time.sleep(600)
"""


def test_jobs_beside_each_other_take_different_gpus(tmp_path):
    """As many at once as there are GPUs; one more waits until another has ended, however."""

    command = [sys.executable, "-c", HOLD, "2,MIG-GPU-d5b7/1/0,5,2"]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    heard = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}

    def hold(**allocation):
        return subprocess.Popen(command, env=environment | allocation, **heard)

    holders = [hold() for _ in range(4)]
    try:
        taken = [one.stdout.readline().strip() for one in holders]
        assert sorted(taken) == ["2", "2", "5", "MIG-GPU-d5b7/1/0"]  # one of them may be shared by two
        holders.append(hold())
        assert "waits until another job leaves one of the GPUs" in holders[4].stderr.readline()
        holders.append(hold(SLURM_JOB_ID="7"))  # whose GPU 2 is another one
        assert holders[5].stdout.readline().strip() == "2"
        holders[1].kill()
        assert holders[4].stdout.readline().strip() == taken[1]
    finally:
        for one in holders:
            one.kill()
            one.communicate()


@pytest.mark.node
def test_a_node_with_two_gpus_trains_two_models_at_once(snakemake, tmp_path):
    """However many cores it has; each job sees a GPU of its own (here, of none)."""
    preset, settings = smoke_preset(tmp_path)
    config = {"preset": str(preset), "output_folder": str(tmp_path), "gpus": "2,GPU-d5b7a1cc"}
    models = trained_models(settings)[:4]
    wanted = [str(settings.runs / f"models/{name}/record.json") for name in models]
    done = snakemake(config, *wanted, "--profile", str(ROOT / "profiles/gpu-node"), "--resources", "gpu=2")
    assert done.returncode == 0, done.stderr[-3000:]
    jobs = [state_of(settings, f"02_training-{name}") for name in models]
    assert {one["gpu"] for one in jobs} == {"2", "GPU-d5b7a1cc"}
    for one in jobs:  # two at a time, on different GPUs, that are free again for jobs that follow
        beside = [other["gpu"] for other in jobs if other["started"] <= one["started"] < other["seen"]]
        assert len(beside) == len(set(beside)) <= 2


# --- the front door


def assert_told(told, capsys):
    assert re.search(told, said := capsys.readouterr().err), said


@pytest.mark.parametrize(
    ("command", "options", "changes", "told"),
    [
        (run, ["--jobs", "0"], {}, "--jobs is 0; it must be above 0"),
        (run, ["--data", "https://host/data"], {}, "'https://host/data' is an address"),
        (job, ["02_trainings"], {}, "choose from '?00_start_here"),
        (job, ["02_training", "--model=../../x"], {}, "--model: invalid .*'../../x'"),
        (plan, ["--tflops", "0"], {}, "--tflops is 0.0; it must be above 0"),
        (run, ["--preset=smokes"], {}, "unknown preset 'smokes'; valid names: .*demo, paper, .*smoke"),
        (status, ["--preset=smokes"], {}, "unknown preset 'smokes'; valid names: .*demo, paper, .*smoke"),
        (plan, [], {"width": 3.0, "controls": ["standalone-wide"]}, "width is 4.24"),
        (status, [], {"width": 3.0, "controls": ["standalone-wide"]}, "width is 4.24"),
        (plan, [], {"dataset": "cifar10", "validation_images": 60_000, "train_images": None},
         "validation_images is 60000"),
    ],
)  # fmt: skip
def test_C6_a_wrong_option_or_preset_is_told_before_anything_runs(tmp_path, command, options, changes, told, capsys):
    preset, settings = smoke_preset(tmp_path, adaptive=["moe"], **changes)
    settings.runs.mkdir(parents=True)
    with pytest.raises(SystemExit, match="2"):
        command.main([f"--preset={preset}", f"--output={tmp_path}", *options])
    assert_told(told, capsys)


def test_all_that_stands_in_the_way_is_told_at_once(tmp_path, monkeypatch, capsys):
    """Of names, data, models, disk, memory and GPUs, before anything is computed."""
    images = tmp_path / "one class"
    (images / "a").mkdir(parents=True)
    preset, _ = smoke_preset(
        tmp_path, width=3.0, controls=["standalone-wide"], adaptive=["moe"],
        further_datasets=["images"], data_folder=str(images),
    )  # fmt: skip
    gpu = {
        "is_available": True,
        "device_count": 1,
        "get_device_capability": (7, 0),
        "get_device_name": "Old",
        "get_arch_list": ["sm_75"],
    }
    gpu["get_device_properties"] = SimpleNamespace(name="Old", total_memory=10**9)
    for function, value in gpu.items():
        monkeypatch.setattr(f"torch.cuda.{function}", lambda *_, value=value: value)
    monkeypatch.setattr(checks, "disk_usage", lambda _: SimpleNamespace(free=10**6))
    output = tmp_path / "{x}"
    with pytest.raises(SystemExit, match="2"):
        run.main([f"--preset={preset}", f"--output={output}", "--profile=slrum"])
    told = capsys.readouterr().err
    for one in (
        "has a brace in its name", "unknown profile 'slrum'; valid names: gpu-node, slurm", "make room",
        "-standalone-wide-resnet18-standard-seed0 cannot be trained: width is 4.24", "one class' has 1 class folders",
        "but Old has 1.0 GB", "GPU 0 (Old) has compute capability 7.0, for which PyTorch",
    ):  # fmt: skip
        assert told.count(one) == 1, told
    assert not output.exists()


def test_a_driver_that_is_too_old_is_told_in_a_sentence(tmp_path, monkeypatch):
    """NVML counts its GPUs, which CUDA cannot use."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(store, "DEVICES", tmp_path)
    with pytest.raises(ValueError, match="can use no GPU, though there is .*nvidia0.*; mend the driver"):
        checks.look_ahead(smoke_preset(tmp_path)[1], "", jobs=1)


def test_a_gpu_too_small_for_measuring_at_full_speed_is_not_refused(tmp_path, monkeypatch):
    """Measuring goes on with fewer images at a time; a CPU's memory, once it is out, ends the process."""
    settings = smoke_preset(tmp_path, batch_size=8, compiled=False)[1]
    cost = cost_of(settings.recipe, 10)
    assert cost["least"] < cost["memory"] / 2
    monkeypatch.setattr(checks, "memory", lambda _: (checks.BYTES_OF_LIBRARIES + 2 * cost["least"], "One"))
    monkeypatch.setattr(checks, "missing_kernels", list)
    monkeypatch.setattr(checks, "visible_gpus", lambda: ["0"])
    checks.look_ahead(settings, "", jobs=1)
    monkeypatch.setattr(checks, "visible_gpus", list)
    with pytest.raises(ValueError, match="but One has"):
        checks.look_ahead(settings, "", jobs=1)


@pytest.mark.parametrize(("gpus", "option"), [([], "JOBS"), (["0"], "--jobs-per-gpu")])
def test_more_jobs_beside_each_other_than_memory_surely_holds_are_told(tmp_path, monkeypatch, capsys, gpus, option):
    monkeypatch.setattr(checks, "memory", lambda _: (25 * 10**8, "One"))
    monkeypatch.setattr(checks, "visible_gpus", lambda: gpus)
    monkeypatch.setattr(checks, "missing_kernels", list)
    checks.look_ahead(smoke_preset(tmp_path, compiled=False)[1], "", jobs=3, jobs_per_gpu=3)
    told = rf"3 jobs beside each other may take 3\.\d GB of memory of 2\.5 GB; {option}=2 surely fits"
    assert re.search(told, capsys.readouterr().err)


@pytest.mark.parametrize(("capability", "runs"), [((8, 6), True), ((9, 0), True), ((10, 0), True), ((7, 0), False)])
def test_G4_a_gpu_without_kernels_is_named(monkeypatch, capability, runs):
    """Those for 8.0 run on 8.6, and what is compiled at run time on any later one."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: capability)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: "One")
    monkeypatch.setattr("torch.cuda.get_arch_list", lambda: ["sm_80", "sm_90a", "compute_90"])
    assert bool(checks.missing_kernels()) != runs


@pytest.mark.parametrize(
    ("compiled", "device", "lacking"),
    [("auto", "cpu", []), (True, "cpu", ["a C"]), ("auto", "cuda", ["Triton", "a C"]), (False, "cuda", [])],
)
def test_what_compiles_a_step_is_looked_for_where_one_is_compiled(make_recipe, monkeypatch, compiled, device, lacking):
    monkeypatch.setattr(checks, "has_triton", lambda: False)
    monkeypatch.setenv("PATH", "/nowhere")
    found = checks.missing_compilers([make_recipe(compiled=compiled)], torch.device(device))
    assert [re.search(r"for which (a C|Triton).* is not here; install it, or set", one)[1] for one in found] == lacking


@pytest.fixture
def pretended(monkeypatch, tmp_path):
    """A run of the smoke preset whose Snakemake only notes what it was given."""
    given = {}

    def note(arguments):
        given.update(arguments=arguments, profile=os.environ.get("SNAKEMAKE_PROFILE"))
        given["cache"] = os.environ["XDG_CACHE_HOME"]

    monkeypatch.setattr("snakemake.cli.main", note)
    monkeypatch.setattr(run, "hand_on_signals", list)  # these are the tests' own

    def start(*options):
        assert run.main(["--preset", "smoke", "--output", str(tmp_path), *options]) == 0
        given["config"] = yaml.safe_load((tmp_path / "runs/smoke/graph.yaml").read_text())
        return given

    return start


def test_D3_only_the_command_says_which_profile(pretended, monkeypatch, tmp_path):
    """One that submits hands on what the plan says."""
    monkeypatch.setenv("SNAKEMAKE_PROFILE", "submits-everything")
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/read-only")
    monkeypatch.setattr(run, "requests", lambda *_: {"01_expert_selection": {"runtime": 7}})
    given = pretended()
    assert given["profile"] is None and "--profile" not in given["arguments"]
    assert given["cache"] == str(tmp_path / "runs/smoke/.cache")
    assert given["arguments"][given["arguments"].index("--workflow-profile") + 1] == "none"
    given = pretended("--profile", "slurm")
    assert given["config"]["requests"]["01_expert_selection"]["runtime"] == 7
    assert given["arguments"][-2:] == ["--profile", str(ROOT / "profiles/slurm")]
    assert "--cores" not in given["arguments"]
    assert "--cores" in pretended("--profile", str(ROOT / "profiles/gpu-node"))["arguments"]


def test_D4_a_lock_of_another_run_is_named_with_its_host(pretended, tmp_path, capsys):
    lock = tmp_path / "runs/smoke/.lock"
    lock.parent.mkdir(parents=True)
    with FileLock(lock), pytest.raises(SystemExit, match="2"):
        pretended()
    assert_told(f"holds {lock}, seen from {run.platform.node()}: .*remove that file", capsys)


def test_D5_files_of_the_future_are_dated_now_or_named(pretended, tmp_path, monkeypatch, capsys):
    record = tmp_path / "runs/smoke/records/one.json"
    record.parent.mkdir(parents=True)
    record.touch()
    os.utime(record, (2**33, 2**33))

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="2"):
        patch.setattr(os, "utime", Mock(side_effect=OSError("read-only file system")))
        pretended()
    assert_told(f"{record} is dated in the future; touch it", capsys)
    pretended()
    assert record.stat().st_mtime <= time.time()
    assert_told(f"{record} was dated in the future", capsys)


@pytest.mark.slow
def test_D11_what_draws_depends_on_all_code_that_may_draw(snakemake, tmp_path):
    """And training and measuring, which take long, on none."""
    config = {"preset": "smoke", "output_folder": str(tmp_path)}
    printed = snakemake(config, "all", "--dry-run").stdout
    rules = dict(block.split(":\n", 1) for block in printed.split("\nrule ")[1:])
    files = (path for name in ("immunity_lib", "study") for path in (ROOT / name).rglob("*.*"))
    code = [path for path in files if "__pycache__" not in path.parts and path.parent != ROOT / "study/graph"]
    assert len(code) > 20
    for path in code:
        for rule in ("start_here", "attacks", "ablation", "heatmaps", "adaptive_attacks", "claims"):
            assert f"{path}" in rules[rule], (rule, path)
    for rule in ("train", "measure_attacks"):
        assert str(ROOT) not in rules[rule].partition("output:")[0]


def test_the_graph_is_told_which_images_stand_behind_the_name_of_the_data(pretended):
    (checksums,) = pretended()["config"]["data"].values()
    assert len(checksums) == len(set(checksums)) > 2 and not pretended()["config"]["pretrained"]
    assert pretended("--pretrained")["config"]["pretrained"]


def test_the_status_leaves_out_what_comes_with_the_project(tmp_path):
    given = load_preset("parts10", output_folder=str(tmp_path), pretrained=True)
    left = status.list_jobs(given, datetime.now(UTC))["notebook"]
    drawn = [path.stem for path in sorted((ROOT / "notebooks").glob("*.ipynb")) if "02" not in path.stem]
    assert list(left) == [one for one in drawn if one != "05_heatmaps"]  # of weights, which did not come along
    assert "0 of 6 jobs done" in status.format_status(given, datetime.now(UTC))
    anew = status.list_jobs(given.model_copy(update={"pretrained": False}), datetime.now(UTC))
    assert {"05_heatmaps", "02_training"} < {*anew["notebook"]}


def test_what_needs_weights_that_did_not_come_along_is_refused():
    """To train such a model again would leave what was measured of the first training beside the second's."""
    (told,) = checks.missing_weights(load_preset("cifar10"))
    assert re.match(r"\d+ measurements \(attacks of cifar10-.*\) need weights of models that came along without", told)
    assert not checks.missing_weights(load_preset("cifar10", pretrained=False))
    assert not checks.missing_weights(load_preset("parts10"))


@pytest.mark.slow
def test_what_comes_with_the_project_counts_as_done_where_asked(snakemake, tmp_path):
    """A study is drawn, and goes on with a seed more, from the records of the one that is there."""
    own = yaml.safe_load((ROOT / "presets/parts10.yaml").read_text())
    seeds, further = own["seeds"], tmp_path / "parts10.yaml"
    further.write_text(yaml.safe_dump(own | {"seeds": [*seeds, max(seeds) + 1]}))

    def count(preset, **asked):
        config = {"preset": str(preset), "output_folder": str(tmp_path)} | asked
        printed = snakemake(config, "all", "--dry-run").stdout
        return printed.count("rule train:"), printed.count("rule measure_attacks:")

    trainings, measurements = count("parts10")
    assert trainings > measurements > 10 and count("parts10", pretrained=True) == (0, 0)
    # The literal equations are trained of the first seed alone
    one_more = (trainings - 1) // len(seeds), measurements // len(seeds)
    assert count(further, pretrained=True) == one_more


# --- the status

NOW = datetime(2026, 1, 2, 12, tzinfo=UTC)


@pytest.fixture
def settings(tmp_path):
    settings = load_preset("smoke", output_folder=str(tmp_path), epochs=10)
    settings.runs.mkdir(parents=True)
    return settings


def put_job(settings, name, state, seen=NOW, error=""):
    content = {"state": state, "error": error, "machine": "node7", "seconds": 30.0, "seen": seen.isoformat()}
    write_json(settings.runs / "jobs" / f"{name}.json", content)


def put_log(settings, model, epochs, seconds):
    write_atomically(own_folder(settings, model) / "log.jsonl", f'{{"seconds": {seconds}}}\n' * epochs)


def test_before_anything_ran_every_job_waits(settings, capsys):
    count = len(trained_models(settings)) + 7
    count += sum(len(measured_models(settings, kind)) for kind in ("attacks", "adaptive"))
    for folder, told in (("elsewhere", "nothing was started"), ("", f"0 of {count} jobs done, {count} waiting\n")):
        assert status.main(["--preset=smoke", f"--output={settings.output_folder}/{folder}"]) == 0
        assert told in (said := capsys.readouterr().out)
    assert "none has ended yet: 00_start_here, 01_expert_selection, 02_training, " in said


def test_time_to_go_comes_from_measured_epochs_and_is_shared_by_jobs_that_run(settings):
    """Of a model's own, else of those of the same network, else of any."""
    models = trained_models(settings)
    first, second, *_ = (name for name in models if name.expert == "googlenet")
    (other,) = (name for name in models if name.expert == "advrush" and name.regime == "standard")
    for model in set(models) - {first, second, other}:
        put_job(settings, f"02_training-{model}", "done")
        known = {"kind": "training", "model": str(model), "recipe": recipe_of(settings, model).as_json()}
        write_json(record_path(settings, model, "training"), known)
        write_atomically(own_folder(settings, model) / WEIGHTS, "")
    gone, damaged = measured_models(settings, "attacks")[:2]
    put_job(settings, f"03_attacks-{gone}", "done")  # its results were removed
    put_job(settings, f"03_attacks-{damaged}", "failed", error="OSError: no space")
    write_atomically(record_path(settings, damaged, "attacks"), "")
    told = status.format_status(settings, NOW)
    assert f" {len(models) - 3} of " in told and "failed " in told and "OSError: no space" in told
    put_log(settings, first, 4, seconds=60.0)
    put_job(settings, f"02_training-{first}", "running", seen=NOW - timedelta(seconds=5))
    to_go = timedelta(seconds=6 * 60 + 10 * 60 + 10 * 60)
    assert f"to go: about {to_go} with 1 at a time" in status.format_status(settings, NOW)
    put_log(settings, other, 9, seconds=1000.0)
    put_job(settings, f"02_training-{second}", "running")
    to_go = timedelta(seconds=6 * 60 + 10 * 60 + 1000) / 2
    printed = status.format_status(settings, NOW)
    assert f"to go: about {to_go} with 2 at a time" in printed
    assert f"{first} on node7, seen 0:00:05 ago: 4 of 10 epochs, 60 s each" in printed


def test_failed_stopped_and_killed_jobs_are_told_apart(settings):
    one, two, three, *_ = trained_models(settings)
    put_job(settings, f"02_training-{one}", "failed", error="TrainingDiverged: loss is nan")
    put_job(settings, f"02_training-{two}", "stopped", seen=NOW - timedelta(minutes=5))
    put_job(settings, f"02_training-{three}", "running", seen=NOW - timedelta(hours=3))
    for told in (
        "1 failed, 1 stopped, 1 lost",
        f"failed   02_training-{one} on node7, seen 0:00:00 ago: TrainingDiverged",
        f"stopped  02_training-{two} on node7, seen 0:05:00 ago",
        f"lost     02_training-{three} on node7, seen 3:00:00 ago",
    ):
        assert told in status.format_status(settings, NOW)
    put_job(settings, f"02_training-{three}", "running", seen=NOW + timedelta(hours=3))  # its clock was put back
    assert "1 lost" in status.format_status(settings, NOW)
    put_job(settings, "07_claims", "running", seen=NOW - timedelta(seconds=3))  # no job of a graph that has ended runs
    assert "1 running" in status.format_status(settings, NOW)
    assert "2 lost" in status.format_status(settings, NOW, lost_after=0)
