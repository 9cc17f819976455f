"""Many questions at once: Dunnett over any set of correlated contrasts, Holm, Benjamini-Hochberg.

`correlation` is the [m, m] correlation matrix of the contrasts' estimates; `df` the degrees of
freedom of the variance they share.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import scipy

from ablate.analysis.results import FloatArray

DRAWS_LOG2 = 14
"""2^14 Sobol points: p-values of Dunnett are within 0.002 of scipy's (tested)."""

MOST_DUNNETT = 200
"""Contrasts that Dunnett's test is simulated for. Beyond, Holm's is taken: with three seeds its
intervals are a fifth wider, and it takes a thousandth of the time."""

POINTS = 1024
"""The largest normal is one number a draw: so many of its quantiles stand for all draws."""


def dunnett_p(t: float, correlation: FloatArray, df: float) -> float:
    """P(max |T_i| >= |t|) under the null, T multivariate t: the two-sided adjusted p-value."""
    if not np.isfinite(t):
        return 0.0
    if len(correlation) == 1:
        return float(2 * scipy.stats.t.sf(abs(t), df))
    if t == 0:
        return 1.0
    # T = Z / s with s^2 ~ chi2/df: given Z the probability over s is exact, only Z is sampled.
    largest = _largest_normal(correlation.tobytes(), len(correlation))
    return float(np.mean(scipy.special.chdtr(df, df * largest**2 / t**2)))


def dunnett_quantile(alpha: float, correlation: FloatArray, df: float) -> float:
    """The q for which estimate +- q x standard error covers all m effects with 1 - alpha."""
    return _dunnett_quantile(alpha, correlation.tobytes(), len(correlation), df)


@lru_cache(maxsize=512)
def _dunnett_quantile(alpha: float, packed: bytes, m: int, df: float) -> float:
    correlation = np.frombuffer(packed).reshape(m, m)
    single = float(scipy.stats.t.isf(alpha / 2, df))
    if m == 1:
        return single
    bonferroni = float(scipy.stats.t.isf(alpha / (2 * m), df)) * 1.05
    return float(
        scipy.optimize.brentq(
            lambda q: dunnett_p(q, correlation, df) - alpha, single * 0.95, bonferroni, xtol=1e-4
        )
    )


@lru_cache(maxsize=64)
def _largest_normal(packed: bytes, m: int) -> FloatArray:
    """POINTS quantiles of max_i |Z_i|, from quasi-random draws of Z ~ N(0, correlation)."""
    correlation = np.frombuffer(packed).reshape(m, m)
    eigenvalues, vectors = np.linalg.eigh(correlation)
    root = vectors * np.sqrt(np.clip(eigenvalues, 0, None))
    uniform = scipy.stats.qmc.Sobol(m, scramble=True, rng=np.random.default_rng(20)).random_base2(
        DRAWS_LOG2
    )
    normal = scipy.stats.norm.ppf(np.clip(uniform, 1e-12, 1 - 1e-12))
    largest = np.sort(np.abs(normal @ root.T).max(axis=1))
    points: FloatArray = largest.reshape(POINTS, -1).mean(axis=1)
    return points


def holm(p: Sequence[float], *, total: int | None = None) -> list[float]:
    """Holm's step-down p-values. `total` counts the family when only part of it is given."""
    m = len(p) if total is None else total
    adjusted = [1.0] * len(p)
    running = 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        running = max(running, min(1.0, (m - rank) * p[i]))
        adjusted[i] = running
    return adjusted


def benjamini_hochberg(p: Sequence[float]) -> list[float]:
    """Adjusted p-values that control the share of false findings (screens, interactions)."""
    if not p:
        return []
    return [float(x) for x in scipy.stats.false_discovery_control(np.asarray(p))]
