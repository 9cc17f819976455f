"""A gang goes on with fewer workers only where its study allows it, and the record says so."""

from __future__ import annotations

from pathlib import Path

import pytest
from scripted_studies import STUDY, Recorder, prepare
from simulated_cluster import Course, SimulatedCluster, complete

from ablate.cluster.contract import Attempt, Capacity, GangEvent, Shape
from ablate.errors import StudyError
from ablate.records.attempt import AttemptWriter
from ablate.records.folder import StudyRecord
from ablate.runner import controller, hold
from ablate.study.results import cost_of
from ablate.study.table import read_table

ELASTIC = STUDY.replace("  warmup: [5, 1]\n", "") + "gang: {workers: 4, min_workers: 2}\n"


class Losing(SimulatedCluster):
    """Half of its machines go away in the middle of the first attempt."""

    def __init__(self) -> None:
        super().__init__(1, self.course)
        self.half = False
        self.asked: list[tuple[int, str | None]] = []

    def course(self, attempt: Attempt) -> Course:
        self.asked.append((attempt.shape.workers, attempt.env.get("ABLATE_SHARE")))
        if len(self.asked) > 1:
            return complete(attempt)
        writer = AttemptWriter(attempt.folder, attempt.number)
        writer.step([{"step": 1, "attempt": attempt.number, "time": 0.0, "loss": 1.0}])
        writer.close()
        return Course(10.0, (None,) * 4, "lost")

    def wait(self, timeout_s: float) -> list[GangEvent]:
        events = super().wait(timeout_s)
        self.half = self.half or any(event.kind == "lost" for event in events)
        return events

    def capacity(self, shape: Shape) -> Capacity:
        return Capacity(1, 1, "", away=int(self.half and shape.workers > 2))


@pytest.mark.parametrize("allowed", [True, False])
def test_fewer_workers_go_on_only_where_the_study_allows_it(tmp_path: Path, allowed: bool) -> None:
    """While machines are away a gang of 4 goes on as 2, each for two; recorded and flagged.

    Without min_workers it waits for all four.
    """
    text = ELASTIC if allowed else ELASTIC.replace(", min_workers: 2", "")
    study = prepare(tmp_path, [], text)
    record, cluster = StudyRecord(tmp_path / "runs/elastic"), Losing()
    told = Recorder()
    with hold.controlling(record):
        status = controller.launch(
            study, record, cluster=cluster, book=told, mirror=told, clock=cluster.clock
        )
    assert status.outcomes == {"completed": 4}
    assert cluster.asked == [(4, None), *([(2, "2")] if allowed else [(4, None)]) * 4]
    flagged = [folder.outcome() for folder in record.records()]
    assert [o["flags"] for o in flagged if o and "flags" in o] == [["FEWER_WORKERS"]] * 4 * allowed
    ends = [end for folder in record.records() for end in folder.ends()]
    workers = [end.get("workers") for end in ends]
    assert sorted(workers, key=str) == sorted([None, *[2 if allowed else None] * 4], key=str)
    costs_h = [cost_of("gpu_hours", o, workers=4) or 0.0 for o in flagged if o]
    spent_s = sum(end["wall_s"] * (end.get("workers") or 4) for end in ends)
    assert sum(costs_h) * 3600 == pytest.approx(spent_s)
    assert status.worker_hours * 3600 == pytest.approx(spent_s)
    table = read_table(study, record)
    assert sum(row.cost.worker_hours for row in table.rows) * 3600 == pytest.approx(spent_s)


@pytest.mark.parametrize(
    ("gang", "smaller"),
    [
        ("workers: 8, min_workers: 2", (4, 2)),
        ("workers: 6, min_workers: 1", (3, 2, 1)),
        ("workers: 4", ()),
    ],
)
def test_fewer_workers_divide_all_of_them(
    tmp_path: Path, gang: str, smaller: tuple[int, ...]
) -> None:
    """Only numbers that keep the global batch stand in, the most first; none unless asked."""
    study = prepare(tmp_path, [], STUDY + f"gang: {{{gang}}}\n")
    assert study.gang.smaller == smaller
    with pytest.raises(StudyError, match="no number from there up to below 5 divides"):
        prepare(tmp_path, [], STUDY + "gang: {workers: 5, min_workers: 2}\n")
