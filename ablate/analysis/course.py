"""Which number of a run's evaluations stands for the run, and how much each choice tells.

The last evaluation, the mean of the last few, or the one at which another set was best: which of
them tells cells apart best differs from study to study, and is measured from its own curves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

import numpy as np
import scipy

from ablate.analysis.results import FloatArray, is_score

At = Literal["last", "mean_last_k", "best_by_heldout"]
LEAST = 3
"""Degrees of freedom below which a noise says nothing."""


@dataclass(frozen=True, slots=True)
class Told:
    """What one choice tells of a study."""

    at: At
    noise: float
    """Standard deviation of one run, what runs of a seed have in common taken out."""
    spread: float
    """Standard deviation of the cells' true means; 0 where noise explains all of it."""
    p: float | None
    """Of noise as large as the last evaluation's, in the same runs (Pitman 1939, Morgan 1939);
    None for the last evaluation itself, and where nothing can be said."""

    @property
    def ratio(self) -> float:
        """Signal to noise of one run."""
        return self.spread / self.noise if self.noise else math.inf


def values_of(
    evaluations: Sequence[Mapping[str, float]],
    *,
    metric: str,
    k: int,
    heldout: str | None,
    sign: float,
) -> dict[At, float]:
    """The number that a run counts with under each choice that its evaluations allow.

    `sign`: 1 where more is better. Of equally good evaluations the earliest is taken.
    """
    scores = [float(row[metric]) for row in evaluations if is_score(row.get(metric, math.nan))]
    found: dict[At, float] = {}
    if scores:
        found["last"] = scores[-1]
    if len(scores) >= k:
        found["mean_last_k"] = fmean(scores[-k:])
    best = best_of(evaluations, metric=metric, heldout=heldout, sign=sign)
    if best is not None:
        found["best_by_heldout"] = float(best[metric])
    return found


def best_of(
    evaluations: Sequence[Mapping[str, float]], *, metric: str, heldout: str | None, sign: float
) -> Mapping[str, float] | None:
    """The evaluation of `metric` at which `heldout` was best; None without any of both."""
    if heldout is None:
        return None
    both = [
        row
        for row in evaluations
        if all(is_score(row.get(name, math.nan)) for name in (metric, heldout))
    ]
    return max(both, key=lambda row: sign * row[heldout]) if both else None


def weigh(values: Mapping[At, FloatArray]) -> tuple[Told, ...]:
    """Signal and noise of each choice, from its values [cell, seed] of the same runs.

    Two-way layout with seeds as blocks: noise is the residual mean square, and the variance of the
    cells' means less what noise adds to it is the spread. Nothing below `LEAST` degrees of freedom.
    """
    residuals: dict[At, FloatArray] = {}
    found = []
    for at, y in values.items():
        cells, seeds = y.shape
        if (cells - 1) * (seeds - 1) < LEAST:
            return ()
        residual = y - y.mean(axis=1, keepdims=True) - y.mean(axis=0) + y.mean()
        square = float((residual**2).sum()) / ((cells - 1) * (seeds - 1))
        between = float(y.mean(axis=1).var(ddof=1)) - square / seeds
        residuals[at] = residual
        p = None if at == "last" else _equal_noise(residuals.get("last"), residual)
        found.append(Told(at, math.sqrt(square), math.sqrt(max(between, 0.0)), p))
    return tuple(found)


def _equal_noise(one: FloatArray | None, other: FloatArray) -> float | None:
    """p of equal variances of paired residuals [cell, seed]: their sum and difference are then
    uncorrelated."""
    if one is None:
        return None
    cells, seeds = other.shape
    df = (cells - 1) * (seeds - 1) - 1
    plus, minus = (one + other).ravel(), (one - other).ravel()
    size = float(np.linalg.norm(plus) * np.linalg.norm(minus))
    if df < 1 or not size:
        return None
    r = float(np.clip(plus @ minus / size, -1.0, 1.0))
    if abs(r) == 1.0:
        return 0.0
    return float(2 * scipy.stats.t.sf(abs(r) * math.sqrt(df / (1 - r * r)), df))
