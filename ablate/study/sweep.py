"""A search as the model of its response reads it: factors as axes, finished cells as points."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from ablate.analysis import sweep
from ablate.analysis.axes import Axis
from ablate.analysis.results import Cell as LevelNames
from ablate.analysis.results import Objective, Result, tabulate
from ablate.study.controls import withheld
from ablate.study.schema import Search
from ablate.study.study import Factor, Study
from ablate.trial.identity import Cell

CONFIRMED = 4
"""Settings that are run on fresh seeds, beside the baseline."""
LEAST_CELLS = 10
"""Cells before which no search ends by itself: its model has seen too little of the space."""


def axes_of(study: Study) -> tuple[Axis, ...]:
    """One axis a factor. Listed numbers, three or more, are an order in which neighbours are
    alike, at equal distances: whoever lists 1, 10, 100 thinks in these steps."""
    return tuple(_axis(factor) for factor in study.factors)


def _axis(factor: Factor) -> Axis:
    span = factor.range
    only_if = tuple((name, frozenset(levels)) for name, levels in factor.only_if.items())
    if span is not None:
        return Axis(
            factor.name,
            low=span.low,
            high=span.high,
            is_log=span.log,
            is_whole=factor.baseline.lstrip("-").isdigit(),
            only_if=only_if,
        )
    twins = tuple((twin, home) for twin, (home, _) in factor.twins.items())
    names = list(factor.distinct())
    numbers = [_number(name) for name in names]
    is_ordered = len(names) > 2 and None not in numbers
    if is_ordered:
        names = [name for _, name in sorted(zip(numbers, names, strict=True))]
    return Axis(
        factor.name, levels=tuple(names), twins=twins, is_ordered=is_ordered, only_if=only_if
    )


def _number(name: str) -> float | None:
    try:
        return float(name)
    except ValueError:
        return None


def answer_of(study: Study, results: Iterable[Result]) -> sweep.Answer | None:
    """What the ended trials of a search say, in whatever order; None before any has ended."""
    ended = tuple(sorted(results, key=lambda result: (result.levels, result.seed)))
    if not ended:
        return None
    goal = study.objective
    return _answer(
        axes_of(study),
        tuple(study.baseline_levels().values()),
        Objective(goal.metric, goal.direction, margin=goal.margin),
        _MayUse(study.source.text, study),
        ended,
    )


@dataclass(frozen=True, slots=True)
class _MayUse:
    """Whether a setting may be handed out, hence proposed. For a cache: equal for equal texts."""

    text: str
    study: Study = field(compare=False)

    def __call__(self, cell: LevelNames) -> bool:
        levels = {f.name: level for f, level in zip(self.study.factors, cell, strict=True)}
        try:
            self.study.config(self.study.cell(levels), seed=self.study.seeds[0])
            return not withheld(self.study, levels)
        except ValueError:
            return False  # the levels contradict each other


@lru_cache(maxsize=8)  # the same results are asked about again and again while a study runs
def _answer(
    axes: tuple[Axis, ...],
    reference: LevelNames,
    objective: Objective,
    may_use: _MayUse,
    results: tuple[Result, ...],
) -> sweep.Answer:
    return sweep.answer(tabulate(results), axes, reference, objective, may_use=may_use)


def has_converged(study: Study, results: Iterable[Result]) -> bool:
    """Whether going on is expected to gain less than the study's `until` asks for."""
    design = study.design
    if not isinstance(design, Search) or design.until is None:
        return False
    found = answer_of(study, results)
    if found is None or found.left is None:
        return False
    if found.completed + found.diverged < min(LEAST_CELLS, design.cells):
        return False
    wanted = design.until.gain_below
    return found.left.mean < (study.objective.margin if wanted == "margin" else wanted)


def to_repeat(study: Study, results: Sequence[Result]) -> tuple[Cell, int] | None:
    """The cell to run again, and on which seed, when its noise and not the settings is what is
    unknown: another run of it is expected to gain more than any setting that has not run.

    Only where `until` leaves it to the model how long to search; None: ask for another cell.
    """
    design = study.design
    if not isinstance(design, Search) or design.until is None:
        return None
    found = answer_of(study, results)
    if found is None or not found.next or found.next[0].is_new:
        return None
    if found.completed + found.diverged < min(LEAST_CELLS, design.cells):
        return None
    names = found.next[0].cell
    cell = study.cell(dict(zip((axis.name for axis in found.axes), names, strict=True)))
    ran = {result.seed for result in results if result.levels == cell.levels}
    left = [seed for seed in study.spare_seeds if seed not in ran]
    return (cell, left[0]) if left else None


def num_repeats(study: Study, seeds: Iterable[int]) -> int:
    """How many trials of a search ran a cell again, by their seeds; each counts as a cell."""
    return sum(seed in study.spare_seeds for seed in seeds)


def to_confirm(study: Study, results: Sequence[Result]) -> list[Cell]:
    """The baseline and the settings to be run on fresh seeds, by the runs on all others.

    Runs on fresh seeds do not change which they are.
    """
    own = [result for result in results if result.seed not in study.fresh_seeds]
    found = answer_of(study, own)
    if found is None or found.use is None:
        return []
    cells = [study.cell({})]
    for names in found.confirm or (found.use.cell,):
        levels = dict(zip((axis.name for axis in found.axes), names, strict=True))
        cell = study.cell(levels)
        if cell.levels not in {other.levels for other in cells}:
            cells.append(cell)
    return cells[: CONFIRMED + 1]


def progress(study: Study, results: Sequence[Result], *, asked: int) -> tuple[str, ...]:
    """How a search stands, a line each: best so far, what going on could gain, cells left."""
    design = study.design
    if not isinstance(design, Search):
        return ()
    goal = study.objective
    told = (100.0, "%", " points") if study.is_share(goal.metric) else (1.0, "", "")
    factor, percent, points = told
    lines = []
    left = max(design.cells - asked, 0)
    found = answer_of(study, results)
    if found is not None and found.use is not None:
        levels = dict(zip((axis.name for axis in found.axes), found.use.cell, strict=True))
        score = f"{goal.metric} {factor * found.use.score.mean:.3g}{percent}"
        lines.append(f"best so far: {study.change_name(levels)}, {score}")
    if found is not None and found.left is not None:
        lines.append(
            f"going on is expected to gain {factor * found.left.mean:.2g}{points} more "
            f"(margin {factor * goal.margin:g}); {left} of {design.cells} cells left"
        )
    else:
        lines.append(f"{left} of {design.cells} cells left")
    return tuple(lines)
