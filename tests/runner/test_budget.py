"""budget.gpu_hours is never exceeded: not by a block of seeds, not by trials that overrun."""

from __future__ import annotations

import heapq
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scripted_studies import STUDY, Recorder, prepare
from simulated_cluster import Course, SimulatedCluster, complete

from ablate.cluster.contract import Attempt
from ablate.records.attempt import AttemptWriter
from ablate.records.files import read_json, write_json
from ablate.records.folder import StudyRecord
from ablate.runner import controller, hold
from ablate.runner.status import StudyStatus


class Reluctant(SimulatedCluster):
    """Its trials use all of their grace to write a checkpoint before they stop."""

    def stop(self, trial_id: str, *, grace_s: float) -> None:
        if trial_id not in self._running:
            super().stop(trial_id, grace_s=grace_s)
            return
        attempt, ticket = self._running[trial_id]
        self._ends = [end for end in self._ends if end[2] is not attempt]
        (attempt.folder / "attempts" / str(attempt.number) / "result.json").unlink(missing_ok=True)
        writer = AttemptWriter(attempt.folder, attempt.number)
        writer.result({"status": "stopped", "step": 1})
        writer.close()
        self._ends.append((self.now + grace_s, ticket, attempt, Course(grace_s, (75,), "asked")))
        heapq.heapify(self._ends)

    def _end(self, attempt: Attempt, course: Course, *, stopped: bool = False) -> None:
        super()._end(attempt, course, stopped=stopped or course.kind == "asked")


def launch(
    tmp_path: Path, hours: float, duration_s: Callable[[int], float], *, gangs: int = 3
) -> tuple[StudyStatus, StudyRecord, float]:
    """Run 3 cells x 3 seeds of 1 worker; `duration_s` of a trial by its seed. Hours spent."""
    text = STUDY.replace("[0, 1]", "[0, 1, 2]") + f"budget: {{gpu_hours: {hours}}}\n"
    study = prepare(tmp_path, [], text)
    record = StudyRecord(tmp_path / "runs" / study.name)

    def act(attempt: Attempt) -> Course:
        complete(attempt)
        return Course(duration_s(read_json(attempt.folder / "trial.json")["seed"]))

    cluster = Reluctant(gangs, act)
    told = Recorder()
    with hold.controlling(record):
        status = controller.launch(
            study, record, cluster=cluster, book=told, mirror=told, clock=cluster.clock
        )
    spent_s = sum(end["wall_s"] for folder in record.records() for end in folder.ends())
    return status, record, spent_s / 3600


def seeds_ended(record: StudyRecord) -> list[int]:
    return sorted(f.trial()["seed"] for f in record.records() if f.outcome() is not None)


def test_a_block_of_seeds_that_may_not_fit_is_not_begun(tmp_path: Path) -> None:
    """Two blocks of 108 s fit into 252; the third has no trial that was started."""
    status, record, spent = launch(tmp_path, 0.07, lambda seed: 36.0)
    assert seeds_ended(record) == [0, 0, 0, 1, 1, 1]
    assert [len(f.attempts()) for f in record.records() if f.trial()["seed"] == 2] == [0] * 3
    assert status.waiting == 3 and "budget" in status.notes[0]
    assert spent == pytest.approx(0.06)


def test_trials_that_overrun_are_stopped_within_the_budget_and_go_on_later(tmp_path: Path) -> None:
    """The second block takes ten times as long as the first: it is stopped with a checkpoint
    before the budget is spent, launching again starts nothing, a larger budget finishes it."""

    def slow(seed: int) -> float:
        return 360.0 if seed == 1 else 36.0

    status, record, spent = launch(tmp_path, 0.12, slow)
    assert seeds_ended(record) == [0, 0, 0]
    kinds = {end["kind"] for f in record.records() for end in f.ends()}
    assert kinds == {"ended", "stopped"} and 0.11 < spent <= 0.12
    before = {f.trial_id: f.attempts() for f in record.records()}
    status, record, again = launch(tmp_path, 0.12, slow)
    assert {f.trial_id: f.attempts() for f in record.records()} == before and again == spent
    assert "budget" in status.notes[0]
    status, record, _ = launch(tmp_path, 1.0, lambda seed: 36.0)
    assert status.waiting == 0 and len(seeds_ended(record)) == 9


@settings(max_examples=20)
@given(
    hours=st.floats(0.001, 0.2),
    durations=st.lists(st.floats(1, 300), min_size=3, max_size=3),
    gangs=st.integers(1, 4),
)
@example(hours=0.001, durations=[2.0, 1.0, 1.0], gangs=4)  # a free seat must not stop the cut
def test_whatever_trials_take_the_budget_is_not_exceeded(
    hours: float, durations: list[float], gangs: int
) -> None:
    """For any budget, durations and cluster, all attempts together spend at most the budget."""
    with tempfile.TemporaryDirectory() as folder:
        _, _, spent = launch(Path(folder), hours, lambda seed: durations[seed], gangs=gangs)
    assert spent <= hours * (1 + 1e-9)


def test_what_a_killed_controller_left_running_is_counted(tmp_path: Path) -> None:
    """Attempts without an end count from their start to their last heartbeat, once, as spent: a
    relaunch starts nothing beyond the budget, and a larger budget goes on with them."""
    launch(tmp_path, 1.0, lambda seed: 36.0)
    record = StudyRecord(tmp_path / "runs" / "scripted")
    for folder in record.records():
        if folder.trial()["seed"] == 0:
            continue
        # As a SIGKILL leaves it: it had taken a step, and beat last after 180 s.
        number = folder.attempts()[-1]
        for name in ("outcome.json", f"attempts/{number}/end.json"):
            (folder.folder / name).unlink()
        attempt = folder.attempt_folder(number)
        (attempt / "result.json").unlink()
        (attempt / "trace.jsonl").unlink()
        writer = AttemptWriter(folder.folder, number)
        writer.step([{"step": 1, "attempt": number, "time": 1090.0, "loss": 1.0}])
        writer.close()
        write_json(attempt / "heartbeat.json", {"step": 1, "wall_s": 180.0})
    status, record, spent = launch(tmp_path, 0.3, lambda seed: 36.0)
    assert spent == pytest.approx((3 * 36 + 6 * 180) / 3600) and spent > 0.3
    assert seeds_ended(record) == [0, 0, 0] and "budget" in status.notes[0]
    assert status.worker_hours == pytest.approx(spent)
    kinds = [end["kind"] for f in record.records() for end in f.ends()]
    assert kinds.count("abandoned") == 6
    status, record, again = launch(tmp_path, 0.3, lambda seed: 36.0)
    assert again == spent, "counted once"
    status, record, _ = launch(tmp_path, 2.0, lambda seed: 36.0)
    assert status.waiting == 0 and len(seeds_ended(record)) == 9
