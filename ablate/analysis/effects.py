"""Contrasts between cells and their intervals: value = cell + seed block + noise.

The residuals of all cells (two-way layout) are the main lever: with 9 cells and 3 seeds an interval
is much narrower than from each contrast's own 3 differences. Each cell has a variance of its own,
drawn towards the shared one (see noise.py); a cell in which a run diverged stays out of the fit and
its contrasts fall back to a paired t interval.

A contrast is a weight vector over the rows of `Table.cells` that sums to 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product

import numpy as np
import numpy.typing as npt
import scipy

from ablate.analysis.fit import Fit, rounding, step_of
from ablate.analysis.results import Cell, FloatArray, Table
from ablate.errors import AnalysisError

BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class Comparison:
    """One factor's level against its reference level: which cells, with which weights."""

    factor: str
    level: str
    reference: str
    estimand: str
    """simple: one cell against the baseline cell. main: averaged over all combinations of the
    other factors. additive: from a model without interactions (fractions, sweeps). shared: level
    and reference stand on the same runs. missing: no runs to compare, or none that
    separate the factor from the others."""
    weights: FloatArray
    level_rows: tuple[int, ...] = ()
    reference_rows: tuple[int, ...] = ()
    pairs: tuple[tuple[int, int], ...] = ()
    """(level row, reference row) of every setting of the other factors, where cells match."""
    without: tuple[str, ...] = ()
    """Exploding levels of other factors ("lr=0.1") whose cells take no part."""
    empty: int = 0
    """Settings of the other factors that are left out: no run of one of the two cells completed."""


# ---- which cells make a contrast -------------------------------------------------------------


def is_crossed(table: Table) -> bool:
    """Every combination of the levels was run (two factors or more)."""
    varied, number = 0, 1
    for factor in table.factors:
        varied += len(table.levels(factor)) > 1
        number *= len(table.levels(factor))
        if number > len(table.shared):  # at once, where there are thousands of factors
            return False
    return varied >= 2 and len(table.shared) == number


ESTIMANDS = ("auto", "simple", "additive")


def compare(
    table: Table, reference: Cell, factor: str, level: str, *, estimand: str = "auto"
) -> Comparison:
    """The contrast of `level` against the reference cell's level of `factor`.

    auto: a complete crossing gives the main effect; otherwise the cell that differs from the
    reference in this factor alone; otherwise the additive model's estimate where it is unique.
    simple and additive ask for that one only.
    """
    if estimand not in ESTIMANDS:
        raise AnalysisError(f"estimand {estimand!r}: use one of {', '.join(ESTIMANDS)}")
    column = table.factors.index(factor)
    base = reference[column]
    zero = np.zeros(len(table.cells))
    if estimand == "auto" and is_crossed(table):
        ups = [cell for cell in table.shared if cell[column] == level]
        downs = [cell[:column] + (base,) + cell[column + 1 :] for cell in ups]
        return _matched(table, factor, level, base, "main", ups, downs)
    changed = reference[:column] + (level,) + reference[column + 1 :]
    if estimand != "additive" and changed in table.shared and reference in table.shared:
        return _matched(table, factor, level, base, "simple", [changed], [reference])
    home = _home_level(table, column, level)
    rows = {
        name: tuple(i for i, cell in enumerate(table.cells) if cell[column] == name)
        for name in (home, base)
    }
    if home == base and estimand != "simple":
        return Comparison(factor, level, base, "shared", zero, rows[base], rows[base])
    weights = None if estimand == "simple" else _additive_weights(table, column, home, base)
    if estimand == "simple":
        return Comparison(factor, level, base, "missing", zero)
    if weights is None or not np.any(weights):  # what diverged in them still tells something
        return Comparison(factor, level, base, "missing", zero, rows[home], rows[base])
    return Comparison(factor, level, base, "additive", weights, rows[home], rows[base])


def _home_level(table: Table, column: int, level: str) -> str:
    """The level whose runs stand for all cells of `level`; itself when it has its own."""
    homes = {
        (home[column], home[:column] + home[column + 1 :] == cell[:column] + cell[column + 1 :])
        for cell, home in table.shared.items()
        if cell[column] == level
    }
    if len(homes) == 1:
        name, only_this_factor = homes.pop()
        return name if only_this_factor else level
    return level


def _matched(
    table: Table,
    factor: str,
    level: str,
    base: str,
    estimand: str,
    ups: list[Cell],
    downs: list[Cell],
) -> Comparison:
    weights = np.zeros(len(table.cells))
    pairs = [(table.index(up), table.index(down)) for up, down in zip(ups, downs, strict=True)]
    matched = [(up, down) for up, down in pairs if up is not None and down is not None]
    if len(matched) < len(pairs):
        return Comparison(factor, level, base, "missing", weights)
    # A cell without any completed run takes its partner with it: the average is over the rest.
    seen = [pair for pair in matched if not any(np.isnan(table.values[row]).all() for row in pair)]
    used = seen or matched
    for up, down in used:
        weights[up] += 1 / len(used)
        weights[down] -= 1 / len(used)
    return Comparison(
        factor,
        level,
        base,
        estimand if np.any(weights) else "shared",
        weights,
        tuple(dict.fromkeys(up for up, _ in matched)),
        tuple(dict.fromkeys(down for _, down in matched)),
        tuple(used),
        empty=len(matched) - len(used),
    )


def _additive_weights(table: Table, column: int, level: str, base: str) -> FloatArray | None:
    """Weights over cells of the contrast in a model of main effects; None when not estimable."""
    return CellModel(table, order=1).weights({((column, level),): 1, ((column, base),): -1})


Term = tuple[tuple[int, str], ...]
"""A column of a model: ((factor's place, level), ...); two entries for a pair of factors."""


class CellModel:
    """A linear model of cell means with main effects, and pairs of factors at `order` 2.

    Cells in which a run diverged, or none completed, are left out: they have no fair mean.
    """

    def __init__(self, table: Table, *, order: int) -> None:
        self._num_cells = len(table.cells)
        self._rows = [
            row
            for row in range(self._num_cells)
            if not np.isnan(table.values[row]).all() and not table.count(row, "diverged")
        ]
        single = [(i, name) for i, f in enumerate(table.factors) for name in table.levels(f)]
        self._terms: list[Term] = [(), *((entry,) for entry in single)]
        if order == 2:
            self._terms += [(a, b) for a, b in combinations(single, 2) if a[0] != b[0]]
        cells = [table.cells[row] for row in self._rows]
        design = np.array(
            [[all(cell[i] == name for i, name in term) for term in self._terms] for cell in cells],
            dtype=float,
        ).reshape(len(cells), len(self._terms))
        self._inverse = np.linalg.pinv(design)
        self._estimable = self._inverse @ design

    def weights(self, wanted: Mapping[Term, float]) -> FloatArray | None:
        """Weights over all cells that estimate this combination of terms; None: not estimable."""
        if not set(wanted) <= set(self._terms):
            return None
        vector = np.zeros(len(self._terms))
        for term, factor in wanted.items():
            vector[self._terms.index(term)] = factor
        if not np.allclose(vector @ self._estimable, vector, atol=1e-8):
            return None
        weights = np.zeros(self._num_cells)
        weights[self._rows] = vector @ self._inverse
        weights[np.abs(weights) < 1e-12] = 0.0
        return weights


def cross_by_model(
    model: CellModel, one: tuple[int, str, str], two: tuple[int, str, str]
) -> FloatArray | None:
    """The interaction of two factors (place, level, reference level) in a model of order 2."""
    (i, level_f, base_f), (j, level_g, base_g) = one, two
    signs = {(level_f, level_g): 1, (level_f, base_g): -1, (base_f, level_g): -1}
    signs[base_f, base_g] = 1
    return model.weights({((i, f), (j, g)): sign for (f, g), sign in signs.items()})


def _main_effects(table: Table, cells: Sequence[Cell]) -> tuple[list[tuple[int, str]], FloatArray]:
    """(factor's place, level) of each column but the first, and the design: mean, then levels."""
    columns = [(i, name) for i, f in enumerate(table.factors) for name in table.levels(f)]
    design = np.ones((len(cells), 1 + len(columns)))
    for j, (i, name) in enumerate(columns):
        design[:, 1 + j] = [cell[i] == name for cell in cells]
    return columns, design


def lack_of_fit_p(table: Table, fitted: Fit) -> float | None:
    """F test of "no interactions" over the pooled cells; None when there is nothing to test."""
    if fitted.df < 1 or not fitted.mse > 0:
        return None
    _, design = _main_effects(table, [table.cells[row] for row in fitted.rows])
    left = np.eye(len(design)) - design @ np.linalg.pinv(design)
    df = int(round(float(np.trace(left))))
    if df < 1:
        return None
    off = left @ fitted.effects
    inverse = np.linalg.pinv(left @ fitted.layout.spread @ left.T, rcond=1e-9)
    return float(scipy.stats.f.sf(float(off @ inverse @ off) / df / fitted.mse, df, fitted.df))


def cross(
    table: Table, reference: Cell, first: tuple[str, str], second: tuple[str, str]
) -> FloatArray | None:
    """Weights of the two-level interaction (difference of differences), or None: not estimable.

    Averaged over every setting of the other factors in which all four cells have a completed run.
    """
    (f, level_f), (g, level_g) = first, second
    i, j = table.factors.index(f), table.factors.index(g)
    weights = np.zeros(len(table.cells))
    corners = 0
    for cell in table.shared:
        if cell[i] != level_f or cell[j] != level_g:
            continue
        rows: list[tuple[int, int]] = []
        for up, across in product((True, False), repeat=2):
            corner = list(cell)
            corner[i] = level_f if up else reference[i]
            corner[j] = level_g if across else reference[j]
            row = table.index(tuple(corner))
            if row is None or np.isnan(table.values[row]).all():
                break
            rows.append((row, 1 if up == across else -1))
        if len(rows) == 4:
            corners += 1
            for row, sign in rows:
                weights[row] += sign
    if corners == 0 or not np.any(weights):
        return None
    return weights / corners


# ---- one contrast's interval -----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Estimate:
    """A contrast's estimate; `standard_error` and `df` are NaN and 0 without replicates."""

    delta: float
    standard_error: float
    df: float
    n: int
    """Seeds in which every cell of the contrast completed."""
    information: float
    """Paired differences that would give this estimate the same variance."""
    method: str
    why_not_pooled: str
    differences: FloatArray
    """The contrast within each complete seed; empty where seeds do not pair."""
    step: float = 0.0
    """The step of a metric whose differences are equal but for it: the noise is that of rounding
    to it. 0 where the differences show their own noise."""


def block_differences(
    values: FloatArray, weights: FloatArray, pairs: tuple[tuple[int, int], ...] = ()
) -> FloatArray:
    """The contrast within each seed: over the pairs that completed, or where all cells did."""
    if pairs:
        each = np.array([values[up] - values[down] for up, down in pairs])
        seen = ~np.isnan(each)
        some = seen.any(axis=0)
        sums = np.where(seen, each, 0.0).sum(axis=0)[some]
        by_seed: FloatArray = sums / seen.sum(axis=0)[some]
        return by_seed
    used = np.flatnonzero(weights)
    part = values[used]
    complete = ~np.isnan(part).any(axis=0)
    differences: FloatArray = weights[used] @ part[:, complete]
    return differences


def estimate(
    values: FloatArray,
    weights: FloatArray,
    pooled: Fit,
    *,
    pairs: tuple[tuple[int, int], ...] = (),
    why_not: str = "",
) -> Estimate | None:
    """Pooled if the pool covers the contrast and tells more than its own differences; by Welch's
    test where hardly a seed is common to its cells; or None."""
    differences = block_differences(values, weights, pairs)
    n = len(differences)
    step = step_of(values)
    if pooled.usable(weights) and pooled.df >= max(1, n - 1):
        variance, df = pooled.variance(weights)
        # With two cells the pooled layout is the paired t test; say so.
        method = "paired t" if len(pooled.rows) == 2 else "two-way, cells' own noise"
        equal = n > 1 and float(differences.std()) <= step / 1000
        return Estimate(
            delta=_snapped(pooled.estimate(weights), values),
            standard_error=math.sqrt(variance),
            df=df,
            n=n,
            information=2 / pooled.spread(weights, weights),
            method=method,
            why_not_pooled="",
            differences=differences,
            step=step if equal and pooled.mse <= step**2 / 12 else 0.0,
        )
    if n < 2 and (found := _unpaired(values, weights, max(pooled.least, step**2 / 12))):
        return found
    if n == 0:
        return _one_run_a_side(values, weights)
    delta = _snapped(float(differences.mean()), values)
    if n == 1:
        return Estimate(delta, math.nan, 0, 1, 1.0, "one seed", why_not, differences)
    sd = float(differences.std(ddof=1))
    least = max(pooled.least, step**2 / 12)
    se = max(sd, math.sqrt(least * float(weights @ weights))) / math.sqrt(n)
    information = n * 2 / float(weights @ weights)
    coarse = step if sd <= step / 1000 else 0.0
    return Estimate(delta, se, n - 1, n, information, "paired t", why_not, differences, coarse)


UNPAIRED = "Welch's t, seeds do not pair"
LONE = "t, a single run against the spread of several"


def _unpaired(values: FloatArray, weights: FloatArray, least: float) -> Estimate | None:
    """The contrast of cells that have different seeds; None where all have one run only.

    Each cell has a noise of its own (Welch 1947, degrees of freedom by Satterthwaite); one with a
    single run is taken to have that of the others: a new run's prediction interval.
    """
    used = np.flatnonzero(weights)
    runs = [values[row][~np.isnan(values[row])] for row in used]
    counts = np.array([len(part) for part in runs])
    several = counts > 1
    if not several.any() or counts.min() < 1:
        return None
    w = weights[used]
    delta = float(w @ np.array([part.mean() for part in runs]))
    n = int(counts.min())
    own = np.array([max(float(part.var(ddof=1)), least) if len(part) > 1 else 0 for part in runs])
    shared = float(own[several] @ (counts[several] - 1)) / float((counts[several] - 1).sum())
    # What each cell's noise counts with: that of the lone ones falls to those with several runs.
    lone = float((w[~several] ** 2).sum()) * (counts - 1) / (counts[several] - 1).sum()
    parts = own * (w**2 / counts * several + lone)
    variance = float(w**2 / counts @ np.where(several, own, shared))
    if variance <= 0:
        return None
    df = int(variance**2 / float((parts[several] ** 2 / (counts[several] - 1)).sum()) + 1e-9)
    return Estimate(
        delta=_snapped(delta, values),
        standard_error=math.sqrt(variance),
        df=max(df, 1),
        n=n,
        information=n * 2 / float(weights @ weights),
        method=UNPAIRED if several.all() else LONE,
        why_not_pooled="its seeds are not the reference's",
        differences=np.zeros(0),
    )


def _one_run_a_side(values: FloatArray, weights: FloatArray) -> Estimate | None:
    """A difference that nothing is known about; None where a cell has no completed run."""
    means = np.array([np.nanmean(values[row]) if np.isfinite(values[row]).any() else np.nan
                      for row in np.flatnonzero(weights)])  # fmt: skip
    if np.isnan(means).any():
        return None
    delta = _snapped(float(weights[weights != 0] @ means), values)
    why = "there is no second run of any"
    return Estimate(delta, math.nan, 0, 1, 1.0, "one run a side", why, np.zeros(0))


def _snapped(delta: float, values: FloatArray) -> float:
    """0 for a difference that is arithmetic alone."""
    return 0.0 if abs(delta) <= rounding(values[~np.isnan(values)]) else delta


def two_sided_p(t: float, df: float) -> float:
    return float(2 * scipy.special.stdtr(df, -abs(t)))
