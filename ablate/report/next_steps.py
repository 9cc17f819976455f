"""What was not decided, and what the next run should be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ablate.analysis import verdict
from ablate.analysis.divergence import fisher
from ablate.analysis.sentences import diverges_alike, was_seen
from ablate.analysis.verdict import MOST_SEEDS
from ablate.report.best import Recommendation
from ablate.report.questions import Question
from ablate.report.scale import Scale
from ablate.study import Observed, Study
from ablate.study.table import UNENDED, StudyTable
from ablate.trial.identity import Outcome
from ablate.words import are, counted


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


def next_steps(
    table: StudyTable, asked: Sequence[Question], scale: Scale, use: Recommendation
) -> tuple[Step, ...]:
    """What the next run should be, most useful first."""
    study = table.study
    if isinstance(study.design, Observed):
        return (Step(use.to_know_more, "ablate init study.yaml --recipe command"),)
    launch = f"ablate launch {study.file}"
    steps = []
    waiting = sum(table.count(state) for state in UNENDED)
    if table.count("running"):
        steps.append(
            Step(
                f"{counted(waiting, 'trial')} of this study {are(waiting)} still to come, and a "
                "launch is at work on them; watch it, and read this again later.",
                f"ablate watch runs/{study.name}",
            )
        )
    elif waiting:
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
                + f". {_failures(table)} The reasons are under Cost; once they are mended, these "
                "are tried again by:",
                f"{launch} --again failed",
            )
        )
    steps += _wider(table)
    steps += _more_seeds(study, asked)
    steps += _combine(study, use)
    return tuple(steps)


def _failures(table: StudyTable) -> str:
    """Whether failures fall on a level; nobody can know that they say nothing about it."""
    usual = table.study.compared_baseline()
    ended = [(dict(cell.levels), row.scored) for cell in table.cells for row in cell.trials
             if row.ended and row.state != Outcome.PRUNED]  # fmt: skip
    if not any(scored for _, scored in ended):
        return "No run has a score, so nothing can be said of any setting."
    found = []
    for factor, level in dict.fromkeys(pair for levels, _ in ended for pair in levels.items()):
        if usual.get(factor) == level:
            continue
        mine = [scored for levels, scored in ended if levels[factor] == level]
        rest = [scored for levels, scored in ended if levels[factor] != level]
        lost, others = mine.count(False), rest.count(False)
        p = fisher((lost, len(mine)), (others, len(rest)))
        if lost and ((lost >= 2 and not others) or p < 0.05):
            found.append(f"{factor}={level} ({lost} of {len(mine)}, all others {others} of "
                         f"{len(rest)})")  # fmt: skip
    if not found:
        return "They fall on no level in particular, so nothing is held against one."
    return f"Failures fall on {'; '.join(found[:3])}: means there are of survivors."


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
    open_ = [
        c for q in asked for c in q.analysis.contrasts
        if c.verdict == verdict.INCONCLUSIVE and not c.identical  # another seed shows the same
        and was_seen(c)
    ]  # fmt: skip
    wanted = sorted(number for c in open_ if 0 < (number := c.needs_seeds or 0) <= MOST_SEEDS)
    steps = []
    if wanted and study.sequential is None:
        few, most = wanted[0], wanted[-1]
        kind = "comparison" if len(open_) == 1 else "comparisons"
        text = f"{counted(few, 'more seed')} would decide {wanted.count(few)} of {len(open_)} "
        text += f"open {kind}"
        text += f", {most} would decide {len(wanted)}," if most > few else ","
        text += " each with a probability of 80 %."
        last = max(study.seeds)
        seeds = [*study.seeds, *range(last + 1, last + 1 + few)]
        counted_up = seeds == list(range(len(seeds)))
        code = f"seeds: {len(seeds) if counted_up else seeds}"
        steps.append(Step(text + " Finished trials are kept.", code))
        # Sequential seeds count from 0, and only such seeds are already there.
        reusable = study.seeds == tuple(range(len(study.seeds)))
        if reusable and len(open_) < sum(len(q.analysis.contrasts) for q in asked):
            # An answer that is valid at every look costs about twice the seeds.
            top = max(len(study.seeds) + 2 * most, 3)
            steps.append(
                Step(
                    "To spend seeds on the open comparisons only, and stop as each is decided "
                    "(what may stop early needs about twice the seeds for the same difference):",
                    f"seeds: {{min: {max(2, len(study.seeds))}, max: {top}, until: decided}}",
                )
            )
    alike = [c for c in open_ if diverges_alike(c)]
    if alike:
        names = ", ".join(dict.fromkeys(f"{c.factor}={c.level}" for c in alike[:6]))
        more = " and others" if len(alike) > 6 else ""
        steps.append(
            Step(
                f"More seeds decide nothing about {names}{more}: both sides diverge alike. Mend "
                "that first: by a lower learning rate or a longer warmup, or without the levels "
                "that diverge whatever else is set."
            )
        )
    hopeless = [
        c for c in open_
        if c.n and not (c.divergence and c.divergence.any)
        and (c.needs_seeds is None or c.needs_seeds > MOST_SEEDS)
    ]  # fmt: skip
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


def _combine(study: Study, use: Recommendation) -> list[Step]:
    """Do the gains of single changes add up?"""
    if use.combination is None:
        return []
    return [Step(use.to_know_more, f"ablate confirm runs/{study.name}")]
