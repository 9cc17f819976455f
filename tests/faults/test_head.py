"""Ray's head goes away: work is kept, and the launch says so and ends as its callers expect."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from drills import Stage, study_text
from hosts import Nodes
from test_drills_controller import launching, lay_out, wait_for

from ablate.records.folder import StudyRecord

pytestmark = [pytest.mark.slow, pytest.mark.drill]  # half a minute of silence


def test_a_lost_head_costs_no_step_and_is_told(stage: Stage, tmp_path: Path) -> None:
    """Its process is killed under two running trials: both write a checkpoint, the launch says what
    to do and exits with 3, and one on a new Ray goes on with the next steps."""
    study = tmp_path / "study"
    study.mkdir()
    lay_out(stage, study, study_text(workers=1, epochs=2000, zeroshot_frequency=2000))
    record = StudyRecord(study / "runs" / "drill")
    with training(study, tmp_path / "ray1") as (nodes, controller):
        wait_for(lambda: reached(record, 1, [10, 10]), controller)
        nodes.behead()
        assert controller.wait(120) == 3
    assert "has not answered for" in (study / "launch.log").read_text()
    began = [trial.last_step(1) for trial in record.records()]
    with training(study, tmp_path / "ray2") as (nodes, controller):
        wait_for(lambda: reached(record, 2, began), controller)
        controller.send_signal(signal.SIGINT)
        assert controller.wait(120) == 130
    trials = list(record.records())
    assert [trial.attempts() for trial in trials] == [[1, 2], [1, 2]]
    for trial in trials:
        assert trial.ends()[0]["kind"] in ("preempted", "abandoned")
        assert (trial.first_row(2) or {})["step"] == trial.last_step(1) + 1, "a step is lost"


@contextmanager
def training(study: Path, folder: Path) -> Iterator[tuple[Nodes, subprocess.Popen[bytes]]]:
    """`ablate launch` on two nodes of a Ray of its own."""
    folder.mkdir()
    with Nodes(cpus=(0, 1, 1), folder=folder) as nodes:
        command = ["launch", "drill.yaml", "--yes", "--address", nodes.ray_address]
        with launching(study, nodes.environment, command) as controller:
            yield nodes, controller


def reached(record: StudyRecord, attempt: int, steps: Sequence[int]) -> bool:
    """Whether this attempt of every trial has got beyond a step."""
    at = [trial.last_step(attempt) for trial in record.records()]
    return len(at) == len(steps) and all(a > b for a, b in zip(at, steps, strict=True))
