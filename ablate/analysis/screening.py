"""Unreplicated two-level screens: which effects stand out from the rest (Lenth 1989).

With one run per cell there is no noise to compare with, but if most effects are nil, the smaller
ones show what noise looks like. Lenth's pseudo standard error is 1.5 x the median of the |effects|
that are below 2.5 x their first guess. His t quantiles are only approximate, so critical values
are simulated for the number of effects at hand (as Ye & Hamada 2000 do).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations

import numpy as np

from ablate.analysis.results import Cell, FloatArray, Table

DRAWS = 20_000
LEAST_EFFECTS = 5
"""With fewer, the pseudo standard error says next to nothing."""


@dataclass(frozen=True, slots=True)
class ScreenEffect:
    """One effect of a screen: a factor, or two factors' interaction ("a x b")."""

    name: str
    delta: float
    """Mean at the changed level minus mean at the baseline's."""
    p: float
    p_adjusted: float
    """Against the largest of all effects."""


@dataclass(frozen=True, slots=True)
class Screen:
    """A screen's effects, largest first; exploratory by nature."""

    effects: tuple[ScreenEffect, ...]
    pseudo_standard_error: float
    margin: float
    """An effect beyond it stands out by itself (5 %)."""
    simultaneous_margin: float
    """An effect beyond it stands out from all (5 % for the whole screen)."""


def screen(table: Table, reference: Cell) -> Screen | None:
    """Lenth's analysis; None unless all factors have two levels, crossed orthogonally, and there
    are enough effects. Values are means over seeds."""
    varied = [i for i, f in enumerate(table.factors) if len(table.levels(f)) > 1]
    if any(len(table.levels(table.factors[i])) != 2 for i in varied):
        return None
    if np.isnan(table.values).all(axis=1).any() or len(table.cells) < LEAST_EFFECTS + 1:
        return None
    values = np.nanmean(table.values, axis=1)
    signs = np.array(
        [[-1 if cell[i] == reference[i] else 1 for i in varied] for cell in table.cells]
    )
    names = [table.factors[i] for i in varied]
    columns: list[tuple[str, FloatArray]] = []
    for size in (1, 2):
        for group in combinations(range(len(varied)), size):
            column = signs[:, group].prod(axis=1).astype(float)
            is_new = all(abs(column @ other) < 1e-9 for _, other in columns)
            if is_new and abs(column.sum()) < 1e-9:
                columns.append((" x ".join(names[i] for i in group), column))
            elif size == 1:
                return None
    if len(columns) < LEAST_EFFECTS:
        return None
    effects = np.array([2 * column @ values / len(values) for _, column in columns])
    error = pseudo_standard_error(effects)
    if error == 0:
        return None
    single, largest = null_ratios(len(effects))
    found = [
        ScreenEffect(
            name,
            float(effect),
            _exceeding(single, abs(effect) / error),
            _exceeding(largest, abs(effect) / error),
        )
        for (name, _), effect in zip(columns, effects, strict=True)
    ]
    return Screen(
        tuple(sorted(found, key=lambda effect: -abs(effect.delta))),
        error,
        error * float(np.quantile(single, 0.95)),
        error * float(np.quantile(largest, 0.95)),
    )


def pseudo_standard_error(effects: Sequence[float] | FloatArray) -> float:
    """Lenth's PSE of independent effects with equal variance, most of them nil."""
    size = np.abs(np.asarray(effects, dtype=float))
    first = 1.5 * np.median(size)
    kept = size[size < 2.5 * first]
    return float(1.5 * np.median(kept)) if len(kept) else 0.0


@lru_cache(maxsize=32)
def null_ratios(m: int) -> tuple[FloatArray, FloatArray]:
    """Sorted |effect| / PSE of one effect and of the largest of m, when all are noise."""
    size = np.abs(np.random.default_rng(20).standard_normal((DRAWS, m)))
    first = 1.5 * np.median(size, axis=1, keepdims=True)
    kept = np.where(size < 2.5 * first, size, np.nan)
    ratio = size / (1.5 * np.nanmedian(kept, axis=1, keepdims=True))
    return np.sort(ratio.ravel()), np.sort(ratio.max(axis=1))


def _exceeding(null: FloatArray, ratio: float) -> float:
    above = len(null) - int(np.searchsorted(null, ratio))
    return (above + 1) / (len(null) + 1)
