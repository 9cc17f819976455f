"""What the controller spends per trial, at one hundred and at ten thousand trials."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from ablate import design, runner
from ablate.cluster import Attempt
from ablate.records import StudyRecord
from ablate.search import CellBook
from ablate.tracking import Tracker

sys.path.insert(0, str(Path(__file__).parent.parent))
from simulated_cluster import Course, SimulatedCluster, complete  # noqa: E402
from test_scale import Nobody, factorial  # noqa: E402

pytestmark = [pytest.mark.bench, pytest.mark.timeout(3600)]


class Stopwatch:
    """Processor seconds of this thread by part."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        began = time.thread_time()
        try:
            yield
        finally:
            self.spent[part] = self.spent.get(part, 0.0) + time.thread_time() - began


def controller_cost(folder: Path, *, cells: int, gangs: int) -> tuple[float, float, float]:
    """Processor ms and wall ms of the controller per trial, and KiB of memory per trial."""
    watch = Stopwatch()
    wall: dict[str, float] = {"worker": 0.0}

    def act(attempt: Attempt) -> Course:
        began = time.monotonic()
        with watch("worker"):
            course = complete(attempt)
        wall["worker"] += time.monotonic() - began
        return course

    study = factorial(folder, cells=cells, seeds=10)
    record = StudyRecord(folder / study.name)
    cluster = SimulatedCluster(gangs, act)
    book = CellBook(
        study,
        storage=folder / f"{study.name}.db",
        score=functools.partial(design.score_of, study),
    )
    memory = psutil.Process().memory_info().rss
    began = time.monotonic()
    with runner.controlling(record), watch("all"):
        status = runner.launch(
            study, record, cluster=cluster, book=book, mirror=Nobody(), clock=cluster.clock
        )
    took = time.monotonic() - began - wall["worker"]
    grown = psutil.Process().memory_info().rss - memory
    book.close()
    trials = cells * 10
    assert status.outcomes == {"completed": trials}
    assert cluster.most_running == gangs
    busy = watch.spent["all"] - watch.spent["worker"]
    return 1e3 * busy / trials, 1e3 * took / trials, grown / trials / 1024


def test_cost_per_trial(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """10,000 trials on 1,000 gangs cost per trial what 100 on 10 do."""
    few = controller_cost(tmp_path, cells=10 * 2, gangs=20)
    many = controller_cost(tmp_path, cells=1000, gangs=1000)
    with capsys.disabled():
        print("\ncontroller per trial: processor ms, wall ms, memory KiB")
        print(f"   200 trials,   20 gangs: {few[0]:6.2f} {few[1]:6.2f} {few[2]:6.1f}")
        print(f"10,000 trials, 1,000 gangs: {many[0]:6.2f} {many[1]:6.2f} {many[2]:6.1f}")
        print(f"ratio: {many[0] / few[0]:.2f} processor, {many[1] / few[1]:.2f} wall")


def mirror_cost(folder: Path, *, cells: int) -> float:
    """Wall ms per trial of mirroring a finished study into an empty MLflow."""
    study = factorial(folder, cells=cells, seeds=10)
    record = StudyRecord(folder / study.name)
    cluster = SimulatedCluster(cells)
    book = CellBook(
        study,
        storage=folder / f"{study.name}.db",
        score=functools.partial(design.score_of, study),
    )
    with runner.controlling(record):
        runner.launch(
            study, record, cluster=cluster, book=book, mirror=Nobody(), clock=cluster.clock
        )
    book.close()
    trials = runner.planned(study, record)
    tracker = Tracker(
        study,
        record,
        score=functools.partial(design.score_of, study),
        uri=f"sqlite:///{folder / study.name}-mlflow.db",
    )
    began = time.monotonic()
    tracker.update(trials, [])
    assert tracker.close(timeout_s=3000)
    return 1e3 * (time.monotonic() - began) / len(trials)


def test_cost_of_the_mirror_per_trial(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Mirroring 3,000 trials costs per trial what mirroring 200 does."""
    few = mirror_cost(tmp_path, cells=20)
    many = mirror_cost(tmp_path, cells=300)
    with capsys.disabled():
        print(f"\nMLflow mirror per trial: 200 trials {few:.1f} ms, 3,000 trials {many:.1f} ms")
        print(f"ratio: {many / few:.2f}")
