"""What goes wrong inside of a trial: numbers, clocks, data, memory."""

from __future__ import annotations

from collections.abc import Callable

import drills
import pytest
from drills import Run, Stage
from test_drills import SEEDS, assert_in_time

pytestmark = pytest.mark.slow


CASES = [
    *((drills.nan_on_one_rank, seed) for seed in SEEDS),
    *((drills.clock_jumps, seed) for seed in SEEDS),
    (drills.bad_data, 1),  # three studies in one: one seed is enough
    (drills.out_of_memory, 1),
    (drills.broken_trial, 1),
]


@pytest.mark.parametrize(
    ("drill", "seed"), CASES, ids=[f"{drill.__name__}-{seed}" for drill, seed in CASES]
)
def test_what_goes_wrong_inside_ends_as_it_must(
    stage: Stage, drill: Callable[[Stage, int], Run], seed: int
) -> None:
    """Each drill says what must come of it; the invariants hold after all of them."""
    assert_in_time(drill, drill(stage, seed))
