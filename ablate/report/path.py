"""The executed path from the baseline to the target, one change a step."""

from __future__ import annotations

from ablate.study import AblationPath
from ablate.study.table import CellRow, StudyTable


def walked(table: StudyTable) -> list[tuple[str, CellRow]]:
    """(change, cell) of each step that is decided, the baseline first; empty for other designs."""
    study = table.study
    if not isinstance(study.design, AblationPath) or table.baseline is None:
        return []
    sign = study.objective.sign
    current = study.compared_baseline()
    left = {name: level for name, level in study.design.target.items() if current[name] != level}
    steps = [("baseline", table.baseline)]
    while left:
        tried = {name: table.cell({**current, name: level}) for name, level in left.items()}
        scores = {
            name: score
            for name, cell in tried.items()
            if cell is not None and (score := cell.score(table.chance)) is not None
        }
        if len(scores) < len(left):
            break  # this round is not complete
        best = max(scores, key=lambda name: sign * scores[name])
        current = {**current, best: left.pop(best)}
        cell = tried[best]
        assert cell is not None
        steps.append((best, cell))
    return steps
