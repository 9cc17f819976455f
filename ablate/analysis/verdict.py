"""The verdict on one contrast, and how many more seeds would bring one.

Two questions, answered separately: is there a difference (familywise adjusted p), and is it
smaller than the margin fixed beforehand (two one-sided tests)? A large p alone never means "no
effect".

                      shown to be inside +-margin      not shown
    difference shown  NEGLIGIBLE                       MATTERS if the estimate reaches the margin
    not shown         EQUIVALENT                       INCONCLUSIVE
"""

from __future__ import annotations

import math
from collections.abc import Callable

import scipy

from ablate.analysis.divergence import fisher

MATTERS = "MATTERS"
NEGLIGIBLE = "NEGLIGIBLE"
EQUIVALENT = "EQUIVALENT"
INCONCLUSIVE = "INCONCLUSIVE"
DEPENDS = "DEPENDS"
"""What the level does depends on another factor's level, so its average is no answer."""
STANDS_OUT = "STANDS_OUT"
"""A difference is shown, but this design cannot tell it from pairs of other factors."""

MOST_SEEDS = 50
"""More seeds than this are not proposed."""
LEAST_SEEDS = 3
"""What an undecided contrast without any estimate of the noise is asked for."""


def judge(delta: float, *, different: bool, inside: bool, margin: float | None) -> str:
    """The table above. `margin` None counts every shown difference as one that matters."""
    if inside:
        return NEGLIGIBLE if different else EQUIVALENT
    if different and abs(delta) >= (margin or 0.0):
        return MATTERS
    return INCONCLUSIVE


def more_seeds(
    delta: float,
    n: int,
    *,
    sigma: float,
    margin: float | None,
    half_widths: Callable[[int], tuple[float, float]],
    df: float,
    spread: float | None = None,
) -> int | None:
    """Fewest seeds beyond n that decide the contrast with probability 0.8; None: over MOST_SEEDS.

    The probability is over what the further seeds may bring, given those there are: the true
    difference is not the estimate, which was left open partly by luck. `sigma`: standard
    deviation of one seed's difference, from `df` degrees of freedom. `half_widths` of the
    estimate from so many seeds in all, in the same units: (that of the interval which must leave
    0 out, that of the one which must lie inside the margin). `spread`: standard deviation of the
    true differences of this kind, where the study tells it; flat without.
    """
    if not sigma > 0 or not math.isfinite(sigma):
        return max(1, LEAST_SEEDS - n)
    kept = 1.0 if spread is None else spread**2 / (spread**2 + sigma**2 / n)

    def decided(more: int) -> float:
        total = n + more
        middle = (n * delta + more * kept * delta) / total
        sd = more / total * math.sqrt(kept * sigma**2 / n + sigma**2 / more)
        apart, inside = half_widths(total)
        beyond = max(apart, margin or 0.0)
        above = scipy.special.stdtr(df, (middle - beyond) / sd) + scipy.special.stdtr(
            df, -(middle + beyond) / sd
        )
        room = (margin or 0.0) - inside
        within = 0.0
        if room > 0:
            within = scipy.special.stdtr(df, (room - middle) / sd) - scipy.special.stdtr(
                df, (-room - middle) / sd
            )
        return float(above + within)

    return next((more for more in range(1, MOST_SEEDS + 1) if decided(more) >= 0.8), None)


def more_seeds_for_divergence(
    level: tuple[int, int],
    reference: tuple[int, int],
    *,
    stable_runs: int,
    tests: float,
    alpha: float = 0.05,
) -> int | None:
    """Seeds beyond the present ones that show the divergence rates to differ if they stay."""
    n = max(level[1], reference[1])
    if n == 0 or level[0] * reference[1] == reference[0] * level[1]:
        return None
    pooled = min(level[0], reference[0]) == 0
    for total in range(n + 1, 20 * n + 50):
        grown = [
            (round(k * total / max(runs, 1)), total if runs else 0)
            for k, runs in (level, reference)
        ]
        extra = round(stable_runs * total / n) if pooled else 0
        calm = 0 if grown[0][0] == 0 else 1
        if pooled:
            grown[calm] = (grown[calm][0], grown[calm][1] + extra)
        if fisher(grown[0], grown[1]) * tests <= alpha:
            return total - n
    return None
