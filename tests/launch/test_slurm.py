"""launch/slurm.sh on a real Slurm: a controller and two nodes on this machine."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

import psutil
import pytest
from slurm_cluster import REPOSITORY, Slurm, until

pytestmark = pytest.mark.slow


def ray_processes() -> list[psutil.Process]:
    return [p for p in psutil.process_iter(["name"]) if p.info["name"] in ("raylet", "gcs_server")]


def test_a_study_runs_across_an_allocation(slurm: Slurm, tmp_path: Path) -> None:
    """Ray comes up on both nodes, the study gets its address and arguments, and its exit code is
    the job's; nothing of Ray is left, nor of a job that was killed."""
    before = set(ray_processes())
    (killed := Path("/tmp/ablate-999999-0")).mkdir(exist_ok=True)
    job = slurm.submit(tmp_path)
    log = tmp_path / "job.log"
    until(lambda: slurm.has_ended(job), 180, log)
    assert slurm.facts(job)["ExitCode"] == "7:0", log.read_text()
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert seen["argv"][:3] == ["launch", "studies/quickstart.yaml", "--yes"]
    assert seen["argv"][-2:] == ["--runs", str(tmp_path)]
    assert seen["end"]["exit_codes"] == [0, 0] and len(set(seen["end"]["nodes"])) == 2
    until(lambda: set(ray_processes()) <= before, 60, log)
    assert not list(Path("/tmp").glob(f"ablate-{job}-*")) and not killed.exists()


@pytest.mark.exhaustive
def test_the_time_limit_stops_a_study_in_order(slurm: Slurm, tmp_path: Path) -> None:
    """The warning before the time limit reaches the study as Ctrl-C, and 130 is the job's code."""
    job = slurm.submit(tmp_path, WAIT="1")
    log = tmp_path / "job.log"
    until((tmp_path / "waiting").exists, 180, log)
    slurm.call("scancel", f"--signal={signal.SIGUSR1.name}", "--batch", job)
    until(lambda: slurm.has_ended(job), 60, log)
    assert slurm.facts(job)["ExitCode"] == "130:0", log.read_text()


@pytest.mark.exhaustive
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


@pytest.mark.exhaustive
def test_a_preempted_job_goes_back_into_the_queue(slurm: Slurm, tmp_path: Path) -> None:
    """A job of a partition that goes first takes the nodes; when it is done, ours starts again."""
    job = slurm.submit(tmp_path, WAIT="1")
    log = tmp_path / "job.log"
    until((tmp_path / "waiting").exists, 180, log)
    (tmp_path / "waiting").unlink()
    urgent = ["sbatch", "--partition=urgent", "--nodes=2", "--cpus-per-task=2", "--wait"]
    urgent += [f"--output={tmp_path}/urgent.log", "--wrap=true"]
    slurm.call(*urgent)
    until((tmp_path / "waiting").exists, 240, log)
    assert slurm.facts(job)["Restarts"] == "1"
    slurm.call("scancel", job)
    until(lambda: slurm.has_ended(job), 60, log)


def test_a_missing_flag_is_named_before_anything_starts(slurm: Slurm, tmp_path: Path) -> None:
    """Without --cpus-per-task a node's task has one CPU: the job ends at once with exit code 3 and
    the flag that is missing; an array is refused with the reason."""
    study = tmp_path / "four.yaml"
    text = (REPOSITORY / "studies" / "quickstart.yaml").read_text()
    study.write_text(text.replace("gang: {workers: 2}", "gang: {workers: 4}"))
    command = ["sbatch", "--parsable", "--wait", "--nodes=1", f"--output={tmp_path}/job-%a.log"]
    for more, code, said in (
        ([], 3, "--cpus-per-task=4"),
        (["--cpus-per-task=2", "--array=0-1"], 2, "without --array"),
    ):
        done = subprocess.run(
            [*command, *more, "launch/slurm.sh", str(study)],
            cwd=REPOSITORY,
            env=slurm.environment,
            check=False,
            timeout=240,
        )
        assert done.returncode == code
        (log, *_) = sorted(tmp_path.glob("job-*.log"))
        assert said in log.read_text()
        for path in tmp_path.glob("job-*.log"):
            path.unlink()
