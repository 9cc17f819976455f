"""The cell that confirms a study: all changes that look better alone, put together."""

from __future__ import annotations

from collections.abc import Sequence

from ablate.analysis.recommend import combine
from ablate.analysis.results import Objective, Result, tabulate
from ablate.study.controls import withheld
from ablate.study.schema import Search
from ablate.study.study import Study
from ablate.trial.identity import Cell, Levels


def combination(study: Study, results: Sequence[Result]) -> Cell | None:
    """The changes that are believed to be better, in one cell that can be run; None without two.

    `results`: of the design's cells, under the levels of what is compared. A search has no such
    cell: its sampler has combined changes all along.
    """
    if isinstance(study.design, Search) or not results:
        return None
    table = tabulate(results)
    usual = study.baseline_levels()
    reference = tuple(usual[name] for name in table.factors)
    if reference not in table.cells:
        return None
    goal = study.objective
    barred = {
        cell for cell in table.cells if withheld(study, dict(zip(table.factors, cell, strict=True)))
    }
    found = combine(
        table, reference, Objective(goal.metric, goal.direction, goal.margin), barred=barred
    )
    if found is None:
        return None
    levels = dict(zip(table.factors, found, strict=True))
    if withheld(study, levels):
        return None
    cell = study.cell(levels)
    try:
        study.config(cell, seed=study.seeds[0])
    except ValueError:
        return None  # the changes contradict each other
    return cell


def seeds_of(study: Study, results: Sequence[Result]) -> list[int]:
    """The seeds on which the baseline has ended: the combination is run on the same ones."""
    usual: Levels = tuple(study.baseline_levels().items())
    ran = {result.seed for result in results if result.levels == usual}
    return [seed for seed in study.seeds if seed in ran]
