"""A controller that is killed: nothing that was trained is lost, nothing is recorded twice."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from drills import STEPS, Run, Stage, allowed_s, study_text

from ablate.records.folder import StudyRecord
from ablate.runner import agenda
from ablate.runner.status import summarise
from ablate.study import load_study

pytestmark = pytest.mark.slow
TEXT = study_text(workers=1)
RELAUNCHED_S = 10.0


@contextmanager
def launching(
    folder: Path,
    environment: Mapping[str, str] | None = None,
    command: Sequence[str] = ("launch", "drill.yaml", "--yes", "--cluster", "local", "--cpus", "2"),
) -> Iterator[subprocess.Popen[bytes]]:
    """`ablate launch` of the study in `folder`, in a session of its own."""
    with open(folder / "launch.log", "ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "ablate.cli", *command],
            cwd=folder,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
                **(environment or {}),
            },
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def lay_out(stage: Stage, folder: Path, text: str = TEXT) -> None:
    """A study file in `folder`, and the data that it names."""
    (folder / "drill.yaml").write_text(text)
    for name in ("train", "val"):
        (folder / name).symlink_to(stage.data / name)


def summary(folder: Path, record: StudyRecord) -> Run:
    """The study in `folder` as a run that other processes made."""
    study = load_study(folder / "drill.yaml", root=folder)
    return Run(study, record, summarise(study, record, agenda.planned(study, record)), ())


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, "the launch ended by itself"
        assert time.monotonic() < end, "the condition did not come true"
        time.sleep(0.002)


def furthest(record: StudyRecord) -> int:
    """The furthest step of any trial that has no outcome."""
    open_trials = [trial for trial in record.records() if trial.outcome() is None]
    return max((t.last_step(n) for t in open_trials for n in t.attempts()), default=0)


def unrecorded(record: StudyRecord) -> list[str]:
    """Trials with a last word that no controller has recorded."""
    return [
        trial.trial_id
        for trial in record.records()
        if (attempts := trial.attempts())
        and trial.result(attempts[-1]) is not None
        and trial.end(attempts[-1]) is None
    ]


def trained_after(record: StudyRecord, moment: float) -> bool:
    trials = list(record.records())
    rows = [trial.first_row(trial.attempts()[-1]) for trial in trials if trial.attempts()]
    return any(row is not None and row["time"] > moment for row in rows)


@pytest.mark.parametrize(
    ("seed", "downtime_s", "finished"),
    [
        pytest.param(1, 0.0, False, marks=pytest.mark.drill),
        pytest.param(2, 3.0, False, marks=pytest.mark.drill),
        pytest.param(3, 0.0, True, marks=pytest.mark.drill),
        pytest.param(4, 20.0, False, marks=pytest.mark.drill),
        pytest.param(5, 60.0, False, marks=pytest.mark.drill),
        pytest.param(6, 60.0, True, marks=pytest.mark.drill),
    ],
)
def test_a_killed_controller_costs_time_and_changes_nothing(
    stage: Stage, tmp_path: Path, seed: int, downtime_s: float, finished: bool
) -> None:
    """SIGKILL at a random step, or when a trial has finished and that is not recorded yet.

    Its ranks die with it; the next launch trains on from the last checkpoints, and records what
    had finished without running it again.
    """
    drill_controller(stage, tmp_path, seed, downtime_s=downtime_s, finished=finished)


def drill_controller(
    stage: Stage, folder: Path, seed: int, *, downtime_s: float, finished: bool
) -> list[float]:
    """Seconds from the relaunch to training again, where anything was left to train."""
    again_s = []
    whole = stage.undisturbed(TEXT)
    lay_out(stage, folder)
    record = StudyRecord(folder / "runs" / "drill")
    step = random.Random(seed).randrange(1, STEPS - 2)
    with launching(folder) as first:
        wait_for(lambda: furthest(record) >= (STEPS - 3 if finished else step), first)
        if finished:
            first.send_signal(signal.SIGSTOP)
            wait_for(lambda: bool(unrecorded(record)), first)
        done = unrecorded(record)
        tree = psutil.Process(first.pid).children(recursive=True)
        first.kill()
    _, alive = psutil.wait_procs(tree, timeout=30)
    assert tree and alive == []
    time.sleep(downtime_s)
    moment = time.time()
    with launching(folder) as second:
        if not finished:
            wait_for(lambda: trained_after(record, moment), second)
            again_s.append(time.time() - moment)
            print(f"controller relaunched: training again after {again_s[0]:.1f} s")
            assert again_s[0] < allowed_s(RELAUNCHED_S)
        assert second.wait(120) == 0, (folder / "launch.log").read_text()[-3000:]
    stage.check(summary(folder, record), same_as=whole)
    assert bool(done) == finished
    for trial_id in done:
        assert len(record.record(trial_id).attempts()) == 1, "it was run again"
    return again_s
