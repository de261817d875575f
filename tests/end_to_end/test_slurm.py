"""The graph on a real Slurm cluster of one node with two slots, through sbatch.

The cluster is thrown away behind the test: Debian's slurmctld, slurmd, slurm-client and munge, without systemd, cgroups
or a database. Everything lies in one folder, listens on 127.0.0.1 alone and is stopped by process id. The node offers
two GPUs that are none, so that two jobs run at a time for want of a third."""

import getpass
import os
import platform
import re
import shutil
import signal
import subprocess
import time
from contextlib import contextmanager
from datetime import datetime

import psutil
import pytest
import yaml
from graph import free_ports, reproduce_command, tables, wait_for

from study.graph import status
from study.settings import ROOT, load_preset
from study.store import read_json

PROGRAMS = ("munged", "munge", "mungekey", "slurmctld", "slurmd", "sinfo", "sbatch", "squeue")
SEARCHED = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])
MISSING = [name for name in PROGRAMS if not shutil.which(name, path=SEARCHED)]
HANGING = "parts10-moe-googlenet-standard-seed0"


@contextmanager
def slurm_cluster(folder, slots):
    """Within it, the returned environment leads sbatch to a node that runs `slots` jobs at a time,
    each with a GPU that is none."""
    for name in ("munge", "state", "spool", "log", "bin"):
        (folder / name).mkdir(parents=True)
    (folder / "log").chmod(0o700)
    for path in (folder, folder / "munge", *folder.parents):
        if path.owner() == getpass.getuser():
            path.chmod(path.stat().st_mode | 0o055)  # munged wants its socket reachable
    environment = os.environ | {
        "SLURM_CONF": str(folder / "slurm.conf"),
        "PATH": f"{folder / 'bin'}{os.pathsep}{SEARCHED}",
    }
    configure(folder, slots)
    daemons = []

    def start(name, *options):
        with open(folder / "log" / f"{name}.out", "w") as output:
            daemon = subprocess.Popen(
                [name, *options], env=environment, stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        daemons.append(daemon)

    def said(*command):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=10)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        key = folder / "munge" / "key"
        subprocess.run(["mungekey", "--create", f"--keyfile={key}"], env=environment, check=True)
        start(
            "munged", "--foreground", f"--key-file={key}", f"--socket={folder}/munge/socket",
            f"--pid-file={folder}/munge/pid", f"--log-file={folder}/log/munged.log",
            f"--seed-file={folder}/munge/seed", "--num-threads=2",
        )  # fmt: skip
        wait_for_daemons(folder, daemons, lambda: said("munge", f"--socket={folder}/munge/socket", "-n"))
        start("slurmctld", "-D")
        start("slurmd", "-D", "-N", platform.node().partition(".")[0])
        wait_for_daemons(folder, daemons, lambda: said("sinfo", "-h", "-o", "%t") == "idle")
        yield environment
    finally:
        said("scancel", "--quiet", f"--user={getpass.getuser()}")
        deadline = time.monotonic() + 15
        while said("squeue", "-h", "-t", "R,CG,PD", "-o", "%i") and time.monotonic() < deadline:
            time.sleep(0.25)
        for daemon in reversed(daemons):
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def wait_for_daemons(folder, daemons, ready):
    deadline = time.monotonic() + 30
    while not ready():
        if any(daemon.poll() is not None for daemon in daemons) or time.monotonic() > deadline:
            logs = "\n".join(path.read_text()[-1500:] for path in sorted(folder.glob("log/*.out")))
            raise RuntimeError(f"the Slurm cluster did not come up:\n{logs}")
        time.sleep(0.2)


def configure(folder, slots):
    host, user = platform.node().partition(".")[0], getpass.getuser()
    controller, node = free_ports(2)
    (folder / "slurm.conf").write_text(f"""
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={node}
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/log/jobs.txt
SchedulerType=sched/backfill
SchedulerParameters=sched_min_interval=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=500
ReturnToService=2
SlurmdParameters=config_overrides
# A finished job stays visible for longer than the longest gap between two looks at it
MinJobAge=600
InactiveLimit=0
# Seconds from a time limit's SIGTERM to SIGKILL: as short as Slurm's default is long
KillWait=30
OverTimeLimit=0
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs={slots} RealMemory=32000 Gres=gpu:{slots} State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=60 DefaultTime=10 State=UP
""")
    devices = [folder / f"gpu{number}" for number in range(slots)]
    for device in devices:
        device.touch()
    lines = (f"NodeName={host} Name=gpu File={device}\n" for device in devices)
    (folder / "gres.conf").write_text("".join(lines))
    # Inside of a job, Snakemake's plugin drops SLURM_CONF before it calls srun
    srun = folder / "bin" / "srun"
    real = shutil.which("srun", path=SEARCHED)
    srun.write_text(f'#!/bin/sh\nSLURM_CONF={folder}/slurm.conf exec {real} "$@"\n')
    srun.chmod(0o755)


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
@pytest.mark.skipif(bool(MISSING), reason=f"Slurm is not installed: {MISSING} not found")
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
