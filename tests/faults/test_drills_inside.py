"""What goes wrong inside of a trial: numbers, clocks, data, memory."""

from __future__ import annotations

from collections.abc import Callable

import drills
import pytest
from drills import Run, Stage
from test_drills import assert_in_time

pytestmark = pytest.mark.slow


IN_THE_SUITE = [drills.broken_trial]
ON_DEMAND = [
    *((drills.nan_on_one_rank, seed) for seed in (1, 2, 3)),
    (drills.bad_data, 1),
    *((drills.clock_jumps, seed) for seed in (1, 2, 3)),
    (drills.out_of_memory, 1),
]
CASES = [
    *(pytest.param(drill, 1, id=f"{drill.__name__}-1") for drill in IN_THE_SUITE),
    *(
        pytest.param(drill, seed, id=f"{drill.__name__}-{seed}", marks=pytest.mark.drill)
        for drill, seed in ON_DEMAND
    ),
]


@pytest.mark.parametrize(("drill", "seed"), CASES)
def test_what_goes_wrong_inside_ends_as_it_must(
    stage: Stage, drill: Callable[[Stage, int], Run], seed: int
) -> None:
    """Each drill says what must come of it; the invariants hold after all of them."""
    assert_in_time(drill, drill(stage, seed))
