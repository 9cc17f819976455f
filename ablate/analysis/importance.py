"""How much of the variation each factor explains: omega squared from the design itself.

For a factor with L levels: variance of its level means (weights 1/L), less what noise alone would
add. The share is taken of the variance of one run when all factors are set at random and the seed
varies: all factors' variances (plus, in a complete crossing, their interactions) plus the seeds'.
In a crossing this is the classical omega squared; in one-at-a-time designs it assumes additivity.

The interval inverts the noncentral F. (Resampling 3 to 5 seed blocks covers far too seldom: the
blocks' own spread is lost with every duplicate.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import scipy

from ablate.analysis.effects import Comparison, is_crossed
from ablate.analysis.fit import Fit
from ablate.analysis.results import Table


@dataclass(frozen=True, slots=True)
class Importance:
    """A factor's share of the variance, between 0 and 1."""

    factor: str
    share: float
    ci: tuple[float, float] | None
    """95 %; None without replicates."""
    p: float | None
    """F test of "all levels are equal"."""
    exploratory: bool


def importances(
    table: Table,
    comparisons: Sequence[Comparison],
    fitted: Fit,
    *,
    exploratory: bool = False,
    confidence: float = 0.95,
) -> tuple[Importance, ...]:
    """Importances of the factors whose contrasts all lie in the pool, largest first.

    Levels with diverged or unequally noisy cells are left out; a factor without a usable level
    has no importance.
    """
    if fitted.df < 1 or not fitted.mse > 0:
        return ()
    rows = list(fitted.rows)
    parts: dict[str, tuple[float, float, int, int]] = {}
    for factor in table.factors:
        weights = [
            c.weights
            for c in comparisons
            if c.factor == factor and np.any(c.weights) and fitted.usable(c.weights)
        ]
        if not weights:
            continue
        # Level means relative to the reference level, which is the zero row.
        stack = np.vstack([np.zeros(len(table.cells)), *weights])[:, rows]
        centred = stack - stack.mean(axis=0)
        means = centred @ fitted.effects
        levels = len(stack)
        used = np.flatnonzero(centred.any(axis=0))  # of thousands of cells a few
        part = centred[:, used]
        inner = fitted.layout.spread[np.ix_(used, used)]
        spread = float(np.trace(part @ inner @ part.T)) / levels
        parts[factor] = (float(means @ means) / levels, spread, levels, levels - 1)
    if not parts:
        return ()
    variances = {f: explained - fitted.mse * noise for f, (explained, noise, _, _) in parts.items()}
    rest = _remaining_variance(table, fitted)
    if is_crossed(table):
        effects = fitted.effects - fitted.effects.mean()
        count = len(rows)
        cells = float(effects @ effects) / count
        noise = float(np.trace(fitted.layout.spread) - fitted.layout.spread.sum() / count) / count
        total = cells - fitted.mse * noise + rest
    else:
        total = sum(variances.values()) + rest
    found = []
    for factor, (explained, noise, _, df1) in parts.items():
        per_df = noise / df1
        f = explained / (df1 * per_df * fitted.mse)
        share = float(np.clip(variances[factor] / total, 0.0, 1.0)) if total > 0 else 0.0
        bounds = noncentral_f_interval(f, df1, fitted.df, confidence=confidence)
        others = max(total - variances[factor], 1e-300)
        # noncentrality = variance / (mse x noise of one degree of freedom)
        low, high = (bound * fitted.mse * per_df for bound in bounds)
        ci = (low / (low + others), high / (high + others) if high < math.inf else 1.0)
        p = float(scipy.stats.f.sf(f, df1, fitted.df))
        found.append(Importance(factor, share, ci, p, exploratory))
    return tuple(sorted(found, key=lambda importance: -importance.share))


def _remaining_variance(table: Table, fitted: Fit) -> float:
    """Variance of a run around its cell mean: blocks plus residual, as omega squared counts."""
    y = table.values[np.ix_(fitted.rows, fitted.seeds)]
    means = np.nanmean(y, axis=1, keepdims=True)
    runs = int((~np.isnan(y)).sum())
    within = float(np.nansum((y - means) ** 2))
    return (within + len(fitted.rows) * fitted.mse) / runs


def noncentral_f_interval(
    f: float, df1: int, df2: int, *, confidence: float = 0.95
) -> tuple[float, float]:
    """Interval of the noncentrality of an observed F statistic; bounds are >= 0."""
    if f > 1e4:  # scipy's noncentral F gives out; the share is 1 to three digits
        return 1e4 * df1 / 2, math.inf
    tail = (1 - confidence) / 2
    return _noncentrality(f, df1, df2, 1 - tail), _noncentrality(f, df1, df2, tail)


@lru_cache(maxsize=1024)
def _noncentrality(f: float, df1: int, df2: int, quantile: float) -> float:
    """The noncentrality whose distribution puts `quantile` below f; 0 when none does."""

    def below(nc: float) -> float:
        return float(
            scipy.stats.ncf.cdf(f, df1, df2, nc) if nc > 0 else scipy.stats.f.cdf(f, df1, df2)
        )

    if below(0.0) <= quantile:
        return 0.0
    high = max(1.0, df1 * f)
    while below(high) > quantile:
        high *= 2
    return float(scipy.optimize.brentq(lambda nc: below(nc) - quantile, 0.0, high, rtol=1e-6))
