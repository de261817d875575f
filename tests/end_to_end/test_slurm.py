"""The graph on a real Slurm cluster of one node with two slots, through sbatch.

Slurm is started and stopped by the test. Its node offers two GPUs that are none, so that two jobs run at a time for
want of a third."""

import re
import shutil
import signal
import subprocess
from datetime import datetime

import psutil
import pytest
import yaml
from graph import reproduce_command, tables, wait_for
from slurm_cluster import missing, slurm_cluster

from study.graph import status
from study.settings import ROOT, load_preset
from study.store import read_json

HANGING = "parts10-moe-googlenet-standard-seed0"


@pytest.fixture
def profile(tmp_path):
    """A copy of the profile, as its first lines say to make it, for this cluster."""
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


@pytest.mark.node
@pytest.mark.skipif(bool(missing()), reason=f"Slurm is not installed: {missing()} not found")
def test_the_smoke_graph_through_sbatch(profile, smoke, tmp_path):
    output, folder = tmp_path / "output", tmp_path / "cluster"
    settings = load_preset("smoke", output_folder=str(output))
    command = reproduce_command(output, "--profile", str(profile))
    with slurm_cluster(folder, slots=2) as environment:
        heard = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        run = subprocess.Popen(command, cwd=ROOT, env=environment, **heard)
        # Stop the kernel of one training after its first epoch, as if the node had hung
        wait_for((settings.runs / "models" / HANGING / "checkpoint.safetensors").exists, 1200)
        job = read_json(settings.runs / f"jobs/02_training-{HANGING}.json")
        for kernel in psutil.Process(job["process"]).children():
            kernel.send_signal(signal.SIGSTOP)
        printed = "\n".join(run.communicate(timeout=2400))
        history = (folder / "log" / "jobs.txt").read_text()
        asked = ["scontrol", "show", "job", "--oneliner"]
        shown = subprocess.run(asked, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, printed[-4000:]
    ended = [dict(re.findall(r"(\w+)=(\S+)", line)) for line in history.splitlines()]
    # Every job of the graph was one of Slurm's, and the one that hung was killed and tried again
    states = [job["JobState"] for job in ended]
    jobs = status.list_jobs(settings, datetime.now().astimezone())
    assert states.count("COMPLETED") == len(jobs) and states.count("TIMEOUT") >= 1
    assert set(jobs["state"]) == {"done"}
    assert f"{HANGING} goes on after epoch 1" in printed
    on_gpu = [job for job in shown.stdout.splitlines() if "Comment=rule_measure_a" in job]  # attacks and adaptive
    assert on_gpu and all("TresPerJob=gres:gpu:1" in job for job in on_gpu)
    spans = [[datetime.fromisoformat(job[when]) for when in ("StartTime", "EndTime")] for job in ended]
    assert max(sum(start <= moment < end for start, end in spans) for moment, _ in spans) == 2, "jobs at a time"
    here, there = (tables(load_preset("smoke", output_folder=str(one)).figures) for one in (smoke[0], output))
    assert here.keys() == there.keys() and not [name for name in here if here[name] != there[name]]
