"""The answer of a search in words: what to use, what moved the score and where, what is next."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ablate.analysis.axes import Axis
from ablate.analysis.cliff import Cliff
from ablate.analysis.sweep import MOVED, Answer, Estimate, Use
from ablate.report.next_steps import Step
from ablate.report.questions import along_the_path
from ablate.report.scale import Scale
from ablate.report.sweep_words import (
    SweepRow,
    amount,
    basis_sentence,
    divergence_sentence,
    effect_row,
    left_sentence,
    level_words,
    levels_of,
    name_of,
    pair_sentence,
    use_sentence,
)
from ablate.search import referee
from ablate.study import Search, Study
from ablate.study.design import confirm_search, winner
from ablate.study.sweep import answer_of, num_repeats
from ablate.study.table import StudyTable
from ablate.words import are, counted, name_seeds


@dataclass(frozen=True, slots=True)
class Ranked:
    """A line of the table of the best cells."""

    cell: str
    score: str
    interval: str
    gain: str
    gain_interval: str
    runs: int


@dataclass(frozen=True, slots=True)
class Sweep:
    """What a search says, ready to print."""

    answer: Answer
    use: str
    """What to use, in a sentence or two."""
    left: str
    """What could still be gained."""
    rows: tuple[SweepRow, ...]
    pair: str
    divergence: str
    path: str
    """What each change adds on the way from the baseline to the best cell, where that was run."""
    basis: str
    """What the answer rests on, and what took no part."""
    ranking: tuple[Ranked, ...]
    next: tuple[Step, ...]
    pruning: tuple[str, ...]
    """How the rungs stood, a line each."""

    @property
    def headlines(self) -> tuple[str, ...]:
        """For a terminal."""
        factors = (f"{row.factor}: {row.sentence}" for row in self.rows)
        rest = (self.pair, self.divergence, self.path)
        return tuple(text for text in (self.use, self.left, *factors, *rest) if text)

    def to_dict(self) -> dict[str, Any]:
        """For programs: numbers in the objective's own unit."""
        found = self.answer
        return {
            "use": _use_dict(found.axes, found.use),
            "ranking": [_use_dict(found.axes, use) for use in found.ranking],
            "left": _estimate_dict(found.left),
            "factors": [
                {
                    "factor": effect.axis.name,
                    "verdict": effect.verdict,
                    "span": _estimate_dict(effect.span),
                    "levels": [effect.axis.level(float(p)) for p in effect.nodes],
                    "mean": effect.mean.tolist(),
                    "low": effect.low.tolist(),
                    "high": effect.high.tolist(),
                    "within_margin": list(effect.good),
                }
                for effect in found.effects
            ],
            "pair": found.pair
            and {
                "factors": [axis.name for axis in found.pair.axes],
                "shown": found.pair.is_shown,
                "size": _estimate_dict(found.pair.size),
                "at": [list(levels) for levels in found.pair.at],
            },
            "divergence": [_cliff_dict(found.axes, cliff) for cliff in found.cliffs],
            "next": [
                {
                    "levels": levels_of(found.axes, proposal.cell),
                    "expected_improvement": proposal.improvement,
                    "new": proposal.is_new,
                }
                for proposal in found.next
            ],
            "noise": found.noise,
            "cells": {
                "completed": found.completed,
                "diverged": found.diverged,
                "pruned": found.pruned,
            },
            "why_no_model": found.why_no_model,
            "sentences": [self.use, self.left, *(row.sentence for row in self.rows), self.pair,
                          self.divergence, self.path, self.basis],
        }  # fmt: skip


def sweep_of(table: StudyTable, scale: Scale) -> Sweep | None:
    """The answer of a search; None for other designs and before anything has ended."""
    study = table.study
    if not isinstance(study.design, Search):
        return None
    found = answer_of(study, table.results)
    if found is None:
        return None
    return Sweep(
        answer=found,
        use=use_sentence(study, found, scale),
        left=left_sentence(study, found, scale),
        rows=tuple(effect_row(effect, found.cliffs, found.axes, scale) for effect in found.effects),
        pair=pair_sentence(found, scale),
        divergence=divergence_sentence(found),
        path=_way_there(table),
        basis=basis_sentence(found, scale),
        ranking=tuple(_ranked(study, found.axes, use, scale) for use in found.ranking),
        next=_next(study, table, found, scale),
        pruning=referee.describe(study, table.record, table.trials),
    )


def _way_there(table: StudyTable) -> str:
    text = along_the_path(table)
    target = winner(table.study, table.results) if text else None
    if target is None:
        return ""
    return f"To {table.study.change_name(target)}, the best on the search's own seeds. {text}"


def _ranked(study: Study, axes: Sequence[Axis], use: Use, scale: Scale) -> Ranked:
    score, gain = use.score, use.gain
    return Ranked(
        cell=name_of(study, axes, use.cell),
        score=scale.value(score.mean),
        interval=f"{scale.value(score.low)} to {scale.value(score.high)}"
        if math.isfinite(score.low)
        else "",
        gain=scale.delta(gain.mean) if gain else "",
        gain_interval=scale.interval((gain.low, gain.high)) if gain else "",
        runs=use.runs,
    )


# ------------------------------------------------------------------ what next


def _next(study: Study, table: StudyTable, found: Answer, scale: Scale) -> tuple[Step, ...]:
    design = study.design
    assert isinstance(design, Search)
    steps = _confirm(study, table)
    if found.use is not None and found.left is not None and found.next:
        best = found.next[0]
        name = name_of(study, found.axes, best.cell)
        worth = amount(scale, best.improvement)
        if found.left.mean < study.objective.margin:
            text = "More cells are not expected to gain the margin; to gain more, widen the space"
            if design.then == "nothing":
                step = Step(
                    f"{text}; to know what the setting found owes to each of its changes, add to "
                    "the design:",
                    "then: leave_one_out",
                )
            else:
                step = Step(f"{text}.")
            steps.append(step)
        elif best.is_new:
            waiting = design.cells - _num_asked(table)
            text = f"Go on: the most promising setting, {name}, is expected to gain {worth}"
            code = f"ablate launch {study.file}"
            if waiting > 0:
                text += f"; {waiting} of {counted(design.cells, 'cell')} {are(waiting)} left"
            else:
                code = f"design: {{name: search, cells: {design.cells + 10}}}\n{code}"
            steps.append(Step(f"{text}. Finished trials are kept.", code))
        else:
            more = [*study.seeds, max(study.seeds) + 1]
            steps.append(
                Step(
                    f"What is unknown is the noise, not the settings: another run of {name} is "
                    f"worth {worth}, more than any new cell. One more seed for all:",
                    f"seeds: {more}",
                )
            )
    steps += _edges(found)
    return tuple(steps)


def _num_asked(table: StudyTable) -> int:
    """Cells that the search has spent, further runs of one among them."""
    own = [row for row in table.rows if row.seed not in table.study.fresh_seeds]
    return len({row.levels for row in own}) + num_repeats(table.study, (row.seed for row in own))


def _confirm(study: Study, table: StudyTable) -> list[Step]:
    """What is used should rest on runs that did not choose it."""
    ended = {(result.levels, result.seed) for result in table.results}
    wanted = confirm_search(study, table.results)
    left = [trial for trial in wanted if (trial.cell.levels, trial.seed) not in ended]
    if study.confirm or not left:
        return []
    cells = len({trial.cell.levels for trial in wanted}) - 1
    return [
        Step(
            f"Confirm: the {counted(cells, 'setting')} that look best, tried or not, and "
            f"the baseline on {name_seeds(study.fresh_seeds)}, {counted(len(left), 'trial')}. The "
            "answer then rests on runs that did not choose it.",
            f"ablate confirm runs/{study.name}",
        )
    ]


def _edges(found: Answer) -> list[Step]:
    """Factors whose best place is the end of their range."""
    at = []
    for effect in found.effects:
        axis = effect.axis
        last = len(effect.nodes) - 1
        if axis.levels or effect.verdict != MOVED or effect.best not in (0, last):
            continue
        if any(found.axes[cliff.axis] is axis for cliff in found.cliffs):
            continue
        at.append(f"{axis.name}={level_words(axis, float(effect.nodes[effect.best]))}")
    if not at:
        return []
    return [Step(f"The best lies at the end of the range ({', '.join(at)}): widen it.")]


# ------------------------------------------------------------------ for programs


def _estimate_dict(found: Estimate | None) -> dict[str, float | None] | None:
    if found is None:
        return None
    low, high = (end if math.isfinite(end) else None for end in (found.low, found.high))
    return {"mean": found.mean, "low": low, "high": high}


def _use_dict(axes: Sequence[Axis], use: Use | None) -> dict[str, Any] | None:
    if use is None:
        return None
    return {
        "levels": levels_of(axes, use.cell),
        "score": _estimate_dict(use.score),
        "gain": _estimate_dict(use.gain),
        "runs": use.runs,
    }


def _cliff_dict(axes: Sequence[Axis], cliff: Cliff) -> dict[str, Any]:
    axis = axes[cliff.axis]
    found: dict[str, Any] = {"factor": axis.name}
    if cliff.levels:
        return {**found, "levels": [list(level) for level in cliff.levels]}
    found["above"] = cliff.above
    if axis.levels:
        return {**found, "at": axis.level(min(max(cliff.at, 0.0), 1.0))}
    return {
        **found,
        "at": axis.value(cliff.at),
        "interval": [axis.value(p) for p in cliff.interval],
    }
