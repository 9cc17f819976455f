"""How soon a freed seat trains again: our gangs against Ray Tune over Ray Train V2, in one run.

    pytest tests/bench/test_launch_latency.py -m bench -s

Both run the same two-rank DDP step on the same machine, one trial after another, dashboard off.
Measured is the gap from the end of one trial's training to the first step of the next.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from ablate.cluster.contract import Attempt, Shape
from ablate.cluster.ray_cluster import RayCluster

HERE = Path(__file__).parent
pytestmark = [pytest.mark.bench, pytest.mark.timeout(900)]


def gaps(folder: Path) -> list[float]:
    """Seconds from each trial's end to the next one's first step."""
    rows = [json.loads(line) for line in (folder / "times.jsonl").read_text().splitlines()]
    return [
        after["first_step"] - before["end"] for before, after in zip(rows, rows[1:], strict=False)
    ]


def ours(folder: Path, trials: int) -> tuple[list[float], list[float]]:
    """Gaps, and the part of them from placement to the first step."""
    trial = folder / "t"
    trial.mkdir()
    placed = []
    env = {"PYTHONPATH": str(HERE)}
    with RayCluster(num_cpus=2) as cluster:
        for number in range(1, trials + 1):
            cluster.start(
                Attempt("t", number, trial, Shape(workers=2), "launch_entries:train", env)
            )
            events = []
            while not events or events[-1].kind == "placed":
                events += cluster.wait(60)
            assert events[-1].exit_codes == (0, 0), events[-1].detail
            placed.append(events[0].time)
    rows = [json.loads(line) for line in (folder / "times.jsonl").read_text().splitlines()]
    waits = [row["first_step"] - moment for row, moment in zip(rows, placed, strict=True)]
    return gaps(folder), waits[1:]


def test_a_freed_seat_trains_again_soon(tmp_path: Path) -> None:
    """From placement to the first step 0.3 s at most, and 20 times sooner than the peer."""
    our_gaps, waits = ours(tmp_path, 8)
    # Short, for Ray's sockets.
    folder = Path(tempfile.mkdtemp(prefix="peer-"))
    try:
        subprocess.run(
            [sys.executable, str(HERE / "peer_launch.py"), str(folder), "3"],
            check=True,
            timeout=600,
        )
        peer_gaps = gaps(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"\nours: gap {_show(our_gaps)}; placement to first step {_show(waits)}")
    print(f"peer: gap {_show(peer_gaps)}")
    assert statistics.median(waits) <= 0.3
    assert statistics.median(peer_gaps) >= 20 * statistics.median(our_gaps)


def _show(values: list[float]) -> str:
    return f"median {statistics.median(values):.3f} s of {len(values)} (max {max(values):.3f} s)"
