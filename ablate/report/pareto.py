"""Score against cost: which cells nothing beats in both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from ablate.analysis.recommend import told_apart
from ablate.analysis.results import Cell, Table, tabulate
from ablate.study.table import CellRow, StudyTable
from ablate.trial import metrics

_WORTH_A_TRADE = 1.1
"""Cells whose wall times differ by less than this ratio cost the same, for all we know."""


@dataclass(frozen=True, slots=True)
class Point:
    """A cell whose every seed has a score."""

    cell: CellRow
    cost: float
    """Mean over completed runs."""
    score: float
    """Mean over seeds, a diverged one at chance."""
    on_front: bool
    """No other cell is better in one and as good in the other, and if it is not the cheapest of
    the front, its score is shown to be better than that of every cheaper cell there."""


@dataclass(frozen=True, slots=True)
class Trade:
    """Every cell that can be weighed, cheapest first."""

    cost: str
    """Name of the cost, as in ``metrics.costs``."""
    label: str
    """For people, with its unit."""
    points: tuple[Point, ...]

    @property
    def front(self) -> tuple[Point, ...]:
        return tuple(point for point in self.points if point.on_front)


def weigh(table: StudyTable) -> Trade | None:
    """The study's cells by score and cost; None where there is nothing to trade.

    The cost is the objective's (``objective: {cost: ...}``), else the worker-hours of a run.
    """
    goal = table.study.objective
    name = goal.cost or "gpu_hours"
    upward = goal.direction == "maximize"
    costly = goal.cost is None or goal.cost_direction == "minimize"
    found: list[tuple[CellRow, float, float]] = []
    for cell in table.cells:
        score = cell.score(table.chance)
        costs = [row.cost.weighed for row in cell.trials if row.cost.weighed is not None]
        if score is not None and costs:
            found.append((cell, fmean(costs), score))
    if len(found) < 2:
        return None
    amounts = [cost for _, cost, _ in found]
    if goal.cost is None and max(amounts) < _WORTH_A_TRADE * min(amounts):
        return None
    merits = [(-cost if costly else cost, score if upward else -score) for _, cost, score in found]
    results = [row.result(cell.levels) for cell, *_ in found for row in cell.trials if row.scored]
    names = [tuple(level for _, level in cell.levels) for cell, *_ in found]
    front = shown_front(tabulate(results), names, merits)
    points = [
        Point(cell, cost, score, on_front)
        for (cell, cost, score), on_front in zip(found, front, strict=True)
    ]
    points.sort(key=lambda point: (point.cost, -point.score if upward else point.score))
    return Trade(name, _label(table, name), tuple(points))


def shown_front(
    known: Table, cells: Sequence[Cell], merits: Sequence[tuple[float, float]]
) -> list[bool]:
    """The front of what is shown: among equal scores the dearer cells of a front are all luck.

    `merits`: as for :func:`pareto_front`, the cost's first. With one seed nothing can be shown, and
    the front is that of the numbers themselves.
    """
    front = pareto_front(merits)
    if min((~np.isnan(known.values)).sum(axis=1)) < 2:
        return front
    kept: list[int] = []
    for place in sorted(range(len(cells)), key=lambda i: merits[i], reverse=True):
        if front[place]:
            apart = told_apart(known, cells, cells[place]) if kept else ()
            if all(cells[other] in apart for other in kept):
                kept.append(place)
    return [place in kept for place in range(len(cells))]


def pareto_front(merits: Sequence[tuple[float, float]]) -> list[bool]:
    """For each pair (larger is better in both): whether no other dominates it."""
    return [
        not any(a >= mine[0] and b >= mine[1] and (a, b) != mine for a, b in merits)
        for mine in merits
    ]


def _label(table: StudyTable, name: str) -> str:
    if name == "gpu_hours":
        gpus = table.study.gang.gpus_per_worker
        return f"{'accelerator' if gpus else 'worker'}-hours a run"
    entry = table.study.describe(name) or metrics.describe(name)
    return f"{name}, {entry.unit}" if entry and entry.unit else name
