"""Differences between cells that no table of levels lists: a target as a whole, steps of a path."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ablate.analysis import effects, power
from ablate.analysis.contrasts import ALPHA
from ablate.analysis.fit import pool
from ablate.analysis.results import Cell, Table


@dataclass(frozen=True, slots=True)
class Difference:
    """A weighted sum of cells' means; `ci` is None without replicates."""

    delta: float
    ci: tuple[float, float] | None


def differences(table: Table, asked: Sequence[Mapping[Cell, float]]) -> list[Difference | None]:
    """Each sum (cell -> weight) with an interval that holds for all of them together (Bonferroni).

    None where a cell has no completed run.
    """
    fitted = pool(table)
    found: list[Difference | None] = []
    for sums in asked:
        weights = np.zeros(len(table.cells))
        rows = {cell: table.index(cell) for cell in sums}
        for cell, weight in sums.items():
            row = rows[cell]
            if row is not None:
                weights[row] += weight
        estimate = None
        if None not in rows.values():
            estimate = effects.estimate(table.values, weights, fitted)
        if estimate is None:
            found.append(None)
        elif estimate.df < 1:
            found.append(Difference(estimate.delta, None))
        else:
            half = power.t_quantile(ALPHA / (2 * len(asked)), estimate.df)
            half *= estimate.standard_error
            found.append(Difference(estimate.delta, (estimate.delta - half, estimate.delta + half)))
    return found


def steps(cells: Sequence[Cell]) -> list[dict[Cell, float]]:
    """Each cell against the one before it."""
    return [{after: 1.0, before: -1.0} for before, after in zip(cells, cells[1:], strict=False)]


def whole(base: Cell, target: Cell, alone: Sequence[Cell]) -> list[dict[Cell, float]]:
    """The target against the baseline, and that beyond the sum of its changes made alone."""
    beyond = {target: 1.0, base: float(len(alone) - 1)}
    beyond.update(dict.fromkeys(alone, -1.0))
    return [{target: 1.0, base: -1.0}, beyond]
