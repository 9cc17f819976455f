"""The study loop at scale, on a simulated cluster."""

from __future__ import annotations

import cProfile
import functools
import pstats
from collections.abc import Callable
from pathlib import Path

import pytest
from simulated_cluster import Course, Nobody, SimulatedCluster, complete, factorial

from ablate.cluster.contract import Attempt
from ablate.records.folder import StudyRecord
from ablate.runner import controller, hold
from ablate.runner.status import StudyStatus
from ablate.search.book import CellBook
from ablate.study import Study, design


def run_simulated(
    study: Study,
    folder: Path,
    *,
    gangs: int,
    act: Callable[[Attempt], Course] = complete,
) -> tuple[StudyStatus, SimulatedCluster, cProfile.Profile]:
    """Run a study with the real loop, records and Optuna storage; the loop's calls are counted."""
    record = StudyRecord(folder / study.name)
    cluster = SimulatedCluster(gangs, act)
    profile = cProfile.Profile()
    score = functools.partial(design.score_of, study)
    book = CellBook(study, storage=folder / f"{study.name}.db", score=score)
    with hold.controlling(record):
        profile.enable()
        status = controller.launch(
            study,
            record,
            cluster=cluster,
            book=book,
            mirror=Nobody(),
            clock=cluster.clock,
            # The picture for people takes a share of the time, which makes the count random.
            looking_share=1e-12,
        )
        profile.disable()
    book.close()
    return status, cluster, profile


@pytest.mark.exhaustive
def test_a_trial_of_a_large_study_costs_what_one_of_a_small_study_costs(tmp_path: Path) -> None:
    """The loop's function calls per trial do not grow from 40 to 400 trials on as many seats."""
    calls = {}
    for cells in (20, 200):
        study = factorial(tmp_path, cells=cells, seeds=2)
        status, cluster, profile = run_simulated(study, tmp_path, gangs=cells)
        assert status.outcomes == {"completed": cells * 2}
        assert cluster.most_running == cells
        calls[cells] = pstats.Stats(profile).total_calls / (cells * 2)  # type: ignore[attr-defined]
    assert calls[200] < 1.2 * calls[20]


def test_a_simulated_study_is_taken_up_where_it_was(tmp_path: Path) -> None:
    """Launching a finished study again starts nothing and finds every outcome. The first time, no
    trial waited until all others were written down."""
    study = factorial(tmp_path, cells=20, seeds=2)
    written: list[int] = []

    def act(attempt: Attempt) -> Course:
        written.append(len(list((tmp_path / study.name).rglob("trial.json"))))
        return complete(attempt)

    run_simulated(study, tmp_path, gangs=4, act=act)
    assert len(written) == 40 and written[0] <= 4
    status, cluster, _ = run_simulated(study, tmp_path, gangs=4)
    assert status.outcomes == {"completed": 40}
    assert cluster.most_running == 0
