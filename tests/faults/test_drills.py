"""Whatever befalls a study, it ends as the study that nothing befell."""

from __future__ import annotations

import drills
import pytest
from drills import Stage

SEEDS = (1, 2, 3)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_killed_worker_costs_time_and_changes_nothing(stage: Stage, seed: int) -> None:
    """A rank is killed at a random step, and rank 0 while it writes a checkpoint."""
    run = drills.killed_worker(stage, seed)
    assert max(run.recoveries_s()) < 10.0, run.recoveries_s()
