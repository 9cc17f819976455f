"""Looking after every block of seeds without paying for it in false findings.

Repeating a t test after each new seed calls a null effect significant in 26 % of studies
(n = 3..30). An e-process may be looked at any number of times: under the null it exceeds m/alpha
with probability at most alpha/m, ever. Form: Gaussian mixture over the standardised effect, flat
on every nuisance (cell means, seed blocks), scale-invariant in sigma; Wang & Ramdas 2023
(arXiv 2310.03722) for the t test, Lindon et al. 2022 (arXiv 2210.08589) for linear models.

Symbols: t = estimate / standard error with `df` degrees of freedom; `information` = number of
paired differences that would give the estimate the same variance (n for n seeds of two cells).
"""

from __future__ import annotations

import math

PRIOR_SD = 2.0
"""Expected size of an effect in units of the standard deviation of one paired difference."""


def log_e(t: float, df: float, information: float, *, prior_sd: float = PRIOR_SD) -> float:
    """log of the evidence against "no effect"; reject at alpha once it reaches log(1/alpha)."""
    if df < 1:
        return 0.0
    if math.isinf(t):
        return math.inf
    g = 1 + information * prior_sd**2
    return -0.5 * math.log(g) + 0.5 * (df + 1) * (
        math.log1p(t * t / df) - math.log1p(t * t / (df * g))
    )


def anytime_p(t: float, df: float, information: float, *, prior_sd: float = PRIOR_SD) -> float:
    """1/E, at most 1: a p-value that stays valid under optional stopping."""
    return math.exp(-max(0.0, log_e(t, df, information, prior_sd=prior_sd)))


def anytime_half_width(
    standard_error: float,
    df: float,
    information: float,
    *,
    alpha: float = 0.05,
    prior_sd: float = PRIOR_SD,
) -> float:
    """Half-width of the confidence sequence; infinite while there is too little evidence."""
    if df < 1:
        return math.inf
    g = 1 + information * prior_sd**2
    log_b = (math.log(g) - 2 * math.log(alpha)) / (df + 1)
    if log_b >= math.log(g):
        return math.inf
    b = math.exp(log_b)
    return standard_error * math.sqrt(df * (b - 1) / (1 - b / g))
