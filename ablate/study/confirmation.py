"""The cells that confirm a study: all changes that look better alone, put together."""

from __future__ import annotations

from collections.abc import Sequence

from ablate.analysis import recommend
from ablate.analysis.results import Objective, Result, tabulate
from ablate.study.controls import withheld
from ablate.study.schema import Search
from ablate.study.study import Study
from ablate.trial.identity import Cell, Levels


def combinations(
    study: Study, results: Sequence[Result], added: Sequence[Result] = ()
) -> list[Cell]:
    """The changes that are believed to be better, in one cell that can be run, and such cells that
    were handed out when the study had fewer seeds; none without two changes.

    `results`: of the design's cells, under the levels of what is compared; `added`: of cells that
    the design does not have. A search has no such cell: its sampler has combined changes all along.
    """
    if isinstance(study.design, Search) or not results:
        return []
    table = tabulate([*results, *added])
    usual = study.baseline_levels()
    reference = tuple(usual[name] for name in table.factors)
    if reference not in table.cells:
        return []
    goal = study.objective
    barred = {
        cell for cell in table.cells if withheld(study, dict(zip(table.factors, cell, strict=True)))
    }
    found = recommend.combinations(
        table,
        reference,
        Objective(goal.metric, goal.direction, goal.margin),
        seeds=seeds_of(study, results),
        barred=barred,
        added={tuple(level for _, level in result.levels) for result in added},
    )
    cells = [_runnable(study, dict(zip(table.factors, levels, strict=True))) for levels in found]
    return [cell for cell in cells if cell is not None]


def _runnable(study: Study, levels: dict[str, str]) -> Cell | None:
    """None for a control, and where the changes contradict each other."""
    if withheld(study, levels):
        return None
    cell = study.cell(levels)
    try:
        study.config(cell, seed=study.seeds[0])
    except ValueError:
        return None
    return cell


def seeds_of(study: Study, results: Sequence[Result]) -> list[int]:
    """The seeds on which the baseline has ended: they are run on the same ones."""
    usual: Levels = tuple(study.baseline_levels().items())
    ran = {result.seed for result in results if result.levels == usual}
    return [seed for seed in study.seeds if seed in ran]
