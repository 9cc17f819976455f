"""Whatever befalls a trial, its study ends as the study that nothing befell."""

from __future__ import annotations

from collections.abc import Callable

import drills
import pytest
from drills import Run, Stage, allowed_s

SEEDS = (1, pytest.param(2, marks=pytest.mark.drill), pytest.param(3, marks=pytest.mark.drill))
"""When it happens: at the first of these in the suite, where a drill is part of it."""
pytestmark = [pytest.mark.slow, pytest.mark.drill]

BOUNDS_S = {drills.killed_worker: 5.0, drills.stopped_rank: 30.0}
"""From the fault to the next attempt's first step, on a quiet machine."""


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    "drill",
    [
        drills.killed_worker,
        drills.damaged_checkpoints,
        drills.preempted,
        drills.preempted_in_a_hurry,
    ],
    ids=["killed_worker", "damaged_checkpoints", "preempted", "preempted_in_a_hurry"],
)
def test_a_killed_or_preempted_worker_costs_time_and_changes_nothing(
    stage: Stage, drill: Callable[[Stage, int], Run], seed: int
) -> None:
    """Every step's numbers and the report are those of the run that nothing befell."""
    assert_in_time(drill, drill(stage, seed))


def assert_in_time(drill: Callable[[Stage, int], Run], run: Run) -> None:
    recoveries_s = [again for again in run.recoveries_s() if again == again]
    print(f"{drill.__name__}: training again after", [round(again, 2) for again in recoveries_s])
    if drill in BOUNDS_S:
        assert max(recoveries_s, default=0.0) < allowed_s(BOUNDS_S[drill])
