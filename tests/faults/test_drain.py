"""Nodes that will be taken away: the notice is used, and no step is lost.

Each drill is a function of a stage, a folder and a seed, which chooses the moment; `soak.py`
repeats them.
"""

from __future__ import annotations

import contextlib
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from drills import Stage, checkpoint_steps, study_text
from hosts import Hosts, Nodes, ranks, unavailable
from test_drills_controller import launching, lay_out, summary, wait_for

from ablate.records.folder import StudyRecord

pytestmark = [pytest.mark.slow, pytest.mark.drill]
EPOCHS = 10
TEXT = study_text(workers=1, epochs=EPOCHS, zeroshot_frequency=EPOCHS)
"""Two trials of 60 steps: one that hears of the notice within a second or two is far from its
end, and its last checkpoint is up to six steps away."""
LATEST = 12
"""Notice comes at a step up to this one."""


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
def launched(folder: Path, ray: str, *cpus: int) -> Iterator[Drill]:
    """`ablate launch` of the study in `folder` on nodes with so many CPUs, of a Ray of its own."""
    study = folder / "study"
    (folder / ray).mkdir()
    with Nodes(cpus=cpus, folder=folder / ray) as nodes:
        command = ["launch", "drill.yaml", "--yes", "--address", nodes.ray_address]
        with launching(study, nodes.environment, command) as controller:
            yield Drill(nodes, StudyRecord(study / "runs" / "drill"), controller)


@contextmanager
def training(
    stage: Stage,
    folder: Path,
    *cpus: int,
    after: int,
    ends_with: int = 0,
    befalls: str = "preempted",
) -> Iterator[Drill]:
    """A launch whose trials are both past a step; what then befalls them costs no step where they
    are preempted, and the report is that of one machine that nothing befell. A launch that ends
    early is launched again.
    """
    whole = stage.undisturbed(TEXT)
    study = folder / "study"
    study.mkdir()
    lay_out(stage, study, TEXT)
    log = study / "launch.log"
    with launched(folder, "ray", *cpus) as drill:
        record = drill.record
        drill.wait_until(lambda: len(beyond(record, after)) == 2)
        yield drill
        assert drill.controller.wait(300) == ends_with, log.read_text()[-3000:]
    if ends_with:
        told = log.read_text()
        assert "Launch again" in told, told[-3000:]
        with launched(folder, "again", *cpus) as drill:
            assert drill.controller.wait(300) == 0, log.read_text()[-3000:]
    check_moved(record, befalls)
    stage.check(summary(study, record), same_as=whole)


def check_moved(record: StudyRecord, befell: str) -> None:
    """Trials had to move, for this reason alone; those that were preempted lost no step."""
    moved = [trial for trial in record.records() if len(trial.attempts()) > 1]
    assert moved, "no trial had to move"
    for trial in moved:
        *disturbed, last = [end["kind"] for end in trial.ends()]
        assert (set(disturbed), last) == ({befell}, "ended")
        for number in trial.attempts()[1:] if befell == "preempted" else ():
            first = trial.first_row(number)
            assert first is not None
            assert first["step"] == trial.last_step(number - 1) + 1, "a step is lost"


def drill_one_node(stage: Stage, folder: Path, seed: int, *, notice_s: int) -> float:
    """A node with a trial is told to leave; seconds until it was free."""
    with training(stage, folder, 0, 1, 1, after=moment(seed)) as drill:
        victim = drill.at_work(1, 2)[0]
        free_s = drill.leave(victim, notice_s=notice_s)
        drill.nodes.kill(victim)
    for trial in drill.record.records():
        places = [end["nodes"] for end in trial.ends()]
        assert len(places) == 1 or places[0] != places[1]
    said = summary(folder / "study", drill.record).status.disruptions
    assert said == {"preempted": 1}, "and no step again"
    return free_s


def drill_all_nodes(stage: Stage, folder: Path, seed: int) -> float:
    """Every node with a trial is taken away; new ones come."""
    with training(stage, folder, 0, 1, 1, after=moment(seed)) as drill:
        free_s = drill.leave(1, 2, notice_s=30)
        for host in (1, 2):
            drill.nodes.kill(host)
        time.sleep(5.0)
        assert drill.controller.poll() is None, "it waits"
        drill.nodes.add(1)
        drill.nodes.add(1)
    return free_s


def drill_beside_checkpoint(stage: Stage, folder: Path, seed: int) -> float:
    """The notice is seen as one checkpoint follows another, one of which may be half written."""
    with training(stage, folder, 0, 1, 1, after=moment(seed)) as drill:
        victim = drill.at_work(1, 2)[0]
        [running] = [t for t in drill.record.records() if t.attempts()][:1]
        written = checkpoint_steps(running.folder / "checkpoints")
        drill.wait_until(lambda: checkpoint_steps(running.folder / "checkpoints") != written)
        return drill.leave(victim, notice_s=8)


def drill_head(stage: Stage, folder: Path, seed: int) -> float:
    """The node of Ray's head, of the launch and of a trial is told to leave; seconds until the
    launch had ended."""
    with training(stage, folder, 1, 1, after=moment(seed), ends_with=3) as drill:
        told = time.monotonic()
        drill.nodes.drain(0, notice_s=30)
        drill.controller.wait(300)
        ended_s = time.monotonic() - told
    said = (folder / "study" / "launch.log").read_text()
    assert "is taken away, and this launch runs on it" in said
    assert {len(trial.attempts()) for trial in drill.record.records()} == {2}
    return ended_s


def drill_own_node_gone(stage: Stage, folder: Path, seed: int) -> float:
    """Ray ends on the launch's own node, where no trial is, without notice; seconds until the
    launch had ended."""
    after = moment(seed)
    with training(stage, folder, 0, 1, 1, after=after, ends_with=3, befalls="lost") as drill:
        began = time.monotonic()
        psutil.Process(drill.nodes.raylets[0]).kill()
        drill.controller.wait(300)
        ended_s = time.monotonic() - began
    said = (folder / "study" / "launch.log").read_text()
    assert "is gone, and this launch runs on it" in said
    return ended_s


@pytest.mark.parametrize("notice_s", [30, 5])
def test_a_node_that_is_told_to_leave_costs_no_step(
    stage: Stage,
    tmp_path: Path,
    notice_s: int,
    record_property: Callable[[str, object], None],
) -> None:
    """The trial there writes a checkpoint, leaves, and goes on elsewhere with its next step; our
    processes are gone before the time is up, and `status` counts it."""
    free_s = drill_one_node(stage, tmp_path, seed=notice_s, notice_s=notice_s)
    record_property("node_free_s", round(free_s, 1))
    print(f"node free after {free_s:.1f} s of {notice_s}")


def test_a_notice_for_all_nodes_is_waited_out(stage: Stage, tmp_path: Path) -> None:
    """When every node with a trial is taken away, the study waits for new ones and goes on."""
    drill_all_nodes(stage, tmp_path, seed=1)


def test_a_notice_beside_a_checkpoint_costs_no_step(stage: Stage, tmp_path: Path) -> None:
    """Whether the checkpoint that is being written counts or not."""
    drill_beside_checkpoint(stage, tmp_path, seed=1)


def test_a_notice_for_the_heads_node_costs_no_step(stage: Stage, tmp_path: Path) -> None:
    """All of Ray goes with its head: trials on every node write a checkpoint, the launch that runs
    there says what happened and ends with 3, and the same command on a new Ray goes on."""
    ended_s = drill_head(stage, tmp_path, seed=1)
    print(f"launch ended {ended_s:.1f} s after the notice")


@pytest.mark.skipif(bool(unavailable()), reason=unavailable() or "available")
def test_a_signal_to_the_heads_ray_costs_no_step(stage: Stage, tmp_path: Path) -> None:
    """SIGTERM to `ray start --block` on a host where the launch alone runs: Ray stays there until
    the trials on the others have written checkpoints, and the launch has ended with 3."""
    whole = stage.undisturbed(TEXT)
    study = tmp_path / "study"
    study.mkdir()
    lay_out(stage, study, TEXT)
    record, log = StudyRecord(study / "runs" / "drill"), study / "launch.log"
    with Hosts(cpus=(0, 1, 1), folder=tmp_path) as hosts:
        hosts.wait_for_nodes()
        inside = ["sh", "-c", 'cd "$0" && exec "$@" >launch.log 2>&1', str(study)]
        launch = ["launch", "drill.yaml", "--yes", "--address", hosts.ray_address]
        with hosts.run(0, [*inside, sys.executable, "-m", "ablate.cli", *launch]) as controller:
            try:
                wait_for(lambda: len(beyond(record, 2)) == 2, controller)
                hosts.tell(0)
                assert controller.wait(120) == 3, log.read_text()[-3000:]
            finally:
                controller.kill()
    assert "is taken away, and this launch runs on it" in log.read_text()
    with launched(tmp_path, "again", 0, 1, 1) as drill:
        assert drill.controller.wait(300) == 0, log.read_text()[-3000:]
    check_moved(record, "preempted")
    stage.check(summary(study, record), same_as=whole)


def test_a_launch_whose_own_node_goes_without_notice_ends_and_goes_on(
    stage: Stage, tmp_path: Path
) -> None:
    """Ray ends its trials on all nodes then: it says so and ends with 3, and the same command on a
    new Ray goes on from the last checkpoints."""
    ended_s = drill_own_node_gone(stage, tmp_path, seed=1)
    print(f"launch ended {ended_s:.1f} s after its node")


def moment(seed: int) -> int:
    """The step after which the notice comes."""
    return random.Random(seed).randrange(1, LATEST)


def beyond(record: StudyRecord, step: int) -> list[str]:
    """Trials that have got beyond a step."""
    trials = record.records()
    return [trial.trial_id for trial in trials if trial.attempts() and trial.last_step(1) > step]


def keepers(nodes: Nodes, host: int) -> list[int]:
    """Processes of our agent on a node."""
    found = []
    for process in nodes.processes(host):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "ablate.cluster.keeper" in process.cmdline():
                found.append(process.pid)
    return found
