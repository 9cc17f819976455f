"""Rungs against the whole study: how far verdicts agree, and what is advised."""

from __future__ import annotations

import numpy as np
import pytest
from simulated_studies import Factors, one_at_a_time, run

from ablate.analysis.analysis import analyze_results
from ablate.analysis.ladder import Verdicts, agree
from ablate.analysis.results import Objective

FACTORS: Factors = {name: ["0", "1"] for name in "abcdefghij"}
GOAL = Objective("top1", "maximize", 0.01, chance=0.1)
"""Ten comparisons: three better, three worse, four without effect."""
EFFECTS = {"a=1": 0.05, "b=1": 0.04, "c=1": 0.03, "d=1": -0.03, "e=1": -0.04, "f=1": -0.05}


def verdicts(effects: dict[str, float], *, seed: int, sigma: float = 0.002) -> Verdicts:
    results = run(one_at_a_time(FACTORS), seeds=4, sigma=sigma, seed=seed, effects=effects)
    base = dict.fromkeys(FACTORS, "0")
    found = analyze_results(results, baseline=base, objective=GOAL)
    return {(c.factor, c.level): c for c in found.contrasts}


def test_a_rung_that_ranks_alike_stands_for_the_study() -> None:
    """The same effects in other runs: all ten verdicts are the same, none is opposite."""
    found = agree(verdicts(EFFECTS, seed=0), verdicts(EFFECTS, seed=1))
    assert (found.same, found.of, found.against) == (10, 10, 0) and found.stands_for_it
    assert found.interval == pytest.approx((0.6915, 1.0), abs=1e-3)
    assert found.tau is not None and found.tau > 0.6
    assert found.tau_interval is not None and found.tau_interval[0] < found.tau


def test_a_rung_that_turns_effects_round_does_not() -> None:
    """Where a cheaper run likes what the whole one does not, that is counted, and nothing is
    advised; so where it sees nothing."""
    turned = {**EFFECTS, "a=1": -0.05, "f=1": 0.05}
    found = agree(verdicts(EFFECTS, seed=0), verdicts(turned, seed=1))
    assert (found.same, found.against) == (8, 2) and not found.stands_for_it
    blind = agree(verdicts(EFFECTS, seed=0), verdicts({}, seed=1, sigma=0.1))
    assert blind.same <= 1 and not blind.stands_for_it


@pytest.mark.calibration
def test_ranks_of_chance_agree_by_chance() -> None:
    """Over 60 pairs of studies without effects the interval of tau holds 0 in nearly all."""
    held = []
    for seed in range(60):
        found = agree(verdicts({}, seed=2 * seed), verdicts({}, seed=2 * seed + 1))
        assert found.tau_interval is not None
        held.append(found.tau_interval[0] <= 0 <= found.tau_interval[1])
    assert np.mean(held) >= 0.85
