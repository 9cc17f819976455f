"""What a fit of cell + seed needs to know of which runs there are, solved by way of the seeds."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from ablate.analysis.results import FloatArray

IntArray = npt.NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class Layout:
    """What depends only on which (cell, seed) were run; runs are in row-major order.

    The normal equations of cell + seed are solved by way of the seeds, which are few (the Schur
    complement), so that thousands of cells take memory in proportion.
    """

    at_cell: IntArray
    """[run]"""
    at_seed: IntArray
    """[run]"""
    counts: FloatArray
    """[cell]: its runs."""
    share: FloatArray
    """[cell, seed]: 1 / counts where the run is there."""
    inverse: FloatArray
    """[seed, seed]: pseudoinverse of the Schur complement."""
    range: FloatArray
    """[seed, seed]: projection onto what the cells leave of the seeds."""
    spread: FloatArray
    """[cell, cell]: Var(w @ effects) = sigma^2 * w @ spread @ w."""
    df: int

    def solve(self, y: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Least-squares effects of cells [..., cell] and seeds [..., seed] of runs [..., run]."""
        means = self.sum_cells(y) / self.counts
        left = _sum(y - means[..., self.at_cell], self.at_seed, self.share.shape[1])
        seeds = left @ self.inverse
        return means - seeds @ self.share.T, seeds

    def residuals(self, y: FloatArray) -> FloatArray:
        """[..., run] of runs [..., run]."""
        cells, seeds = self.solve(y)
        rest: FloatArray = y - cells[..., self.at_cell] - seeds[..., self.at_seed]
        return rest

    def freedom(self) -> FloatArray:
        """[cell]: degrees of freedom of its residuals."""
        freedom: FloatArray = self.counts - 1 - np.einsum("cst,st->c", self._apart(), self.inverse)
        return freedom

    def mix(self) -> FloatArray:
        """[cell, cell]: E[sum of squares of cell i's residuals] = sum over k of mix[i, k] x
        variance of k."""
        apart = self._apart()
        turned = self.inverse @ apart @ self.inverse
        count = len(self.counts)
        found = turned.reshape(count, -1) @ apart.reshape(count, -1).T
        own = np.einsum("cst,st->c", apart, self.inverse)
        found[np.arange(count), np.arange(count)] += self.counts - 1 - 2 * own
        mixed: FloatArray = found
        return mixed

    def run_weights(self, weights: FloatArray) -> FloatArray:
        """[run]: how a contrast of cell effects is made of the runs."""
        asked = weights @ self.share @ self.inverse
        made = (weights / self.counts)[self.at_cell] - asked[self.at_seed]
        made += (self.share @ asked)[self.at_cell]
        return made

    def sum_cells(self, y: FloatArray) -> FloatArray:
        """[..., cell]: sums of runs [..., run]."""
        return _sum(y, self.at_cell, len(self.counts))

    def _apart(self) -> FloatArray:
        """[cell, seed, seed]: the second moment of where the cell's runs stand among the seeds."""
        runs = self.share * self.counts[:, None]
        apart = np.zeros((*self.share.shape, self.share.shape[1]))
        diagonal = np.arange(self.share.shape[1])
        apart[:, diagonal, diagonal] = runs
        second: FloatArray = apart - runs[:, :, None] * self.share[:, None, :]
        return second

    def is_estimable(self, weights: FloatArray) -> bool:
        """Whether weights over the cells have a unique estimate."""
        asked = weights @ self.share
        return bool(np.allclose(asked @ self.range, asked, atol=1e-8))


def _sum(y: FloatArray, place: IntArray, number: int) -> FloatArray:
    if not y.shape[-1]:
        return np.zeros((*y.shape[:-1], number))
    flat = y.reshape(-1, y.shape[-1])
    sums = np.array([np.bincount(place, row, minlength=number) for row in flat])
    return sums.reshape(*y.shape[:-1], number)


@lru_cache(maxsize=256)
def layout_of(mask: bytes, shape: tuple[int, int]) -> Layout:
    """Of the [cell, seed] mask of the runs that are there, as bytes."""
    present = np.frombuffer(mask, dtype=bool).reshape(shape)
    at_cell, at_seed = np.nonzero(present)
    runs = present.astype(float)
    counts = runs.sum(axis=1)
    share = runs / counts[:, None]
    schur = np.diag(runs.sum(axis=0)) - runs.T @ share
    inverse = np.asarray(np.linalg.pinv(schur, rcond=1e-10, hermitian=True), dtype=np.float64)
    onto = inverse @ schur
    df = len(at_cell) - shape[0] - int(round(float(np.trace(onto))))
    spread = np.diag(1 / counts) + share @ inverse @ share.T
    return Layout(at_cell, at_seed, counts, share, inverse, onto, spread, df)
