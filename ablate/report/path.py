"""The executed path from the baseline to the target, one change a step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ablate.study import AblationPath, Search, design
from ablate.study.table import CellRow, StudyTable


def walked(table: StudyTable) -> list[tuple[str, CellRow]]:
    """(change, cell) of each step that is decided, the baseline first; empty where none is asked.

    Cells as they were when the path was walked: without the runs that confirmed some of them.
    """
    study = table.study
    target = _target(table)
    if target is None or table.baseline is None:
        return []
    sign = study.objective.sign
    current = study.compared_baseline()
    left = {name: level for name, level in target.items() if current[name] != level}
    steps = [("baseline", _walked(table, table.baseline))]
    while left:
        found = {name: table.cell({**current, name: level}) for name, level in left.items()}
        tried = {name: _walked(table, cell) for name, cell in found.items() if cell is not None}
        scores = {
            name: score
            for name, cell in tried.items()
            if (score := cell.score(table.chance)) is not None
        }
        if len(scores) < len(left):
            break  # this round is not complete
        best = max(scores, key=lambda name: sign * scores[name])
        current = {**current, best: left.pop(best)}
        steps.append((best, tried[best]))
    return steps


def _target(table: StudyTable) -> Mapping[str, str] | None:
    asked = table.study.design
    if isinstance(asked, AblationPath):
        return asked.target
    if isinstance(asked, Search) and asked.then == "ablation_path":
        return design.winner(table.study, table.results)
    return None


def _walked(table: StudyTable, cell: CellRow) -> CellRow:
    fresh = table.study.fresh_seeds
    return replace(cell, trials=tuple(row for row in cell.trials if row.seed not in fresh))
