"""A throw-away Slurm cluster of one node on this machine: real daemons, real sbatch.

Debian's slurmctld, slurmd, slurm-client and munge, without systemd, cgroups or a database. Everything lies in one
folder, listens on 127.0.0.1 alone and is stopped by process id."""

import getpass
import os
import platform
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("munged", "munge", "mungekey", "slurmctld", "slurmd", "sinfo", "sbatch", "squeue")
SEARCHED = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])


def missing() -> list[str]:
    """Which of the programs are not installed."""
    return [name for name in PROGRAMS if not shutil.which(name, path=SEARCHED)]


@contextmanager
def slurm_cluster(folder: Path, slots: int) -> Iterator[dict[str, str]]:
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
    _configure(folder, slots)
    daemons: list[subprocess.Popen] = []

    def start(name: str, *options: str) -> None:
        with open(folder / "log" / f"{name}.out", "w") as output:
            daemon = subprocess.Popen(
                [name, *options], env=environment, stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        daemons.append(daemon)

    def said(*command: str) -> str:
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
        _wait(folder, daemons, lambda: said("munge", f"--socket={folder}/munge/socket", "-n"))
        start("slurmctld", "-D")
        start("slurmd", "-D", "-N", platform.node().partition(".")[0])
        _wait(folder, daemons, lambda: said("sinfo", "-h", "-o", "%t") == "idle")
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


def _wait(folder: Path, daemons: list[subprocess.Popen], ready) -> None:
    deadline = time.monotonic() + 30
    while not ready():
        if any(daemon.poll() is not None for daemon in daemons) or time.monotonic() > deadline:
            logs = "\n".join(path.read_text()[-1500:] for path in sorted(folder.glob("log/*.out")))
            raise RuntimeError(f"the Slurm cluster did not come up:\n{logs}")
        time.sleep(0.2)


def _configure(folder: Path, slots: int) -> None:
    host, user = platform.node().partition(".")[0], getpass.getuser()
    controller, node = _free_ports(2)
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


def _free_ports(count: int) -> list[int]:
    held = [socket.socket() for _ in range(count)]
    for one in held:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in held]
    for one in held:
        one.close()
    return ports
