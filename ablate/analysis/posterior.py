"""What to believe of every cell after a study: empirical-Bayes differences to the baseline.

The best of several noisy means is too good (winner's curse). So the effects of levels are taken as
drawn from N(0, tau^2), and what a cell of several changes has beyond their sum from N(0, omega^2);
tau and omega are those under which the study's own means are most likely. The posterior of a
difference is its best linear unbiased prediction, which also knows that all differences share the
baseline's noise (Robinson 1991, "That BLUP is a good thing").
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import product

import numpy as np

from ablate.analysis.fit import fit
from ablate.analysis.results import Cell, FloatArray, Objective, Table

Change = tuple[int, str]
"""(factor's place, level)."""

_RATIOS = (0.0, *np.geomspace(0.05, 1000.0, 30))
"""Prior variances that are tried, in units of the noise variance of a difference."""
_MANY = 100
"""Cells beyond which fewer are tried: each costs a factorisation."""


@dataclass(frozen=True, slots=True)
class Belief:
    """A difference to the baseline, as a gain: positive is better."""

    gain: float
    sd: float

    @property
    def is_up(self) -> bool:
        """At least one posterior standard deviation above the baseline."""
        return self.gain >= self.sd > 0


@dataclass(frozen=True, slots=True)
class Posterior:
    """Beliefs about the changes and the cells that took part."""

    changes: Mapping[Change, Belief]
    """Each level that was run, alone."""
    cells: Mapping[Cell, Belief]
    """Each cell but the baseline's."""
    tau: float
    """Standard deviation of the levels' effects."""
    omega: float
    """Of what a cell of several changes has beyond their sum; 0 where no cell has several."""


def posterior(
    table: Table, reference: Cell, objective: Objective, *, barred: Collection[Cell] = ()
) -> Posterior | None:
    """Beliefs from the cells in which no run diverged and that are not `barred`.

    None where the noise is not known: fewer than two seeds, and too few cells to take it from
    what a model without interactions leaves over.
    """
    rows = [
        row
        for row, cell in enumerate(table.cells)
        if not np.isnan(table.values[row]).all()
        and (cell == reference or (cell not in barred and not table.count(row, "diverged")))
    ]
    cells = [table.cells[row] for row in rows]
    if reference not in cells or len(cells) < 2:
        return None
    base = cells.index(reference)
    fitted = fit(table.values, tuple(rows))
    others = [i for i in range(len(cells)) if i != base]
    gains = np.array([objective.gain(fitted.effects[i] - fitted.effects[base]) for i in others])
    changes = _changes(cells, reference)
    design = np.array(
        [[float((i, cells[j][i]) == (i, name)) for i, name in changes] for j in others]
    )
    several = np.diag((design.sum(axis=1) > 1).astype(float))
    variance = fitted.mse if fitted.df >= 1 else _left_over(gains, design)
    if variance is None:
        return None
    spread = fitted.layout.spread
    apart = np.eye(len(cells))[others] - np.eye(len(cells))[base]
    # Differences below it are arithmetic, not effects.
    least = 1e-9 * float(np.nanmax(np.abs(table.values))) + 1e-150
    noise = max(variance, least**2) * (apart @ spread @ apart.T)
    return _believe(gains, design, several, noise, changes, [cells[j] for j in others])


def _changes(cells: list[Cell], reference: Cell) -> list[Change]:
    seen = [(i, name) for cell in cells for i, name in enumerate(cell) if name != reference[i]]
    return list(dict.fromkeys(seen))


def _left_over(gains: FloatArray, design: FloatArray) -> float | None:
    """Residual variance of one run of an additive model; None without two degrees of freedom."""
    columns = np.column_stack([np.ones(len(gains)), design])
    columns = np.vstack([np.eye(1, columns.shape[1]), columns])  # the baseline's own run
    values = np.concatenate([[0.0], gains])
    df = len(values) - int(np.linalg.matrix_rank(columns))
    if df < 2:
        return None
    rest = values - columns @ (np.linalg.pinv(columns) @ values)
    return float(rest @ rest) / df


def _believe(
    gains: FloatArray,
    design: FloatArray,
    several: FloatArray,
    noise: FloatArray,
    changes: list[Change],
    cells: list[Cell],
) -> Posterior:
    unit = float(np.mean(np.diag(noise)))
    shared = design @ design.T
    best, tau2, omega2 = -math.inf, 0.0, 0.0
    ratios = _RATIOS if len(gains) <= _MANY else _RATIOS[::4]
    for ratio, beyond in product(ratios, ratios if several.any() else (0.0,)):
        total = noise + unit * (ratio * shared + beyond * several)
        factor = np.linalg.cholesky(total)
        whitened = np.linalg.solve(factor, gains)
        likelihood = -0.5 * float(whitened @ whitened) - float(np.log(np.diag(factor)).sum())
        if likelihood > best + 1e-9:
            best, tau2, omega2 = likelihood, unit * ratio, unit * beyond
    total = noise + tau2 * shared + omega2 * several
    weights = np.linalg.solve(total, np.column_stack([gains, design, np.eye(len(gains))]))
    mean, by_change, inverse = (
        weights[:, 0],
        weights[:, 1 : 1 + len(changes)],
        weights[:, -len(gains) :],
    )
    level = tau2 * design.T @ mean
    level_variance = tau2 - tau2**2 * np.einsum("jc,jc->c", design, by_change)
    prior = tau2 * shared + omega2 * several
    whole = prior @ mean
    whole_variance = np.diag(prior - prior @ inverse @ prior)
    return Posterior(
        changes={
            change: Belief(float(g), math.sqrt(max(float(v), 0.0)))
            for change, g, v in zip(changes, level, level_variance, strict=True)
        },
        cells={
            cell: Belief(float(g), math.sqrt(max(float(v), 0.0)))
            for cell, g, v in zip(cells, whole, whole_variance, strict=True)
        },
        tau=math.sqrt(tau2),
        omega=math.sqrt(omega2),
    )
