"""launch/slurm.sh on a real Slurm: a controller and two nodes on this machine."""

from __future__ import annotations

import getpass
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
TOOLS = ("slurmctld", "slurmd", "sbatch", "scontrol", "scancel")
MISSING = [tool for tool in TOOLS if not shutil.which(tool)]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)} (Debian: slurm-wlm)"),
]

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
NodeName=n[0-1] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports[1]}-{ports[2]}] CPUs=2
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
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


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    folder = tmp_path_factory.mktemp("slurm")
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
        ["sinfo", "--noheader", "--Node", "--format=%T"],
        env=slurm.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return shown.stdout.split().count("idle")


def ray_processes() -> list[psutil.Process]:
    return [p for p in psutil.process_iter(["name"]) if p.info["name"] in ("raylet", "gcs_server")]


def test_a_study_runs_across_an_allocation(slurm: Slurm, tmp_path: Path) -> None:
    """Ray comes up on both nodes, the study gets its address and arguments, and its exit code is
    the job's; nothing of Ray is left."""
    before = set(ray_processes())
    job = slurm.submit(tmp_path)
    log = tmp_path / "job.log"
    until(lambda: slurm.has_ended(job), 180, log)
    assert slurm.facts(job)["ExitCode"] == "7:0", log.read_text()
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert seen["argv"][:3] == ["launch", "studies/quickstart.yaml", "--yes"]
    assert seen["argv"][-2:] == ["--runs", str(tmp_path)]
    assert seen["end"]["exit_codes"] == [0, 0] and len(set(seen["end"]["nodes"])) == 2
    until(lambda: set(ray_processes()) <= before, 60, log)
    assert not list(Path("/tmp").glob(f"ablate-{job}-*"))


def test_the_time_limit_stops_a_study_in_order(slurm: Slurm, tmp_path: Path) -> None:
    """The warning before the time limit reaches the study as Ctrl-C, and 130 is the job's code."""
    job = slurm.submit(tmp_path, WAIT="1")
    log = tmp_path / "job.log"
    until((tmp_path / "waiting").exists, 180, log)
    slurm.call("scancel", f"--signal={signal.SIGUSR1.name}", "--batch", job)
    until(lambda: slurm.has_ended(job), 60, log)
    assert slurm.facts(job)["ExitCode"] == "130:0", log.read_text()


def test_a_requeued_job_goes_on(slurm: Slurm, tmp_path: Path) -> None:
    """With ABLATE_REQUEUE=1 the job returns to the queue after its warning."""
    job = slurm.submit(tmp_path, WAIT="1", ABLATE_REQUEUE="1")
    log = tmp_path / "job.log"
    until((tmp_path / "waiting").exists, 180, log)
    slurm.call("scancel", f"--signal={signal.SIGUSR1.name}", "--batch", job)
    until(lambda: slurm.facts(job)["Restarts"] == "1", 60, log)
    slurm.call("scancel", job)
    until(lambda: slurm.has_ended(job), 60, log)
    assert not list(Path("/tmp").glob(f"ablate-{job}-*"))
