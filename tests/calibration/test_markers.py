"""How often the markers name a healthy run, and what they find; see docs/markers.md.

    pytest tests/calibration/test_markers.py -m calibration -s

MARKER_RUNS (100) simulated runs a kind of noise and length, from run MARKER_FIRST (0) on, so that
they can be had in pieces: one of 91,000 steps takes 5 s of a core. The unmarked tests are the small
version of it.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "markers"))

from simulated_runs import FAULTS, KINDS, SIGMA, Run, fine_tuned, healthy, loss_of, spike

RUNS = int(os.environ.get("MARKER_RUNS", "100"))
FIRST = int(os.environ.get("MARKER_FIRST", "0"))
LENGTHS = (100, 276, 1500, 5000, 91_000)
Simulation = Callable[[np.random.Generator, int, str], Run]


def named(
    runs: int, steps: int, kind: str, *, first: int = 0, make: Simulation = healthy
) -> tuple[int, Counter[str]]:
    """How many of so many healthy runs get a name, and by which markers; each has its own seed."""
    by = Counter[str]()
    for number in range(first, first + runs):
        rng = np.random.default_rng([steps, number, list(KINDS).index(kind)])
        verdict = make(rng, steps, kind).judged().verdict
        if verdict.name != "STABLE":
            by[f"{verdict.name} by {verdict.marker}"] += 1
        assert verdict.stop is None, verdict
    return sum(by.values()), by


def spikes_found(runs: int, steps: int, kind: str, height: float, *, seed: int = 0) -> int:
    """In how many of so many runs a spike names the run where it is."""
    rng, found = np.random.default_rng(seed), 0
    for _ in range(runs):
        run = Run({"loss": loss_of(rng, steps, kind)}, warmup=steps // 10)
        k = int(rng.integers(steps // 2, 9 * steps // 10))
        spike(height)(run, k, np.arange(steps - k))
        found += any(
            item.marker == "loss_spike"
            and item.verdict != "STABLE"
            and -5 < item.first_step - k < 20
            for item in run.judged().events
        )
    return found


def broken_found(name: str, steps: int, *, seed: int = 0) -> str:
    """The verdict on a run with this fault, once its marker has told of it."""
    rng, fault = np.random.default_rng(seed), FAULTS[name]
    run = healthy(rng, steps, "normal")
    k = int(rng.integers(steps // 3, steps // 2))
    fault.do(run, k, np.arange(steps - k))
    judgement = run.judged()
    told = [e for e in judgement.events if e.marker == fault.marker and e.detected_at >= k]
    assert told, (name, judgement.verdict)
    return judgement.verdict.name


@pytest.mark.parametrize("kind", KINDS)
def test_short_healthy_runs_are_hardly_ever_named(kind: str) -> None:
    """12 runs of 276 steps with all their columns: at most one gets a name, none is stopped."""
    count, by = named(12, 276, kind)
    assert count <= 1, by


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "t4" not in kind])
def test_noise_by_itself_names_no_run(kind: str) -> None:
    """Losses that hardly fall under noise of 0.3 nat: such noise is no overshoot, no spike, and no
    rise, also where neighbours are alike."""
    for steps in (120, 276):
        count, by = named(25, steps, kind, make=fine_tuned)
        assert count <= 1, (steps, by)


@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_is_found_at_a_clear_size(name: str) -> None:
    """In a run of 4,000 steps each is told by its marker, and names the run where it should."""
    assert broken_found(name, 4000) == FAULTS[name].verdict


@pytest.mark.calibration
@pytest.mark.timeout(0)
@pytest.mark.parametrize("steps", LENGTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_healthy_runs_are_named_in_two_per_cent(kind: str, steps: int) -> None:
    """Whatever the length: at most 2 % by the upper end of what chance makes of it (two standard
    deviations); with heavy tails 5 %."""
    count, by = named(RUNS, steps, kind, first=FIRST)
    print(f"\n{kind}, {steps} steps: {count} of {RUNS} healthy runs are named {dict(by)}")
    share = 0.05 if "t4" in kind else 0.02
    assert count <= share * RUNS + 2 * (share * RUNS) ** 0.5, by


@pytest.mark.calibration
@pytest.mark.timeout(0)
@pytest.mark.parametrize("steps", [100, 276, 1500, 5000])
@pytest.mark.parametrize("kind", KINDS)
def test_noisy_runs_are_named_in_two_per_cent(kind: str, steps: int) -> None:
    """The same of losses that hardly fall; with heavy tails, of which every row far out is seen
    then, 15 %."""
    count, by = named(RUNS, steps, kind, first=FIRST, make=fine_tuned)
    print(f"\n{kind}, {steps} steps: {count} of {RUNS} noisy runs are named {dict(by)}")
    share = 0.15 if "t4" in kind else 0.02
    assert count <= share * RUNS + 2 * (share * RUNS) ** 0.5, by


@pytest.mark.calibration
@pytest.mark.timeout(0)
@pytest.mark.parametrize("steps", [276, 1500, 5000, 20_000])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "t4, AR .9"])
def test_spikes_are_found(kind: str, steps: int) -> None:
    """Of 8 deviations in 95 %, of 12 in 99 %; in t4 noise of AR .9 both are ordinary rows."""
    found = {height: spikes_found(RUNS, steps, kind, height) for height in (8, 12)}
    print(f"\n{kind}, {steps} steps: found {found} of {RUNS} spikes (sigma {SIGMA})")
    assert found[12] >= 0.9 * RUNS


@pytest.mark.calibration
@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_is_found_in_many_runs(name: str) -> None:
    """As above, in ten runs of 12,000 steps each."""
    verdicts = Counter(broken_found(name, 12_000, seed=seed) for seed in range(10))
    assert verdicts == {FAULTS[name].verdict: 10}
