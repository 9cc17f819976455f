"""How much each number that a run could count with tells of this study, by its own curves."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ablate.analysis.course import Told, weigh
from ablate.report.scale import Scale, probability
from ablate.study.results import told_values
from ablate.study.schema import Objective
from ablate.study.table import CellRow, StudyTable, TrialRow
from ablate.trial.identity import Outcome

_SURE = 0.05


@dataclass(frozen=True, slots=True)
class CourseRow:
    """One choice, as text."""

    name: str
    noise: str
    spread: str
    ratio: str
    p: str
    used: bool


@dataclass(frozen=True, slots=True)
class Course:
    """All choices that the runs' evaluations allow."""

    sentence: str
    rows: tuple[CourseRow, ...]
    told: tuple[Told, ...]
    cells: int
    seeds: int

    def to_dict(self) -> dict[str, Any]:
        """For programs: in the objective's own unit."""
        return {
            "cells": self.cells,
            "seeds": self.seeds,
            "choices": [asdict(told) for told in self.told],
            "sentence": self.sentence,
        }


def course_of(table: StudyTable, scale: Scale) -> Course | None:
    """None where runs were evaluated once, or are too few."""
    goal = table.study.objective
    cells, seeds = _complete(table)
    rows = {
        (i, s): told_values(goal.model_dump(), table.record.record(row.id).evaluations())
        for i, cell in enumerate(cells)
        for s, row in _ended(cell).items()
        if s in seeds
    }
    kept = [rows[i, s] for i in range(len(cells)) for s in seeds]
    choices = [at for at in (kept[0] if kept else ()) if all(at in told for told in kept)]
    if len(choices) < 2:
        return None
    told = weigh(
        {at: np.array([[rows[i, s][at] for s in seeds] for i in range(len(cells))])
         for at in choices}
    )  # fmt: skip
    if not told:
        return None
    return Course(
        sentence=_sentence(goal, told, len(cells), len(seeds)),
        rows=tuple(
            CourseRow(
                name=goal.name_choice(one.at),
                noise=scale.delta(one.noise).lstrip("+"),
                spread=scale.delta(one.spread).lstrip("+"),
                ratio=f"{one.ratio:.2g}" if one.noise else "",
                p="" if one.p is None else probability(one.p),
                used=one.at == goal.at,
            )
            for one in told
        ),
        told=told,
        cells=len(cells),
        seeds=len(seeds),
    )


def _ended(cell: CellRow) -> dict[int, TrialRow]:
    return {row.seed: row for row in cell.trials if row.state == Outcome.COMPLETED}


def _complete(table: StudyTable) -> tuple[list[CellRow], list[int]]:
    """The seeds that the baseline completed, and the cells that completed all of them."""
    seeds = sorted(_ended(table.baseline))
    return [cell for cell in table.cells if seeds and not set(seeds) - set(_ended(cell))], seeds


def _sentence(goal: Objective, told: tuple[Told, ...], cells: int, seeds: int) -> str:
    used = next((one for one in told if one.at == goal.at), told[0])
    best = max(told, key=lambda one: one.ratio)
    start = (
        f"Over {cells} cells and {seeds} seeds, the number that a run counts with "
        f"({goal.name_choice(used.at)}) has a signal-to-noise ratio of {used.ratio:.2g}"
    )
    if not any(one.spread for one in told):
        return f"{start}: cells do not differ beyond noise, so only noises can be compared."
    if best is used:
        return f"{start}, and no other choice has more."
    other = goal.name_choice(best.at)
    if best.p is not None and best.p < _SURE and used.ratio:
        share = (used.ratio / best.ratio) ** 2
        return (
            f"{start}; the {other} has {best.ratio:.2g} and would need {share:.2g} times the seeds "
            f"for the same answers. Write objective.at: {best.at} before the next study's runs: "
            "a choice that is made after a look favours what was seen."
        )
    return f"{start}; the {other} has {best.ratio:.2g}, which these runs do not show to be real."
