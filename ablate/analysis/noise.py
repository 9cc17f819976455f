"""Every cell's own noise, shrunk to the noise that all cells share.

With three seeds a cell's own variance is hardly known; with one variance for all cells, a baseline
that is three times as noisy as the rest makes a false difference in one study of five. So each
cell's variance is taken from its residuals and drawn towards the mean of all (Smyth 2004,
doi:10.2202/1544-6115.1027, with a prior that is fixed), and a contrast has the variance and the
degrees of freedom (Satterthwaite) of its own cells. A cell that is shown to be noisier than the
rest counts in the mean of none but its own contrasts (fit.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ablate.analysis.layout import Layout
from ablate.analysis.results import FloatArray

PRIOR_DF = 6.0
"""Degrees of freedom that the shared variance counts in a cell's: standard deviations of cells are
taken to differ by a factor of 1.4 or so."""
HUB_DF = 2.0
"""The same for a cell that all others are compared with, whose noise is in every contrast. The pair
of numbers holds the familywise error near .05 where that cell is two or three times as noisy; the
price is power where all are equal (tests/calibration/test_noise.py)."""
_LEAST = 0.05
"""Of the shared variance: an unbiased estimate of a cell's own may come out negative."""
_DRAWS = 999


@dataclass(frozen=True, slots=True)
class CellNoise:
    """Arrays over the cells of a fit."""

    variances: FloatArray
    """Shrunk variance of one run."""
    kept: FloatArray
    """Share of the shared variance in it, 0 to 1."""
    df: FloatArray

    def of_sum(self, share: FloatArray, *, pooled: float, most: float) -> tuple[float, float]:
        """Variance, and degrees of freedom, of a sum over cells.

        `share`: variance of the sum that one unit of each cell's variance makes. `pooled`: the
        shared variance, known with `most` degrees of freedom.
        """
        parts = share * self.variances
        variance = float(parts.sum())
        used = share > 0
        if not variance > 0:
            return variance, most
        lost = float((parts[used] ** 2 / self.df[used]).sum())
        lost += (pooled * float(share @ self.kept)) ** 2 / most
        return variance, min(most, variance**2 / lost)


def shrink(
    residuals: FloatArray,
    layout: Layout,
    *,
    pooled: float,
    hub: int | None = None,
    least: float = 0.0,
) -> CellNoise:
    """Of each cell, from the residuals of its runs; `pooled`: their mean square.

    `hub`: place of the cell that all others are compared with. `least`: no cell's variance is
    taken to be smaller.
    """
    count = len(layout.counts)
    freedom = layout.freedom()
    prior = np.full(count, PRIOR_DF)
    if hub is not None:
        prior[hub] = HUB_DF
    kept = prior / (prior + freedom)
    own = np.full(count, pooled)
    if pooled > 0:
        own = np.maximum(_solve_own(residuals, layout), _LEAST * pooled)
        own *= pooled * freedom.sum() / (own @ freedom)
    own = np.maximum(own, least)
    alone = freedom < 1e-8  # one run: its residual says nothing
    own[alone], kept[alone] = pooled, 1.0
    return CellNoise(kept * pooled + (1 - kept) * own, kept, prior + freedom)


def _solve_own(residuals: FloatArray, layout: Layout) -> FloatArray:
    """Every cell's own variance, unbiased, from squares in which all cells' are mixed."""
    squares = layout.sum_cells(residuals**2)
    solved: FloatArray = np.linalg.pinv(layout.mix(), rcond=1e-9, hermitian=True) @ squares
    return solved


def set_apart(
    place: int, residuals: FloatArray, layout: Layout, others: CellNoise, *, least: float
) -> CellNoise:
    """The noise of the other cells among themselves, and at `place` that of its cell alone."""
    own = max(float(_solve_own(residuals, layout)[place]), least)
    return CellNoise(
        np.insert(others.variances, place, own),
        np.insert(others.kept, place, 0.0),
        np.insert(others.df, place, layout.freedom()[place]),
    )


@lru_cache(maxsize=1024)
def typical_df(cells: int, seeds: int) -> float:
    """Degrees of freedom of one cell against the reference, all cells equally noisy."""
    most = (cells - 1) * (seeds - 1)
    if most < 1:
        return 0.0
    freedom = most / cells
    prior = np.array([HUB_DF, PRIOR_DF])
    noise = CellNoise(np.ones(2), prior / (prior + freedom), prior + freedom)
    return noise.of_sum(np.full(2, 1 / seeds), pooled=1.0, most=most)[1]


def looks_noisier(residuals: FloatArray, layout: Layout) -> tuple[int, float, float] | None:
    """(place, times the others' standard deviation, p) of the noisiest cell; None at p >= .01.

    p by shuffling the residuals over the runs and fitting them again, so that heavy tails do not
    pass for a noisy cell.
    """
    freedom = layout.freedom()
    judged = freedom > 1e-8
    if judged.sum() < 3 or not np.any(residuals):
        return None

    def variances_of(runs: FloatArray) -> FloatArray:
        found: FloatArray = layout.sum_cells(runs**2)[..., judged] / freedom[judged]
        return found

    variances = variances_of(residuals)
    share = variances.max() / variances.sum()
    generator, above = np.random.default_rng(20), 0
    for _ in range(_DRAWS):  # one at a time: thousands of cells at once would take gigabytes
        drawn = variances_of(layout.residuals(generator.permutation(residuals)))
        above += int(drawn.max() >= share * drawn.sum())
    p = (1 + above) / (1 + _DRAWS)
    if p >= 0.01:
        return None
    worst = int(np.argmax(variances))
    others = float(np.delete(variances, worst).mean())
    ratio = float(np.sqrt(variances[worst] / others)) if others > 0 else np.inf
    return int(np.flatnonzero(judged)[worst]), ratio, p
