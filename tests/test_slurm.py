"""The graph on a real Slurm cluster of one node with two slots, through sbatch.

Slurm is started and stopped by the test. Its node offers two GPUs that are none, so that two jobs
run at a time for want of a third.
"""

import json
import re
import shutil
import signal
import subprocess
import time
from datetime import datetime

import psutil
import pytest
import yaml
from graph import reproduce_command, tables
from slurm_cluster import missing, slurm_cluster

from immunity_lib import cluster, status
from immunity_lib.plan import planned_jobs
from immunity_lib.records import ROOT
from immunity_lib.settings import load_preset

HANGING = "parts10-moe-googlenet-standard-seed0"


@pytest.fixture
def profile(tmp_path):
    """A copy of the profile, as the README says to make it, for this cluster."""
    folder = tmp_path / "profile"
    shutil.copytree(ROOT / "profiles/slurm", folder)
    content = yaml.safe_load((folder / "config.yaml").read_text())
    # No accounting, and no patience
    content |= {"slurm-status-command": "squeue", "seconds-between-status-checks": 1}
    content |= {"slurm-init-seconds-before-status-checks": 1, "latency-wait": 10}
    content["default-resources"] |= {"slurm_partition": "main", "slurm_account": "none"}
    content["set-resources"] = {"train": {"runtime": "2 * attempt - 1"}}  # minutes
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    return folder


def hang(settings):
    """Stop the kernel of one training after its first epoch, as if the node had hung."""
    models = settings.runs / "models" / HANGING
    deadline = time.monotonic() + 1200
    while not (models / "checkpoint.safetensors").exists():
        assert time.monotonic() < deadline, "the training did not begin"
        time.sleep(0.05)
    job = json.loads((settings.runs / f"jobs/02_training-{HANGING}.json").read_text())
    for kernel in psutil.Process(job["process"]).children():
        kernel.send_signal(signal.SIGSTOP)


@pytest.mark.node
@pytest.mark.skipif(bool(missing()), reason=f"Slurm is not installed: {missing()} not found")
def test_the_smoke_graph_through_sbatch(profile, smoke, tmp_path):
    output, folder = tmp_path / "output", tmp_path / "cluster"
    settings = load_preset("smoke", output_folder=str(output))
    command = reproduce_command(output, "--profile", str(profile))
    with slurm_cluster(folder, slots=2) as environment:
        run = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        hang(settings)
        printed = "\n".join(run.communicate(timeout=2400))
        history = (folder / "log" / "jobs.txt").read_text()
        shown = subprocess.run(
            ["scontrol", "show", "job", "--oneliner"], env=environment, capture_output=True,
            text=True,
        )  # fmt: skip
    assert run.returncode == 0, printed[-4000:]
    ended = [dict(re.findall(r"(\w+)=(\S+)", line)) for line in history.splitlines()]
    # Every job of the graph was one of Slurm's, and the one that hung was killed and tried again
    states = [job["JobState"] for job in ended]
    jobs = status.jobs_of(settings, datetime.now().astimezone())
    assert states.count("COMPLETED") == len(jobs) and states.count("TIMEOUT") >= 1
    assert {job.state for job in jobs} == {"done"}
    # SIGTERM came half a minute before the end: time enough for a checkpoint
    failed = (settings.runs / ".snakemake/slurm_logs/rule_train" / HANGING).glob("*.log")
    assert any(f"{HANGING} stopped by SIGTERM" in log.read_text() for log in failed)
    measuring = re.compile("Comment=rule_(attack|judge)_")
    on_gpu = [job for job in shown.stdout.splitlines() if measuring.search(job)]
    assert on_gpu and all("TresPerJob=gres:gpu:1" in job for job in on_gpu)
    assert at_once(ended) == 2
    here, there = (
        tables(load_preset("smoke", output_folder=str(one)).figures) for one in (smoke[0], output)
    )
    assert here.keys() == there.keys()
    assert not [name for name in here if here[name] != there[name]]


def at_once(ended):
    """The largest number of jobs that ran at the same time."""
    spans = [
        [datetime.fromisoformat(job[when]) for when in ("StartTime", "EndTime")] for job in ended
    ]
    return max(sum(start <= moment < end for start, end in spans) for moment, _ in spans)


def test_what_a_job_asks_for_follows_the_plan():
    settings, tflops = load_preset("smoke"), 1e-4
    asked = cluster.requests(settings, tflops)
    for job in planned_jobs(settings):
        training = asked[f"02_training-{job.name}"]
        minutes = 2 * job.training / (tflops * 1e12) / 60
        assert 2 * minutes + 10 <= training["runtime"] <= 2 * minutes + 11
        assert training["mem_mb"] > job.memory / 1e6
        assert f"03_attacks-{job.name}" in asked
    # Two experts, and the ensemble of two networks, for each of two networks
    assert asked["01_expert_selection"]["runtime"] > asked["05_heatmaps"]["runtime"] > 10
    faster = cluster.requests(settings, 10 * tflops)
    together = cluster.requests(settings.model_copy(update={"processes": 4}), tflops)
    for name, request in asked.items():
        work = request["runtime"] - 10
        assert faster[name]["runtime"] == pytest.approx(10 + work / 10, abs=1)
        split = 4 if name.startswith("02_training") else 1
        assert together[name]["runtime"] == pytest.approx(10 + work / split, abs=1)


@pytest.mark.parametrize(("profile", "submits"), [("slurm", True), ("gpu-node", False)])
def test_a_profile_is_found_by_its_name_or_its_path(profile, submits):
    by_name = cluster.profile_folder(profile)
    assert by_name == cluster.profile_folder(str(ROOT / "profiles" / profile))
    assert cluster.submits(by_name) == submits


def test_an_unknown_profile_lists_the_valid_ones():
    with pytest.raises(ValueError, match="unknown profile 'slrum'; valid names: gpu-node, slurm"):
        cluster.profile_folder("slrum")
