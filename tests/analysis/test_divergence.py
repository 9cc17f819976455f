"""Exact small-sample statements about runs that diverged."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.proportion import proportion_confint

from ablate.analysis.divergence import clopper_pearson, compare_divergence, fisher, permutation_p


@pytest.mark.parametrize(("k", "n"), [(0, 5), (1, 5), (3, 7), (5, 5)])
def test_clopper_pearson_is_statsmodels(k: int, n: int) -> None:
    """The exact interval of a rate."""
    oracle = proportion_confint(k, n, method="beta")
    assert clopper_pearson(k, n) == pytest.approx(tuple(np.nan_to_num(oracle, nan=float(k == n))))


def test_fisher_has_its_published_values() -> None:
    """0 of 5 against 3, 4, 5 of 5."""
    assert fisher((3, 5), (0, 5)) == pytest.approx(0.167, abs=5e-4)
    assert fisher((4, 5), (0, 5)) == pytest.approx(0.048, abs=5e-4)
    assert fisher((5, 5), (0, 5)) == pytest.approx(0.008, abs=5e-4)
    assert fisher((0, 0), (2, 5)) == 1.0


def test_permutation_p_is_scipys() -> None:
    """Exact and sampled p-values agree with scipy's unpaired permutation test."""
    generator = np.random.default_rng(0)
    for sizes in ((5, 6), (10, 12)):
        one, zero = (generator.normal(m, 1, n) for m, n in zip((0.9, 0), sizes, strict=True))
        oracle = stats.permutation_test(
            (one, zero), lambda x, y, axis: x.mean(axis=axis) - y.mean(axis=axis),
            vectorized=True, n_resamples=50_000, rng=np.random.default_rng(1),
        )  # fmt: skip
        assert permutation_p(one, zero) == pytest.approx(oracle.pvalue, abs=0.01)


def test_other_stable_cells_join_the_arm_that_did_not_diverge() -> None:
    """3 of 3 against 0 of 3 proves nothing; against 0 of 27 it does."""
    level, base = np.full(3, np.nan), np.array([0.2, 0.21, 0.19])
    found = compare_divergence(level, base, stable_runs=24, chance=0.001, maximize=True)
    assert found.fisher_p == pytest.approx(0.1)
    assert found.pooled_p == pytest.approx(1 / 4060)
    assert found.composite_delta == pytest.approx(-0.199)
    both = compare_divergence(level, level, stable_runs=24, chance=0.001, maximize=True)
    assert both.pooled_p is None and both.composite_p == 1.0


def test_composite_without_a_chance_value_ranks_divergence_last() -> None:
    """Any survivor beats any diverged run, whichever way is better."""
    level, base = np.array([np.nan, np.nan, np.nan, 5.0]), np.array([1.0, 1.1, 0.9, 1.0])
    up = compare_divergence(level, base, stable_runs=0, chance=None, maximize=True)
    down = compare_divergence(-level, -base, stable_runs=0, chance=None, maximize=False)
    assert up.composite_p == down.composite_p == pytest.approx(fisher((3, 4), (0, 4)))
    assert up.composite_delta is None
    assert up.composite_better is False and down.composite_better is False


def test_equal_rates_leave_the_word_to_the_survivors() -> None:
    """One of five diverged in each arm: the composite follows the survivors' values."""
    base = np.array([np.nan, 0.2, 0.21, 0.19, 0.2])
    found = compare_divergence(base + 0.05, base, stable_runs=9, chance=None, maximize=True)
    assert found.pooled_p is None and found.fisher_p == 1.0
    assert found.composite_better is True
