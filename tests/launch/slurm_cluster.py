"""A Slurm of a controller and two nodes, on this machine."""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
TOOLS = ("slurmctld", "slurmd", "sbatch", "scontrol", "scancel")
MISSING = [tool for tool in TOOLS if not shutil.which(tool)]
CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
KillWait=10
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n[0-1] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports[1]}-{ports[2]}] CPUs=2
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=9
"""


@dataclass(frozen=True)
class Slurm:
    folder: Path
    environment: dict[str, str]

    def call(self, *command: str) -> str:
        return subprocess.run(
            command, env=self.environment, check=True, capture_output=True, text=True
        ).stdout.strip()

    def submit(self, seen: Path, **environment: str) -> str:
        """Submit a study on both nodes; the job's id."""
        (seen / "trial").mkdir(parents=True)
        return subprocess.run(
            ["sbatch", "--parsable", "--nodes=2", "--cpus-per-task=2", f"--output={seen}/job.log"]
            + ["launch/slurm.sh", "studies/quickstart.yaml", "--runs", str(seen)],
            cwd=REPOSITORY,
            env={**self.environment, "SEEN": str(seen), **environment},
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()

    def facts(self, job: str) -> dict[str, str]:
        shown = self.call("scontrol", "show", "job", job, "--oneliner")
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)

    def has_ended(self, job: str) -> bool:
        return self.facts(job)["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")


def until(condition: Callable[[], object], deadline_s: float, log: Path) -> None:
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, log.read_text() if log.exists() else "no log"
        time.sleep(0.1)


def free_ports() -> list[int]:
    """Three ports in a row that nobody listens on."""
    start = 16_800
    while True:
        start += 3
        with socket.socket() as a, socket.socket() as b, socket.socket() as c:
            try:
                for offset, probe in enumerate((a, b, c)):
                    probe.bind(("127.0.0.1", start + offset))
            except OSError:
                continue
            return [start, start + 1, start + 2]


@contextmanager
def running_slurm(folder: Path) -> Iterator[Slurm]:
    """Both nodes are idle when it is given; its daemons end with the block."""
    (folder / "state").mkdir()
    (folder / "bin").mkdir()
    study = folder / "bin" / "ablate"
    study.write_text(f'#!/bin/sh\nexec {sys.executable} {HERE / "slurm_study.py"} "$@"\n')
    study.chmod(0o700)
    host = socket.gethostname().split(".")[0]
    text = CONFIGURATION.format(
        host=host, user=getpass.getuser(), folder=folder, ports=free_ports()
    )
    (folder / "slurm.conf").write_text(text)
    path = [str(folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "RAY_"))},
        "SLURM_CONF": str(folder / "slurm.conf"),
        "PATH": os.pathsep.join(path),
        "PYTHONPATH": str(REPOSITORY),
    }
    made = Slurm(folder, environment)
    daemons = [
        subprocess.Popen([*command, "-D"], env=environment, stderr=subprocess.DEVNULL)
        for command in (["slurmctld", "-i"], ["slurmd", "-N", "n0"], ["slurmd", "-N", "n1"])
    ]
    try:
        log = folder / "slurmctld.log"
        until(lambda: _idle_nodes(made) == 2, 60, log)
        yield made
    finally:
        for daemon in daemons:
            daemon.terminate()
        for daemon in daemons:
            daemon.wait(30)


def _idle_nodes(slurm: Slurm) -> int:
    shown = subprocess.run(
        ["sinfo", "--noheader", "--Node", "--partition=all", "--format=%T"],
        env=slurm.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return shown.stdout.split().count("idle")
