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
from functools import partial
from typing import Any

from ablate.analysis import power
from ablate.analysis.divergence import fisher

MATTERS = "MATTERS"
NEGLIGIBLE = "NEGLIGIBLE"
EQUIVALENT = "EQUIVALENT"
INCONCLUSIVE = "INCONCLUSIVE"

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
    contrasts: int,
    cells: int | None,
    alpha: float = 0.05,
) -> int | None:
    """Seeds beyond n that decide the contrast with probability 0.8 if the estimate is the truth.

    An estimate inside the margin is taken to be headed for EQUIVALENT, one outside for MATTERS.
    `sigma` and `cells` as in power.py. None: not with any number worth naming.
    """
    if not sigma > 0 or not math.isfinite(sigma):
        return max(1, LEAST_SEEDS - n)
    noise: dict[str, Any] = {"sigma": sigma, "cells": cells, "alpha": alpha}
    if margin and abs(delta) < margin:
        power_of = partial(power.equivalence_power, margin=margin, effect=delta, **noise)
    elif delta:
        power_of = partial(power.detection_power, effect=delta, contrasts=contrasts, **noise)
    else:
        return None
    total = power.seeds_needed(power_of)
    return None if total is None else max(1, total - n)


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
