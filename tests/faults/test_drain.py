"""Nodes that will be taken away: the notice is used, and no step is lost."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from drills import Stage, checkpoint_steps, study_text
from hosts import Nodes, ranks
from test_drills_controller import launching, lay_out, summary, wait_for

from ablate.records.folder import StudyRecord

pytestmark = [pytest.mark.slow, pytest.mark.drill]
EPOCHS = 10
TEXT = study_text(workers=1, epochs=EPOCHS, zeroshot_frequency=EPOCHS)
"""Two trials of 60 steps: one that hears of the notice within a second or two is far from its
end, and its last checkpoint is up to six steps away."""


@dataclass(frozen=True, slots=True)
class Drill:
    """A study that trains on Ray's nodes."""

    nodes: Nodes
    record: StudyRecord
    controller: subprocess.Popen[bytes]

    def wait_until(self, condition: Callable[[], bool]) -> None:
        wait_for(condition, self.controller)

    def at_work(self, *hosts: int) -> list[int]:
        """Those of the nodes that hold a rank."""
        return [host for host in hosts if ranks(self.nodes.processes(host))]

    def leave(self, *hosts: int, notice_s: int) -> float:
        """Give notice to nodes; seconds until no process of ours is there."""
        told = time.monotonic()
        self.nodes.drain(*hosts, notice_s=notice_s)
        self.wait_until(lambda: not any(keepers(self.nodes, host) for host in hosts))
        return time.monotonic() - told


@contextmanager
def training(stage: Stage, folder: Path, *cpus: int) -> Iterator[Drill]:
    """`ablate launch` on nodes with so many CPUs, both trials past their second step; at the end
    the study is done, no step was lost, and the report is that of one machine that nothing befell.
    """
    whole = stage.undisturbed(TEXT)
    study = folder / "study"
    study.mkdir()
    lay_out(stage, study, TEXT)
    record = StudyRecord(study / "runs" / "drill")
    with Nodes(cpus=cpus, folder=folder) as nodes:
        command = ["launch", "drill.yaml", "--yes", "--address", nodes.ray_address]
        with launching(study, nodes.environment, command) as controller:
            wait_for(lambda: len(begun(record)) == 2, controller)
            yield Drill(nodes, record, controller)
            assert controller.wait(300) == 0, (study / "launch.log").read_text()[-3000:]
    moved = [trial for trial in record.records() if len(trial.attempts()) > 1]
    assert moved, "no trial had to move"
    for trial in moved:
        *preempted, last = trial.ends()
        assert {end["kind"] for end in preempted} == {"preempted"} and last["kind"] == "ended"
        for number in trial.attempts()[1:]:
            first = trial.first_row(number)
            assert first is not None
            assert first["step"] == trial.last_step(number - 1) + 1, "a step is lost"
    stage.check(summary(study, record), same_as=whole)


@pytest.mark.parametrize("notice_s", [30, pytest.param(5, marks=pytest.mark.drill)])
def test_a_node_that_is_told_to_leave_costs_no_step(
    stage: Stage,
    tmp_path: Path,
    notice_s: int,
    record_property: Callable[[str, object], None],
) -> None:
    """The trial there writes a checkpoint, leaves, and goes on elsewhere with its next step; our
    processes are gone before the time is up, and `status` counts it."""
    with training(stage, tmp_path, 0, 1, 1) as drill:
        victim = drill.at_work(1, 2)[0]
        free_s = drill.leave(victim, notice_s=notice_s)
        record_property("node_free_s", round(free_s, 1))
        print(f"node free after {free_s:.1f} s of {notice_s}")
        drill.nodes.kill(victim)
    for trial in drill.record.records():
        places = [end["nodes"] for end in trial.ends()]
        assert len(places) == 1 or places[0] != places[1]
    said = summary(tmp_path / "study", drill.record).status.disruptions
    assert said == {"preempted": 1}, "and no step again"


@pytest.mark.drill
def test_a_notice_for_the_heads_node_costs_no_step(stage: Stage, tmp_path: Path) -> None:
    """A trial on the node of Ray's head and of the controller moves like any other."""
    with training(stage, tmp_path, 1, 1) as drill:
        drill.wait_until(lambda: bool(drill.at_work(0)))
        drill.leave(0, notice_s=30)
        assert not drill.at_work(0)


@pytest.mark.drill
def test_a_notice_for_all_nodes_is_waited_out(stage: Stage, tmp_path: Path) -> None:
    """When every node with a trial is taken away, the study waits for new ones and goes on."""
    with training(stage, tmp_path, 0, 1, 1) as drill:
        drill.leave(1, 2, notice_s=30)
        for host in (1, 2):
            drill.nodes.kill(host)
        time.sleep(5.0)
        assert drill.controller.poll() is None, "it waits"
        drill.nodes.add(1)
        drill.nodes.add(1)


@pytest.mark.drill
@pytest.mark.parametrize("repeat", range(3))
def test_a_notice_beside_a_checkpoint_costs_no_step(
    stage: Stage, tmp_path: Path, repeat: int
) -> None:
    """The notice is seen as one checkpoint follows another, one of which may be half written."""
    with training(stage, tmp_path, 0, 1, 1) as drill:
        victim = drill.at_work(1, 2)[0]
        [running] = [t for t in drill.record.records() if t.attempts()][:1]
        written = checkpoint_steps(running.folder / "checkpoints")
        drill.wait_until(lambda: checkpoint_steps(running.folder / "checkpoints") != written)
        drill.leave(victim, notice_s=8)


def begun(record: StudyRecord) -> list[str]:
    """Trials that have taken a second step."""
    trials = record.records()
    return [trial.trial_id for trial in trials if trial.attempts() and trial.last_step(1) >= 2]


def keepers(nodes: Nodes, host: int) -> list[int]:
    """Processes of our agent on a node."""
    found = []
    for process in nodes.processes(host):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "ablate.cluster.keeper" in process.cmdline():
                found.append(process.pid)
    return found
