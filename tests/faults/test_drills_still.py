"""Trials in which nothing moves any more."""

from __future__ import annotations

from collections.abc import Callable

import drills
import pytest
from drills import Run, Stage
from test_drills import assert_in_time

pytestmark = [pytest.mark.slow, pytest.mark.drill]


@pytest.mark.parametrize(
    "drill",
    [
        drills.stopped_rank,
        pytest.param(drills.hung_collective, marks=pytest.mark.drill),
        pytest.param(drills.hung_evaluation, marks=pytest.mark.drill),
        drills.slow_evaluation,
    ],
    ids=["stopped_rank", "hung_collective", "hung_evaluation", "slow_evaluation"],
)
def test_a_trial_that_stands_still_is_ended_and_a_slow_one_is_not(
    stage: Stage, drill: Callable[[Stage, int], Run]
) -> None:
    """What hangs costs its patience; a slow evaluation is waited for."""
    assert_in_time(drill, drill(stage, 1))
