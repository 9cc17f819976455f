"""Contrasts between cells and their intervals: value = cell + seed block + noise.

The one residual variance of all cells (pooled two-way layout) is the main lever: with 9 cells and
3 seeds an interval is half as wide as from each contrast's own 3 differences. It is used as long
as the cells look equally noisy; a cell that does not, or in which a run diverged, leaves the pool
and its contrasts fall back to a paired t interval.

A contrast is a weight vector over the rows of `Table.cells` that sums to 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, product

import numpy as np
import numpy.typing as npt
from scipy import special, stats

from ablate.analysis.results import Cell, FloatArray, Table
from ablate.errors import AnalysisError

BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.intp]

GUARD_LEVEL = 0.05
"""Equal noise is taken for unequal in 5 % of studies, which widens one interval. With 3 seeds no
level helps much: a cell twice as noisy is found in 1 study of 7, three times in 2 of 5."""
GUARD_DRAWS = 2000


@dataclass(frozen=True, slots=True)
class Comparison:
    """One factor's level against its reference level: which cells, with which weights."""

    factor: str
    level: str
    reference: str
    estimand: str
    """simple: one cell against the baseline cell. main: averaged over all combinations of the
    other factors. additive: from a model without interactions (fractions, sweeps). shared: level
    and reference stand on the same runs. missing: no runs to compare."""
    weights: FloatArray
    level_rows: tuple[int, ...] = ()
    reference_rows: tuple[int, ...] = ()
    pairs: tuple[tuple[int, int], ...] = ()
    """(level row, reference row) of every setting of the other factors, where cells match."""


@dataclass(frozen=True, slots=True)
class Layout:
    """What depends only on which (cell, seed) were run; arrays over runs in row-major order."""

    solve: FloatArray
    """[cell, run]: least-squares cell effects = solve @ y."""
    spread: FloatArray
    """[cell, cell]: Var(w @ effects) = sigma^2 * w @ spread @ w."""
    project: FloatArray
    """[cell + seed columns]^2: w is estimable when it equals w @ project."""
    residual: FloatArray
    """[run, run]: residuals = residual @ y."""
    df: int


@dataclass(frozen=True, slots=True)
class Fit:
    """The pooled fit over the cells in `rows`."""

    rows: tuple[int, ...]
    seeds: tuple[int, ...]
    layout: Layout
    effects: FloatArray
    residuals: FloatArray
    mse: float
    df: int

    def usable(self, weights: FloatArray) -> bool:
        """Every cell of the contrast is in the pool, and its estimate is unique."""
        if self.df < 1 or not set(np.flatnonzero(weights)) <= set(self.rows):
            return False
        padded = np.concatenate([weights[list(self.rows)], np.zeros(len(self.seeds))])
        return bool(np.allclose(padded @ self.layout.project, padded, atol=1e-8))

    def estimate(self, weights: FloatArray) -> float:
        return float(weights[list(self.rows)] @ self.effects)

    def spread(self, one: FloatArray, two: FloatArray) -> float:
        """Covariance of two contrasts in units of the residual variance."""
        rows = list(self.rows)
        return float(one[rows] @ self.layout.spread @ two[rows])


def fit(values: FloatArray, rows: tuple[int, ...]) -> Fit:
    """Least squares of cell + seed over the given rows of [cell, seed] values; NaN = missing."""
    y = values[list(rows)]
    present: BoolArray = ~np.isnan(y)
    seeds = tuple(int(j) for j in np.flatnonzero(present.any(axis=0)))
    y, present = y[:, list(seeds)], present[:, list(seeds)]
    layout = _layout(present.tobytes(), present.shape)
    flat = y[present]
    residuals = layout.residual @ flat
    mse = float(residuals @ residuals) / layout.df if layout.df else math.nan
    if mse <= _rounding(flat) ** 2:
        mse = 0.0
    return Fit(rows, seeds, layout, layout.solve @ flat, residuals, mse, layout.df)


def _rounding(values: FloatArray) -> float:
    """Below this a spread is arithmetic, not noise."""
    return 1e-12 * float(np.abs(values).max(initial=0.0))


@lru_cache(maxsize=256)
def _layout(mask: bytes, shape: tuple[int, int]) -> Layout:
    present = np.frombuffer(mask, dtype=bool).reshape(shape)
    at_cell, at_seed = np.nonzero(present)
    num_cells, num_seeds = shape
    design = np.zeros((len(at_cell), num_cells + num_seeds))
    design[np.arange(len(at_cell)), at_cell] = 1
    design[np.arange(len(at_cell)), num_cells + at_seed] = 1
    inverse = np.asarray(np.linalg.pinv(design), dtype=np.float64)
    solve = inverse[:num_cells]
    rank = int(np.linalg.matrix_rank(design))
    return Layout(
        solve=solve,
        spread=solve @ solve.T,
        project=inverse @ design,
        residual=np.eye(len(at_cell)) - design @ inverse,
        df=len(at_cell) - rank,
    )


# ---- which cells may share one variance ------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Guard:
    """A cell that left the pooled variance, and the evidence."""

    row: int
    brown_forsythe_p: float
    share: float
    """The cell's part of the sum of all cells' residual variances."""
    share_p: float


def pool(table: Table, *, keep: int | None = None) -> tuple[Fit, tuple[Guard, ...]]:
    """The pooled fit over the cells without diverged runs whose noise looks alike.

    Survivors of a level that diverges may be noisier than others, so its cell stays out. Row
    `keep`, the baseline, stays in even so: without it one lost run would cost every contrast the
    shared variance.
    """
    has_value = np.asarray((~np.isnan(table.values)).any(axis=1))
    rows = [
        row
        for row in range(len(table.cells))
        if has_value[row] and (row == keep or not table.count(row, "diverged"))
    ]
    guards: list[Guard] = []
    while True:
        fitted = fit(table.values, tuple(rows))
        guard = unequal_variance(table.values, fitted)
        if guard is None:
            return fitted, tuple(guards)
        guards.append(guard)
        rows.remove(guard.row)


def unequal_variance(values: FloatArray, fitted: Fit) -> Guard | None:
    """The noisiest cell, if a test at GUARD_LEVEL says that the cells are not equally noisy.

    Brown-Forsythe and Cochran's C (the largest variance's share of the sum), both with their null
    distribution simulated for this very layout: textbook distributions are wrong for residuals of
    few seeds. A fixed limit on the largest over the smallest variance would not do: 9 is exceeded
    by almost every study of 9 cells and 3 seeds with equal noise. A cell that is less noisy than
    the others makes intervals wider than needed, never too narrow, so it may stay.
    """
    if fitted.df < 4 or len(fitted.rows) < 3:
        return None
    if fitted.mse == 0:
        return None
    present: BoolArray = ~np.isnan(values[np.ix_(fitted.rows, fitted.seeds)])
    cell_of_run = np.nonzero(present)[0]
    freedom = _freedom(cell_of_run, fitted.layout.residual)
    judged = freedom > 1e-8  # a cell with one run has no residual
    if judged.sum() < 3:
        return None
    null_forsythe, null_share = _guard_null(present.tobytes(), present.shape)
    forsythe, variances = _guard_statistics(fitted.residuals[None], cell_of_run, freedom, judged)
    share = float(variances[0].max() / variances[0].sum())
    forsythe_p = float((1 + (null_forsythe >= forsythe[0]).sum()) / (1 + len(null_forsythe)))
    share_p = float((1 + (null_share >= share).sum()) / (1 + len(null_share)))
    if min(forsythe_p, share_p) >= GUARD_LEVEL / 2:
        return None
    worst = int(np.flatnonzero(judged)[np.argmax(variances[0])])
    return Guard(fitted.rows[worst], forsythe_p, share, share_p)


@lru_cache(maxsize=128)
def _guard_null(mask: bytes, shape: tuple[int, int]) -> tuple[FloatArray, FloatArray]:
    """Both statistics for GUARD_DRAWS studies of this layout with equal normal noise."""
    present = np.frombuffer(mask, dtype=bool).reshape(shape)
    residual = _layout(mask, shape).residual
    cell_of_run = np.nonzero(present)[0]
    freedom = _freedom(cell_of_run, residual)
    judged = freedom > 1e-8
    noise = np.random.default_rng(20).standard_normal((GUARD_DRAWS, len(residual))) @ residual
    forsythe, variances = _guard_statistics(noise, cell_of_run, freedom, judged)
    return forsythe, variances.max(axis=1) / variances.sum(axis=1)


def _freedom(cell_of_run: IntArray, residual: FloatArray) -> FloatArray:
    """Degrees of freedom of each cell's residuals."""
    freedom = np.zeros(int(cell_of_run.max()) + 1)
    np.add.at(freedom, cell_of_run, np.diag(residual))
    return freedom


def _guard_statistics(
    residuals: FloatArray,
    cell_of_run: IntArray,
    freedom: FloatArray,
    judged: BoolArray,
) -> tuple[FloatArray, FloatArray]:
    """Brown-Forsythe statistic [draw] and residual variances [draw, judged cell]."""
    cells = np.flatnonzero(judged)
    variances = np.empty((len(residuals), len(cells)))
    between, within, total = np.zeros(len(residuals)), np.zeros(len(residuals)), 0
    means, sizes = [], []
    for i, cell in enumerate(cells):
        part = residuals[:, cell_of_run == cell]
        variances[:, i] = (part**2).sum(axis=1) / freedom[cell]
        distance = np.abs(part - np.median(part, axis=1, keepdims=True))
        means.append(distance.mean(axis=1))
        sizes.append(part.shape[1])
        within += ((distance - means[-1][:, None]) ** 2).sum(axis=1)
        total += part.shape[1]
    grand = sum(n * m for n, m in zip(sizes, means, strict=True)) / total
    for n, mean in zip(sizes, means, strict=True):
        between += n * (mean - grand) ** 2
    # Two seeds lie equally far from their median: nothing varies within, nothing can be said.
    some = within > 1e-9 * (between + within)
    statistic = np.zeros(len(residuals))
    np.divide(between, within, out=statistic, where=some)
    statistic *= (total - len(cells)) / (len(cells) - 1)
    return statistic, variances


# ---- which cells make a contrast -------------------------------------------------------------


def is_crossed(table: Table) -> bool:
    """Every combination of the levels was run (two factors or more)."""
    sizes = [len(table.levels(factor)) for factor in table.factors]
    varied = [size for size in sizes if size > 1]
    return len(varied) >= 2 and len(table.shared) == math.prod(sizes)


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
    if weights is None or not np.any(weights):
        return Comparison(factor, level, base, "missing", zero)
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
    for up, down in pairs:
        if up is None or down is None:
            return Comparison(factor, level, base, "missing", np.zeros(len(table.cells)))
        weights[up] += 1 / len(pairs)
        weights[down] -= 1 / len(pairs)
    matched = tuple((up, down) for up, down in pairs if up is not None and down is not None)
    return Comparison(
        factor,
        level,
        base,
        estimand if np.any(weights) else "shared",
        weights,
        tuple(dict.fromkeys(up for up, _ in matched)),
        tuple(dict.fromkeys(down for _, down in matched)),
        matched,
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
    return float(stats.f.sf(float(off @ inverse @ off) / df / fitted.mse, df, fitted.df))


def cross(
    table: Table, reference: Cell, first: tuple[str, str], second: tuple[str, str]
) -> FloatArray | None:
    """Weights of the two-level interaction (difference of differences), or None: not estimable.

    Averaged over every setting of the other factors in which all four cells were run.
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
            if row is None:
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
    df: int
    n: int
    """Seeds in which every cell of the contrast completed."""
    information: float
    """Paired differences that would give this estimate the same variance."""
    method: str
    why_not_pooled: str
    differences: FloatArray
    """The contrast within each complete seed."""


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
    """Pooled if the pool covers the contrast and tells more than its own differences; or None."""
    differences = block_differences(values, weights, pairs)
    n = len(differences)
    if pooled.usable(weights) and pooled.df >= max(1, n - 1):
        variance = pooled.spread(weights, weights)
        # With two cells the pooled layout is the paired t test; say so.
        method = "paired t" if len(pooled.rows) == 2 else "pooled two-way ANOVA"
        return Estimate(
            delta=pooled.estimate(weights),
            standard_error=math.sqrt(pooled.mse * variance),
            df=pooled.df,
            n=n,
            information=2 / variance,
            method=method,
            why_not_pooled="",
            differences=differences,
        )
    if n == 0:
        return None
    delta = float(differences.mean())
    if n == 1:
        return Estimate(delta, math.nan, 0, 1, 1.0, "one seed", why_not, differences)
    sd = float(differences.std(ddof=1))
    if sd <= _rounding(values[~np.isnan(values)]):
        sd = 0.0
    se = sd / math.sqrt(n)
    information = n * 2 / float(weights @ weights)
    return Estimate(delta, se, n - 1, n, information, "paired t", why_not, differences)


def two_sided_p(t: float, df: int) -> float:
    return float(2 * special.stdtr(df, -abs(t)))
