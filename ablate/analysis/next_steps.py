"""What was not decided, and what the next run should be."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from ablate.analysis import verdict
from ablate.analysis.analysis import Contrast
from ablate.analysis.questions import MOST_SEEDS, Question
from ablate.analysis.scale import Scale
from ablate.analysis.table import StudyTable
from ablate.study import (
    OneAtATime,
    Study,
)
from ablate.trial import Outcome
from ablate.wording import are, counted, file_of


@dataclass(frozen=True, slots=True)
class Step:
    """Something to do next, and what to write or type for it."""

    text: str
    code: str = ""


def open_questions(asked: Sequence[Question]) -> tuple[str, ...]:
    """What was not decided, each in a sentence."""
    found = []
    for question in asked:
        for contrast in question.analysis.contrasts:
            if contrast.verdict == verdict.INCONCLUSIVE:
                found.append(f"{contrast.factor}: {contrast.sentence}")
        found += question.analysis.not_estimable
    return tuple(dict.fromkeys(found))


def next_steps(table: StudyTable, asked: Sequence[Question], scale: Scale) -> tuple[Step, ...]:
    """What the next run should be, most useful first."""
    study = table.study
    launch = f"ablate launch {file_of(study)}"
    steps = []
    waiting = table.count("waiting") + table.count("running")
    if waiting:
        steps.append(
            Step(
                f"{counted(waiting, 'trial')} of this study {are(waiting)} still to be "
                "run; launching again runs just these.",
                launch,
            )
        )
    gone = [row for row in table.rows if row.ended and not Outcome(row.state).answered]
    if gone:
        steps.append(
            Step(
                f"{counted(len(gone), 'trial')} ended without a score and {are(len(gone))} left "
                "out: "
                + ", ".join(f"{row.id} ({row.state})" for row in gone[:8])
                + (" and more" if len(gone) > 8 else "")
                + ". They say nothing about their setting; the reasons are under Cost."
            )
        )
    steps += _wider(table)
    steps += _more_seeds(study, asked)
    steps += _combine(study, asked)
    return tuple(steps)


def _wider(table: StudyTable) -> list[Step]:
    """Where the best candidate of a nuisance setting is the last one of those tried."""
    found = [(row.name, edge) for row in table.tuning for edge in row.edges(table.study)]
    if not found:
        return []
    listed = "; ".join(
        f"{name}: {setting}={value} is the {end}" for name, (setting, value, end) in found[:6]
    )
    more = f"; and {len(found) - 6} more" if len(found) > 6 else ""
    return [
        Step(
            f"The best candidate lies at the edge of those tried ({listed}{more}). A level may be "
            "better still beyond it: widen nuisance.settings. Finished trials are kept."
        )
    ]


def _more_seeds(study: Study, asked: Sequence[Question]) -> list[Step]:
    open_ = [c for q in asked for c in q.analysis.contrasts if c.verdict == verdict.INCONCLUSIVE]
    wanted = sorted(number for c in open_ if 0 < (number := c.needs_seeds or 0) <= MOST_SEEDS)
    steps = []
    if wanted and study.sequential is None:
        few, most = wanted[0], wanted[-1]
        kind = "comparison" if len(open_) == 1 else "comparisons"
        text = (
            f"About {counted(few, 'more seed')} would decide {wanted.count(few)} of {len(open_)} "
        )
        text += f"open {kind}"
        text += f", {most} would decide {len(wanted)}." if most > few else "."
        last = max(study.seeds)
        seeds = [*study.seeds, *range(last + 1, last + 1 + few)]
        steps.append(Step(text + " Finished trials are kept.", f"seeds: {seeds}"))
        # Sequential seeds count from 0, and only such seeds are already there.
        reusable = study.seeds == tuple(range(len(study.seeds)))
        if reusable and len(open_) < sum(len(q.analysis.contrasts) for q in asked):
            top = max(len(study.seeds) + most, 3)
            steps.append(
                Step(
                    "To spend seeds on the open comparisons only, and stop as each is decided:",
                    f"seeds: {{min: {max(2, len(study.seeds))}, max: {top}, until: decided}}",
                )
            )
    hopeless = [c for c in open_ if c.n and (c.needs_seeds is None or c.needs_seeds > MOST_SEEDS)]
    if hopeless:
        names = ", ".join(f"{c.factor}={c.level}" for c in hopeless[:6])
        more = " and others" if len(hopeless) > 6 else ""
        steps.append(
            Step(
                f"More seeds are a poor way to decide {names}{more}: it would take more than "
                f"{MOST_SEEDS}, since the estimate lies close to the margin or to nothing. "
                "Accept either setting, widen the margin, or ask it where the effect is larger."
            )
        )
    return steps


def _combine(study: Study, asked: Sequence[Question]) -> list[Step]:
    """After one factor at a time: do the gains add up?"""
    if not isinstance(study.design, OneAtATime) or not asked:
        return []
    best: dict[str, Contrast] = {}
    sign = study.objective.sign
    for contrast in asked[0].analysis.contrasts:
        if contrast.verdict != verdict.MATTERS or contrast.direction != "better":
            continue
        before = best.get(contrast.factor)
        gain = sign * (contrast.delta or 0.0)
        if before is None or gain > sign * (before.delta or 0.0):
            best[contrast.factor] = contrast
    if len(best) < 2:
        return []
    target = {name: contrast.level for name, contrast in best.items()}
    return [
        Step(
            f"{counted(len(target), 'change')} {are(len(target))} better alone. "
            "Whether the gains add up, and which are still needed together, is not known from "
            "this design:",
            f"design: {{name: leave_one_out, target: {json.dumps(target, ensure_ascii=False)}}}",
        )
    ]
