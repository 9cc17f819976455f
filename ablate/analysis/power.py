"""What n seeds can show, before they are paid for.

Unpooled: n paired differences with standard deviation `sigma` = sd of one difference, df = n - 1.
Pooled: `cells` cells x n seeds; `sigma` = residual standard deviation of one run (block effect
removed), standard error sigma*sqrt(2/n), df = noise.typical_df.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import scipy

from ablate.analysis.multiplicity import MOST_DUNNETT, dunnett_quantile
from ablate.analysis.noise import typical_df
from ablate.errors import AnalysisError


def t_quantile(tail: float, df: float) -> float:
    """The t that is exceeded with probability `tail`; ten times as fast as scipy.stats."""
    return -float(scipy.special.stdtrit(df, tail))


def critical(n: int, *, alpha: float = 0.05, contrasts: int = 1, cells: int | None = None) -> float:
    """Two-sided critical t: Dunnett when pooled, Bonferroni when not. Infinite at df 0."""
    df = degrees(n, cells)
    if df < 1:
        return math.inf
    if cells is None or contrasts == 1 or contrasts > MOST_DUNNETT:
        return t_quantile(alpha / (2 * contrasts), df)
    # All contrasts share the baseline: correlation 1/2.
    correlation = np.full((contrasts, contrasts), 0.5) + 0.5 * np.eye(contrasts)
    return dunnett_quantile(alpha, correlation, df)


def detection_power(
    n: int,
    effect: float,
    *,
    sigma: float = 1.0,
    alpha: float = 0.05,
    contrasts: int = 1,
    cells: int | None = None,
) -> float:
    """Probability that n seeds show a true `effect` to differ from 0."""
    df = degrees(n, cells)
    if df < 1:
        return 0.0
    t = critical(n, alpha=alpha, contrasts=contrasts, cells=cells)
    shift = abs(effect) / (sigma * _scale(n, cells)) if sigma > 0 else math.inf
    return _two_sided_power(shift, t, df)


def mde(
    n: int,
    *,
    sigma: float = 1.0,
    alpha: float = 0.05,
    power: float = 0.8,
    contrasts: int = 1,
    cells: int | None = None,
) -> float:
    """Smallest true effect that n seeds show with probability `power`; infinite for n < 2."""
    return _shift_shown(n, alpha, power, contrasts, cells) * sigma * _scale(n, cells)


@lru_cache(maxsize=256)
def _shift_shown(n: int, alpha: float, power: float, contrasts: int, cells: int | None) -> float:
    """The same in standard errors of the contrast."""
    df = degrees(n, cells)
    if df < 1:
        return math.inf
    t = critical(n, alpha=alpha, contrasts=contrasts, cells=cells)
    top = t
    while _two_sided_power(top, t, df) < power:
        top *= 2
    return float(scipy.optimize.brentq(lambda x: _two_sided_power(x, t, df) - power, 0.0, top))


def equivalence_power(
    n: int,
    margin: float,
    *,
    sigma: float = 1.0,
    effect: float = 0.0,
    alpha: float = 0.05,
    cells: int | None = None,
) -> float:
    """Probability that two one-sided tests put a true `effect` inside +-margin."""
    df = degrees(n, cells)
    if df < 1 or margin <= 0:
        return 0.0
    se = _scale(n, cells) * sigma
    if se == 0:
        return float(abs(effect) < margin)
    t = t_quantile(alpha, df)
    # Average over equally likely values of the estimated standard error.
    s = np.sqrt(_chi2_grid(df) / df)
    room = np.maximum(margin - t * se * s, 0.0)
    inside = scipy.special.ndtr((room - effect) / se) - scipy.special.ndtr((-room - effect) / se)
    return float(np.mean(inside))


def sigma_upper(sigma: float, df: float, *, confidence: float = 0.8) -> float:
    """Upper bound of a standard deviation from a pilot; plan with it, not with the estimate."""
    if df < 1:
        raise AnalysisError(f"a pilot with {df} degrees of freedom bounds nothing: run >= 2 seeds")
    return float(sigma * math.sqrt(df / scipy.stats.chi2.ppf(1 - confidence, df)))


def degrees(n: int, cells: int | None) -> float:
    """Degrees of freedom of one contrast."""
    if cells is not None and cells < 2:
        raise AnalysisError(f"{cells} cell: a comparison needs at least 2")
    return n - 1 if cells is None else typical_df(cells, n)


def _scale(n: int, cells: int | None) -> float:
    """Standard error of a contrast in units of sigma."""
    return math.sqrt((1 if cells is None else 2) / n)


def _two_sided_power(shift: float, t: float, df: float) -> float:
    if shift > 37:  # beyond the accuracy of the noncentral t
        s = np.sqrt(_chi2_grid(df) / df)
        return float(np.mean(scipy.stats.norm.cdf(shift - t * s)))
    above, below = scipy.stats.nct.sf(t, df, shift), scipy.stats.nct.cdf(-t, df, shift)
    return float(np.nan_to_num(above) + np.nan_to_num(below))


@lru_cache(maxsize=256)
def _chi2_grid(df: float) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    grid: np.ndarray[tuple[int, ...], np.dtype[np.float64]] = scipy.special.chdtri(
        df, (np.arange(500) + 0.5) / 500
    )
    return grid
