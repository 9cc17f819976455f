"""The benchmarks still run: what they measure with, on studies of a few trials."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "bench"))
from test_bench_scale import controller_cost  # noqa: E402
from test_launch_latency import ours  # noqa: E402
from test_mirror_pace import pace  # noqa: E402


def test_the_cost_of_a_study_is_measured(tmp_path: Path) -> None:
    """With the mirror, which is complete in the end."""
    cost = controller_cost(tmp_path, cells=20, gangs=20, seeds=1, mirrored=True)
    assert cost.trials == 20
    assert cost.processor_ms > 0 and cost.wall_ms > 0 and cost.behind_s > 0


def test_the_pace_of_the_mirror_is_measured(tmp_path: Path) -> None:
    """Two trials of ten rows, all of which arrive."""
    assert pace(tmp_path, "file", num_trials=2, seconds=1) > 0


def test_the_launch_of_a_trial_is_measured(tmp_path: Path) -> None:
    """Two trials, one after the other on the same seat."""
    gaps, waits = ours(tmp_path, 2)
    assert len(gaps) == len(waits) == 1
    assert gaps[0] >= waits[0] > 0
