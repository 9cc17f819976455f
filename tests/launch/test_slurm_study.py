"""A real study on a real Slurm, and what it exports; on demand."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from slurm_cluster import REPOSITORY, Slurm
from small_trials import make_data

from ablate.records.folder import StudyRecord

pytestmark = [pytest.mark.exhaustive, pytest.mark.timeout(1200)]

STUDY = """\
recipe: openclip
baseline:
  model: tiny-rn-a
  train_data: data/train/{00000..00002}.tar
  evaluations: [{kind: retrieval, path: 'data/train/00000.tar', every: 6}]
  precision: fp32
  batch_size: 8
  lr: 1.0e-3
  warmup: 2
  epochs: 6
  workers: 0
  checkpoint_frequency: 6
factors: {beta2: [0.999, 0.98]}
seeds: [0, 1]
gang: {workers: 2}
objective: {metric: retrieval_i2t_r10, margin: 0.1}
"""


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is launched from: the repository's scripts, a study and its data beside them."""
    folder = tmp_path_factory.mktemp("clone")
    shutil.copytree(REPOSITORY / "launch", folder / "launch")
    make_data(folder / "data")
    (folder / "pairs.yaml").write_text(STUDY)
    return folder


def submit(slurm: Slurm, folder: Path, *words: str) -> str:
    """Submit from ``folder`` with the real programs, wait, and return what the job printed."""
    log = folder / "job.log"
    log.unlink(missing_ok=True)
    tools = str(Path(sys.executable).parent)
    done = subprocess.run(
        ["sbatch", "--wait", f"--output={log}", *words],
        cwd=folder,
        env={
            **slurm.environment,
            "PATH": os.pathsep.join([tools, os.environ["PATH"]]),
            "MASTER_ADDR": "127.0.0.1",  # the two nodes of this Slurm have no names
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    printed = log.read_text() if log.exists() else ""
    assert done.returncode == 0, printed[-4000:] + done.stderr
    return printed


def test_a_study_and_its_bundle_run_under_slurm(slurm: Slurm, clone: Path) -> None:
    """launch/slurm.sh trains the study across two nodes; of its bundle, slurm.sh with run.sh gives
    the trial again to the last bit, and with train.sh the peer's own number, a task a worker."""
    words = ["--nodes=2", "--cpus-per-task=2", "launch/slurm.sh", "pairs.yaml"]
    printed = submit(slurm, clone, *words)
    record = StudyRecord(clone / "runs" / "pairs")
    ends = [trial.outcome() for trial in record.records()]
    assert len(ends) == 4 and all(end and end["outcome"] == "completed" for end in ends), printed

    command = [sys.executable, "-m", "ablate", "export", "runs/pairs", "--cell", "baseline"]
    subprocess.run(command, cwd=clone, check=True)
    best = record.folder / "best"
    known = json.loads((best / "provenance.json").read_text())
    again = clone / "again"
    words = ["--ntasks=1", "--cpus-per-task=2", "slurm.sh", "run.sh", "--out", str(again)]
    printed = submit(slurm, best, *words)
    trial = record.record(known["trial"])
    losses = [[row["loss"] for row in run.trace()] for run in (type(trial)(again), trial)]
    assert losses[0] == losses[1] and len(losses[0]) == 36, printed

    printed = submit(slurm, best, "slurm.sh")
    name, number = printed.strip().splitlines()[-1].split()
    assert name == "retrieval_i2t_r10" and 0.4 < float(number) <= 1
