"""The fit over cells and seeds, value = cell + seed block + noise, and the noise of a contrast."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ablate.analysis.layout import Layout, layout_of
from ablate.analysis.noise import CellNoise, looks_noisier, set_apart, shrink
from ablate.analysis.results import FloatArray, Table

BoolArray = npt.NDArray[np.bool_]


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
    least: float
    """Variance of one run that its metric's resolution makes by itself."""
    noise: CellNoise
    """Every cell's variance, as far as it may be believed to have one of its own."""
    noisiest: tuple[int, float, float] | None
    """(row, times the others' standard deviation, p) of a cell shown to be noisier than others."""
    rest: Fit | None
    """Where each cell is compared with the hub alone, the fit without that cell: its noise is no
    measure of the others', nor theirs of its own."""

    @property
    def typical(self) -> Fit:
        """The fit over the cells whose noise may be taken together."""
        return self.rest.typical if self.rest is not None else self

    def usable(self, weights: FloatArray) -> bool:
        """Every cell of the contrast is in the pool, and its estimate is unique."""
        if self.df < 1 or not set(np.flatnonzero(weights)) <= set(self.rows):
            return False
        return self.layout.is_estimable(weights[list(self.rows)])

    def estimate(self, weights: FloatArray) -> float:
        return float(weights[list(self.rows)] @ self.effects)

    def spread(self, one: FloatArray, two: FloatArray) -> float:
        """Covariance of two contrasts in units of the residual variance."""
        one, two = one[list(self.rows)], two[list(self.rows)]
        left, right = np.flatnonzero(one), np.flatnonzero(two)
        return float(one[left] @ self.layout.spread[np.ix_(left, right)] @ two[right])

    def covariance(self, contrasts: FloatArray) -> FloatArray:
        """The same of all pairs of contrasts [contrast, cell]."""
        within = contrasts[:, list(self.rows)]
        found: FloatArray = within @ self.layout.spread @ within.T
        return found

    def variance(self, weights: FloatArray) -> tuple[float, float]:
        """Variance of a contrast's estimate by its cells' own noise, and degrees of freedom."""
        of_run = self.layout.run_weights(weights[list(self.rows)]) ** 2
        share = self.layout.sum_cells(of_run)
        shared = self.typical
        return self.noise.of_sum(share, pooled=shared.mse, most=shared.df)


def fit(
    values: FloatArray,
    rows: tuple[int, ...],
    *,
    hub: int | None = None,
    least: float = 0.0,
    looks: bool = False,
) -> Fit:
    """Least squares of cell + seed over the given rows of [cell, seed] values; NaN = missing.

    `hub`: the row against which every other one is compared, where there is one. `least`: no
    variance is taken to be smaller. `looks` for a cell that is noisier than the rest, by a thousand
    permutations.
    """
    y = values[list(rows)]
    present: BoolArray = ~np.isnan(y)
    seeds = tuple(int(j) for j in np.flatnonzero(present.any(axis=0)))
    y, present = y[:, list(seeds)], present[:, list(seeds)]
    layout = layout_of(present.tobytes(), present.shape)
    flat = y[present]
    residuals = layout.residuals(flat)
    mse = float(residuals @ residuals) / layout.df if layout.df else math.nan
    least = max(least, step_of(flat) ** 2 / 12)
    if layout.df:
        mse = max(mse, least)
    noise = shrink(
        residuals, layout, pooled=mse, least=least,
        hub=rows.index(hub) if hub in rows else None,
    )  # fmt: skip
    noisiest, rest = None, None
    if (
        looks and layout.df and float(residuals @ residuals) > 1e-6 * mse
    ):  # not equal but for rounding
        noisiest = looks_noisier(residuals, layout)
    if noisiest is not None:
        place = noisiest[0]
        noisiest = (rows[place], *noisiest[1:])
        if hub in rows and rows[place] != hub:
            others = (*rows[:place], *rows[place + 1 :])
            rest = fit(values, others, hub=hub, least=least, looks=True)
            noise = set_apart(place, residuals, layout, rest.noise, least=least)
    return Fit(
        rows, seeds, layout, layout.solve(flat)[0], residuals, mse, layout.df, least, noise,
        noisiest, rest,
    )  # fmt: skip


def rounding(values: FloatArray) -> float:
    """Below this a spread is arithmetic, not noise."""
    return 1e-12 * float(np.abs(values).max(initial=0.0))


def step_of(values: FloatArray) -> float:
    """The step in which a metric is seen to move: the least distance of two different values.

    Values that a coarse metric rounds to its steps have a noise of at least step / sqrt(12) (that
    of rounding), however equal they look: equal differences in a few seeds are no certainty.
    0 where all values are the same.
    """
    gaps = np.diff(np.unique(values[~np.isnan(values)]))
    gaps = gaps[gaps > max(1e-9 * float(np.abs(values[~np.isnan(values)]).max(initial=0.0)), 0.0)]
    return float(gaps.min()) if len(gaps) else 0.0


def pool(
    table: Table,
    *,
    keep: int | None = None,
    is_hub: bool = False,
    least: float = 0.0,
    looks: bool = False,
) -> Fit:
    """The fit over the cells without diverged runs.

    Survivors of a level that diverges are no fair sample of its noise, so its cell stays out. Row
    `keep`, the baseline, stays in even so: without it one lost run would cost every contrast the
    shared fit. `is_hub`: every other cell is compared with that one. `least`, `looks`: as in
    :func:`fit`.
    """
    has_value = np.asarray((~np.isnan(table.values)).any(axis=1))
    rows = tuple(
        row
        for row in range(len(table.cells))
        if has_value[row] and (row == keep or not table.count(row, "diverged"))
    )
    return fit(table.values, rows, hub=keep if is_hub else None, least=least, looks=looks)
