"""Planning numbers against statsmodels, pingouin and published tables."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.power import TTestPower
from statsmodels.stats.weightstats import ttost_paired

from ablate.analysis import power
from ablate.analysis.analysis import analyze_results
from ablate.analysis.contrasts import sign_flip_p
from ablate.analysis.results import Objective, Result


@pytest.mark.parametrize(("n", "effect"), [(3, 2.0), (5, 1.5), (10, 1.0), (34, 0.5)])
def test_paired_power_is_statsmodels(n: int, effect: float) -> None:
    """Power of the paired t test for a standardised effect."""
    oracle = TTestPower().power(effect, n, 0.05)
    assert power.detection_power(n, effect) == pytest.approx(oracle, abs=1e-6)


def test_minimum_detectable_effect_inverts_power() -> None:
    """At the minimum detectable effect power is 0.8; one seed fewer than the table's has less."""
    for n in (2, 3, 5, 8):
        for options in ({}, {"contrasts": 8}, {"contrasts": 8, "cells": 9}):
            effect = power.mde(n, **options)
            assert power.detection_power(n, effect, **options) == pytest.approx(0.8, abs=1e-3)
    # Ten seeds by the table of Cohen's d = 1.
    assert power.detection_power(10, 1.0) >= 0.8 > power.detection_power(9, 1.0)
    assert power.mde(1) == math.inf


def test_pooling_shrinks_what_three_seeds_can_see() -> None:
    """9 cells x 3 seeds: half as wide as alone (1.88 against 3.51 residual sd); 1.73 would be the
    width if all cells were known to be equally noisy."""
    pooled = power.critical(3, cells=9) * math.sqrt(2 / 3)
    alone = power.critical(3) * math.sqrt(2 / 3)
    assert pooled == pytest.approx(1.88, abs=0.005)
    assert alone == pytest.approx(3.51, abs=0.005)


def test_equivalence_power_matches_simulation() -> None:
    """Two one-sided tests on simulated pairs succeed as often as forecast."""
    generator = np.random.default_rng(0)
    n, margin, effect = 6, 1.5, 0.3
    x = generator.normal(effect, 1, (40_000, n))
    mean, se = x.mean(1), x.std(1, ddof=1) / math.sqrt(n)
    room = stats.t.isf(0.05, n - 1) * se
    simulated = ((mean + room < margin) & (mean - room > -margin)).mean()
    forecast = power.equivalence_power(n, margin, effect=effect)
    assert forecast == pytest.approx(simulated, abs=0.01)


def test_equivalence_p_is_that_of_statsmodels_and_pingouin() -> None:
    """TOST on two cells: the larger of both one-sided p-values, by two oracles."""
    import pingouin

    generator = np.random.default_rng(5)
    base = generator.normal(0.2, 0.01, 7)
    level = base + generator.normal(0.001, 0.004, 7)
    results = [
        Result((("lr", name),), seed, "completed", float(value))
        for name, column in (("1", base), ("5", level))
        for seed, value in enumerate(column)
    ]
    ours = analyze_results(
        results, baseline={"lr": "1"}, objective=Objective("top1", "maximize", 0.005)
    ).contrasts[0]
    oracle = ttost_paired(level, base, -0.005, 0.005)[0]
    assert ours.p_equivalence == pytest.approx(oracle)
    table = pingouin.tost(level, base, bound=0.005, paired=True)
    assert ours.p_equivalence == pytest.approx(float(table["pval"].iloc[0]), abs=1e-4)


def test_sign_flip_is_scipys_permutation_test() -> None:
    """Exact p of paired differences with ties and both signs."""
    d = np.array([0.3, -0.1, 0.4, 0.4, 0.2, -0.05, 0.6])
    oracle = stats.permutation_test(
        (d,), lambda x, axis: x.mean(axis=axis), permutation_type="samples", vectorized=True
    )
    assert sign_flip_p(d) == pytest.approx(oracle.pvalue)
    assert sign_flip_p(np.arange(1.0, 6.0)) == 2 / 2**5  # five pairs never reach 0.05


def test_pilot_bound_covers() -> None:
    """The upper 80 % bound of sigma exceeds the truth in 80 % of pilots of 5 seeds."""
    s = np.random.default_rng(0).normal(0, 1, (20_000, 5)).std(1, ddof=1)
    factor = power.sigma_upper(1.0, 4)
    assert (s * factor >= 1).mean() == pytest.approx(0.8, abs=0.01)
