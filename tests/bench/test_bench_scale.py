"""What the controller spends per trial, at two hundred and at thousands of trials.

    pytest tests/bench/test_bench_scale.py -m bench -s

The real loop, records and Optuna storage on a simulated cluster, without and with the MLflow
mirror. TRIALS sets the larger study (3,000; the promise is for 10,000).
"""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from ablate.cluster.contract import Attempt
from ablate.records.folder import StudyRecord
from ablate.runner import controller, hold
from ablate.search.book import CellBook
from ablate.study import design
from ablate.tracking.tracker import Tracker

sys.path.insert(0, str(Path(__file__).parent.parent))
from simulated_cluster import Course, Nobody, SimulatedCluster, complete, factorial  # noqa: E402

pytestmark = [pytest.mark.bench, pytest.mark.timeout(3600)]

TRIALS = int(os.environ.get("TRIALS", "3000"))
MOST_MS = 50.0
"""Processor time of the controller per trial, at most."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Of the controller's process, per trial of a study."""

    trials: int
    processor_ms: float
    """All threads, until the mirror is complete."""
    wall_ms: float
    """Of the loop, while the mirror runs beside it."""
    memory_kib: float
    behind_s: float
    """How long after the last trial the mirror was complete."""

    def __str__(self) -> str:
        return (
            f"{self.trials:6,} trials: processor {self.processor_ms:6.2f} ms, wall "
            f"{self.wall_ms:6.2f} ms, memory {self.memory_kib:5.1f} KiB a trial; mirror complete "
            f"{self.behind_s:.1f} s after the last"
        )


class Stopwatch:
    """Processor and wall seconds of what the workers would do."""

    def __init__(self) -> None:
        self.processor_s = self.wall_s = 0.0

    @contextmanager
    def __call__(self) -> Iterator[None]:
        processor, wall = time.thread_time(), time.monotonic()
        try:
            yield
        finally:
            self.processor_s += time.thread_time() - processor
            self.wall_s += time.monotonic() - wall


def controller_cost(
    folder: Path, *, cells: int, gangs: int, mirrored: bool, seeds: int = 10
) -> Cost:
    """Run a study of `cells` (20, 30, ...) times `seeds` trials to its end."""
    workers = Stopwatch()

    def act(attempt: Attempt) -> Course:
        with workers():
            return complete(attempt)

    study = factorial(folder, cells=cells, seeds=seeds)
    record = StudyRecord(folder / study.name)
    cluster = SimulatedCluster(gangs, act)
    score = functools.partial(design.score_of, study)
    book = CellBook(study, storage=folder / f"{study.name}.db", score=score)
    tracker = Tracker(study, record, score=score) if mirrored else None
    memory = psutil.Process().memory_info().rss
    processor, wall = time.process_time(), time.monotonic()
    with hold.controlling(record):
        status = controller.launch(
            study, record, cluster=cluster, book=book, mirror=tracker or Nobody(),
            clock=cluster.clock,
        )  # fmt: skip
    ended = time.monotonic()
    if tracker is not None:
        assert tracker.close(patience_s=3000), tracker.trouble
    complete_at = time.monotonic()
    spent = time.process_time() - processor - workers.processor_s
    grown = psutil.Process().memory_info().rss - memory
    book.close()
    trials = cells * seeds
    assert status.outcomes == {"completed": trials}
    assert cluster.most_running == gangs
    return Cost(
        trials,
        1e3 * spent / trials,
        1e3 * (ended - wall - workers.wall_s) / trials,
        grown / trials / 1024,
        complete_at - ended,
    )


@pytest.mark.parametrize("mirrored", [False, True], ids=["alone", "mirrored"])
def test_cost_per_trial(tmp_path: Path, capsys: pytest.CaptureFixture[str], mirrored: bool) -> None:
    """A trial of thousands on a thousand gangs costs what one of 200 on 20 does, 50 ms at most."""
    # Loads what is loaded once, and lets MLflow create its tables.
    controller_cost(tmp_path, cells=20, gangs=20, seeds=1, mirrored=mirrored)
    few = controller_cost(tmp_path, cells=20, gangs=20, mirrored=mirrored)
    many = controller_cost(
        tmp_path, cells=TRIALS // 10, gangs=min(1000, TRIALS // 10), mirrored=mirrored
    )
    with capsys.disabled():
        print(f"\ncontroller {'with' if mirrored else 'without'} the MLflow mirror")
        print(few, many, sep="\n")
        print(
            f"ratio: processor {many.processor_ms / few.processor_ms:.2f}, "
            f"wall {many.wall_ms / few.wall_ms:.2f}"
        )
    assert many.processor_ms <= MOST_MS and many.wall_ms <= MOST_MS
