"""A state machine: a controller that is killed at any point, over machines that do anything.

Each launch runs the real study loop on a scripted cluster. Hypothesis chooses what the machines do
(train, checkpoint, finish, crash, vanish, preempt; presumed dead, some write on) and before or
after which durable write the controller is killed. Whatever happened, the records keep their
promises, and a last launch ends the study.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from drills import Silent
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from ablate.cluster.contract import Attempt, Capacity, GangEvent, Shape
from ablate.errors import ClusterError
from ablate.records.attempt import AttemptWriter
from ablate.records.files import read_json
from ablate.records.folder import StudyRecord, TrialRecord
from ablate.report.verify import verify
from ablate.runner import agenda, controller, hold
from ablate.runner.status import StudyStatus
from ablate.study import Study, parse_study

STEPS = 6
METRIC = "imagenet_top1"
TEXT = """\
name: scripted
recipe: openclip
baseline: {model: tiny-rn-a, train_data: t.tar, imagenet_val: val, precision: fp32, warmup: 5}
factors: {warmup: [5, 1]}
seeds: [0, 1]
budget: {attempts: 3}
"""


class Killed(BaseException):
    """SIGKILL of the controller: nothing after it happens."""


def measured(trial_id: str, step: int) -> float:
    """What training gives at a step; the same in every attempt."""
    digest = hashlib.sha256(f"{trial_id} {step}".encode()).digest()
    return int.from_bytes(digest[:4], "big") / 2**32


@dataclass(slots=True)
class Worker:
    """A gang that runs, or is presumed dead and runs."""

    attempt: Attempt
    writer: AttemptWriter
    step: int

    def train(self) -> None:
        if self.step < STEPS:
            self.step += 1
            trial = self.attempt.trial_id
            row = {"step": self.step, "attempt": self.attempt.number, "time": 0.0}
            self.writer.step([{**row, "loss": measured(trial, self.step)}])

    def save(self) -> None:
        (self.attempt.folder / "reached" / str(self.step)).mkdir(parents=True, exist_ok=True)

    def finish(self) -> None:
        """Train to the end and say the last word."""
        while self.step < STEPS:
            self.train()
        value = measured(self.attempt.trial_id, STEPS)
        self.writer.evaluation({"step": STEPS, "attempt": self.attempt.number, METRIC: value})
        final = {METRIC: value}
        self.writer.result({"status": "completed", "step": STEPS, "final": final, "flags": []})


ACTIONS = ("train", "save", "finish", "crash", "lose", "preempt", "refuse")


@dataclass(slots=True)
class Machines:
    """A cluster that does what it is told, one action per turn of the study loop.

    When the script is at its end everything finishes. It outlives controllers, as machines do.
    """

    seats: int = 2
    script: list[tuple[str, int]] = field(default_factory=list)
    running: dict[str, Worker] = field(default_factory=dict)
    stale: list[Worker] = field(default_factory=list)
    writers: list[AttemptWriter] = field(default_factory=list)
    events: list[GangEvent] = field(default_factory=list)
    refusing: bool = False
    now: float = 0.0

    def capacity(self, shape: Shape) -> Capacity:
        return Capacity(self.seats, self.seats - len(self.running), "")

    def start(self, attempt: Attempt) -> None:
        assert attempt.trial_id not in self.running, "two attempts of a trial at once"
        if self.refusing:
            self.refusing = False
            raise ClusterError("no more processes")
        reached = max((int(p.name) for p in attempt.folder.glob("reached/*")), default=0)
        writer = AttemptWriter(attempt.folder, attempt.number)
        self.running[attempt.trial_id] = Worker(attempt, writer, reached)
        self.writers.append(writer)
        self._tell(attempt, "placed")

    def stop(self, trial_id: str, *, grace_s: float) -> None:
        if trial_id in self.running:
            self._end(trial_id, "exited", 75, stopped=True)

    def set_aside(self, node: str, shape: Shape) -> bool:
        return False

    def wait(self, timeout_s: float) -> list[GangEvent]:
        self.now += timeout_s + 100.0 * (not self.running)
        for worker in self.stale:
            worker.train()
        action, which = self.script.pop(0) if self.script else ("finish", 0)
        if action == "refuse":
            self.refusing = True
        elif self.running:
            self._act(action, sorted(self.running)[which % len(self.running)])
        told, self.events = self.events, []
        return told

    def _act(self, action: str, trial_id: str) -> None:
        worker = self.running[trial_id]
        match action:
            case "train":
                worker.train()
            case "save":
                worker.save()
            case "finish":
                worker.finish()
                self._end(trial_id, "exited", 0)
            case "crash":
                self._end(trial_id, "exited", 1)
            case "preempt":
                worker.save()
                self._end(trial_id, "exited", 75)
            case "lose":
                self.stale.append(worker)
                self._end(trial_id, "lost", None)

    def controller_died(self, finish: bool) -> None:
        """The machines end what a dead controller left; some of it was at its very end."""
        for worker in self.running.values():
            if finish:
                worker.finish()
        self.running.clear()
        self.events.clear()

    def _end(self, trial_id: str, kind: Any, code: int | None, *, stopped: bool = False) -> None:
        worker = self.running.pop(trial_id)
        self._tell(worker.attempt, kind, (code,), stopped=stopped)

    def _tell(
        self,
        attempt: Attempt,
        kind: Any,
        codes: tuple[int | None, ...] = (),
        *,
        stopped: bool = False,
    ) -> None:
        event = GangEvent(
            trial_id=attempt.trial_id,
            number=attempt.number,
            kind=kind,
            detail="as the script says",
            time=0.0,
            exit_codes=codes,
            stopped=stopped,
        )
        self.events.append(event)


class Saboteur:
    """Kills the controller at its n-th durable write: before it, half-way through, or after it."""

    def __init__(self) -> None:
        self.left: int | None = None
        self.moment = "before"

    def count(self, moment: str, path: Path | None) -> None:
        if self.left is None:
            return
        self.left -= moment == "before"
        if self.left < 0 and (moment == "after") == (self.moment == "after"):
            self.left = None
            if self.moment == "half" and path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.with_name(f".{path.name}.0badc0de.tmp").write_text('{"hal')
            raise Killed


@dataclass(frozen=True, slots=True)
class Doomed(StudyRecord):
    """A folder whose controller is killed while it writes."""

    saboteur: Saboteur

    def write(self, path: Path, content: Any, *, durable: bool = True) -> None:
        self.saboteur.count("before", path)
        StudyRecord.write(self, path, content, durable=durable)
        self.saboteur.count("after", path)

    def new_attempt(self, record: TrialRecord) -> int:
        self.saboteur.count("before", None)
        number = StudyRecord.new_attempt(self, record)
        self.saboteur.count("after", None)
        return number


class Crashes(RuleBasedStateMachine):
    """Launches that are killed, one after the other, on the same folder."""

    @initialize()
    def begin(self) -> None:
        base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        self.root = Path(tempfile.mkdtemp(prefix="ablate-crashes-", dir=base))
        self.study: Study = parse_study(TEXT, path="s.yaml", root=self.root)
        self.saboteur = Saboteur()
        self.record = Doomed(self.root / "scripted", self.saboteur)
        self.machines = Machines()
        self.outcomes: dict[str, Any] = {}

    @rule(
        script=st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, 1)), max_size=12),
        kill_at=st.none() | st.integers(0, 40),
        moment=st.sampled_from(["before", "half", "after"]),
        finish=st.booleans(),
    )
    def launch(
        self, script: list[tuple[str, int]], kill_at: int | None, moment: str, finish: bool
    ) -> None:
        """Launch, with the controller killed at some write; or not, and it is stopped."""
        self.machines.script = list(script)
        self.saboteur.left, self.saboteur.moment = kill_at, moment
        try:
            self._launch(stop_level=lambda: int(not self.machines.script))
        except Killed:
            self.machines.controller_died(finish)
        self.saboteur.left = None

    def _launch(self, stop_level: Callable[[], int]) -> StudyStatus:
        with hold.controlling(self.record):
            return controller.launch(
                self.study,
                self.record,
                cluster=self.machines,
                book=Silent(),
                mirror=Silent(),
                stop_level=stop_level,
                clock=lambda: self.machines.now,
            )

    @invariant()
    def promises_are_kept(self) -> None:
        """Steps are whole, an outcome is one attempt's last word, and it never changes."""
        if not hasattr(self, "record") or self.record.study() is None:
            return
        trials = agenda.planned(self.study, self.record)
        found = verify(self.record, trials, metric=METRIC)
        assert [v for v in found if v.rule != "complete"] == []
        for trial in trials:
            path = self.record.record(trial.id).folder / "outcome.json"
            if trial.id in self.outcomes:
                assert read_json(path) == self.outcomes[trial.id], "an outcome changed"
            elif path.exists():
                self.outcomes[trial.id] = read_json(path)
                if self.outcomes[trial.id]["outcome"] == "completed":
                    assert self.outcomes[trial.id]["value"] == measured(trial.id, STEPS)

    def teardown(self) -> None:
        if not hasattr(self, "record"):
            return
        try:
            self.machines.script = []
            ended = self._launch(stop_level=lambda: 0)
            assert ended.waiting == 0 and ended.num_ended == 4
            self.promises_are_kept()
            trials = agenda.planned(self.study, self.record)
            assert verify(self.record, trials, metric=METRIC) == []
            assert list(self.record.folder.rglob(".*.tmp")) == []
            for trial in trials:
                self._nothing_was_done_twice(self.record.record(trial.id))
        finally:
            for writer in self.machines.writers:
                writer.close()
            shutil.rmtree(self.root)

    def _nothing_was_done_twice(self, trial: TrialRecord) -> None:
        """No attempt begins after one has said its last word, unless that one was given up."""
        for attempt in trial.attempts()[:-1]:
            if (trial.attempt_folder(attempt) / "result.json").exists():
                end = trial.end(attempt)
                assert end is not None and end["kind"] != "ended", json.dumps(end)


Crashes.TestCase.settings = settings(
    max_examples=int(os.environ.get("ABLATE_SCHEDULES", "100")),
    stateful_step_count=6,
    suppress_health_check=list(HealthCheck),
)
TestCrashes = Crashes.TestCase


def launch_on(machines: Machines, folder: Path) -> tuple[StudyStatus, StudyRecord]:
    study = parse_study(TEXT, path="s.yaml", root=folder)
    record = StudyRecord(folder / "scripted")
    with hold.controlling(record):
        ended = controller.launch(
            study,
            record,
            cluster=machines,
            book=Silent(),
            mirror=Silent(),
            clock=lambda: machines.now,
        )
    for writer in machines.writers:
        writer.close()
    return ended, record


class Unable(Machines):
    """Machines of which none can start a rank, each time for the same reason."""

    def start(self, attempt: Attempt) -> None:
        raise ClusterError("node1: importing torch ahead failed: no such module")


def test_a_cause_that_stays_is_not_tried_for_ever(tmp_path: Path) -> None:
    """Five attempts that are lost in the same words before their first step are enough, the reason
    is told, and being lost says nothing about the setting."""
    ended, record = launch_on(Unable(), tmp_path)
    assert ended.outcomes == {"lost": 4}
    for trial in record.records():
        outcome = trial.outcome()
        assert outcome is not None and len(trial.attempts()) == 5
        assert "importing torch ahead failed" in outcome["reason"] and outcome["value"] is None


def test_preemption_is_no_failure(tmp_path: Path) -> None:
    """A trial that is preempted more often than it may crash goes on from where it was."""
    script = [("train", 0), ("preempt", 0)] * 5
    ended, record = launch_on(Machines(seats=1, script=script), tmp_path)
    assert ended.outcomes == {"completed": 4}
    trial = next(record.records())
    assert [end["kind"] for end in trial.ends()] == ["preempted"] * 5 + ["ended"]
    assert [row["step"] for row in trial.trace()] == list(range(1, STEPS + 1))
