"""What a study asks, and the answer to each question as rows of a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ablate import design
from ablate.analysis import verdict
from ablate.analysis.aliases import main_aliases
from ablate.analysis.analysis import Analysis, Contrast, analyze_results
from ablate.analysis.results import Result
from ablate.analysis.scale import NONE, Scale, objective_of, probability
from ablate.analysis.table import StudyTable, name_settings
from ablate.errors import AnalysisError
from ablate.study import (
    FractionalFactorial,
    LeaveOneOut,
    PlackettBurman,
    Search,
    Study,
)
from ablate.trial import Levels
from ablate.wording import name_seeds

MOST_SEEDS = 50
"""More seeds than this are not proposed."""


@dataclass(frozen=True, slots=True)
class Question:
    """One comparison that the design was made for."""

    key: str
    """Letters and dashes; part of ids and file columns."""
    title: str
    note: str
    reference: str
    """What every level is compared with."""
    analysis: Analysis


def questions(table: StudyTable) -> tuple[Question, ...]:
    """The study's comparisons, judged; none while nothing has ended."""
    study = table.study
    base = study.compared_baseline()
    tuned = _tuning_note(study)
    if isinstance(study.design, LeaveOneOut):
        return _leave_one_out(table, study.design.target, note=tuned and f"{tuned} ")
    listed = isinstance(study.design, (Search, FractionalFactorial, PlackettBurman))
    found = _judge(table, table.results, base, "additive" if listed else "auto")
    if found is None:
        return ()
    if not isinstance(study.design, Search):
        return (Question("baseline", "Against the baseline", tuned, "the baseline", found),)
    note = (
        "The cells were chosen by a search, so this is exploratory: read it as a ranking "
        "to be confirmed, not as a test."
    )
    over_all = Question("baseline", "Against the baseline", note, "the baseline", found)
    target = design.winner(study, table.results)
    if study.design.then != "leave_one_out" or target is None:
        return (over_all,)
    picked = (
        f"The target, {study.change_name(target)}, is the best cell that the search found on these "
        "same seeds, so part of its lead is luck. "
    )
    return (*_leave_one_out(table, target, note=picked), over_all)


def _leave_one_out(
    table: StudyTable, target: Mapping[str, str], *, note: str = ""
) -> tuple[Question, ...]:
    base = table.study.compared_baseline()
    target = {**base, **target}
    changed = [name for name in base if base[name] != target[name]]
    reverted = [target, *({**target, name: base[name]} for name in changed)]
    added = [base, *({**base, name: target[name]} for name in changed)]
    asked = []
    for key, title, words, cells, reference, against in (
        (
            "reverted",
            "Each change taken out of the target",
            f"{note}A change that can be reverted without loss is not needed, unless another one "
            "stands in for it: compare with the changes made alone.",
            reverted,
            target,
            "the target",
        ),
        ("added", "Each change made alone", "", added, base, "the baseline"),
    ):
        wanted = {tuple(levels.items()) for levels in cells}
        mine = [result for result in table.results if result.levels in wanted]
        found = _judge(table, mine, reference, "simple")
        if found is not None:
            asked.append(Question(key, title, words, against, found))
    return tuple(asked)


def _judge(
    table: StudyTable, results: Sequence[Result], reference: Mapping[str, str], estimand: str
) -> Analysis | None:
    study = table.study
    try:
        return analyze_results(
            results,
            baseline=reference,
            objective=objective_of(table),
            is_sequential=study.sequential is not None,
            first_look=study.sequential.min if study.sequential else None,
            is_exploratory=isinstance(study.design, Search),
            estimand=estimand,
            aliases=main_aliases(study),
        )
    except AnalysisError:
        if results:
            raise
        return None


def _tuning_note(study: Study) -> str:
    if not study.candidates:
        return ""
    names = " and ".join(factor.name for factor in study.nuisance)
    tuned, own = study.tuning_seeds, study.seeds
    return (
        f"Each level stands at its own best {names}, the best of the same "
        f"{len(study.candidates)} candidates on {name_seeds(tuned)}. The choice is not judged by "
        f"the runs that made it: what is compared are new runs on {name_seeds(own)}. The "
        f"intervals speak of these settings; a finer choice of {names} could still move a level."
    )


@dataclass(frozen=True, slots=True)
class ContrastRow:
    """One line of the table of effects, ready to print."""

    factor: str
    level: str
    reference: str
    role: str
    verdict: str
    delta: str
    interval: str
    adjusted: str
    """Simultaneous interval."""
    n: int
    p_adjusted: str
    diverged: str
    needs: str
    sentence: str
    warnings: tuple[str, ...]
    survivors: bool
    """The difference is between runs that did not diverge only."""


def contrast_rows(table: StudyTable, question: Question, scale: Scale) -> tuple[ContrastRow, ...]:
    """The comparisons of one question; those of tuned cells say at which settings they stand."""
    chosen = _chosen_settings(table)
    return tuple(
        _contrast_row(contrast, scale, _stands_at(contrast, question.analysis.baseline, chosen))
        for contrast in question.analysis.contrasts
    )


def _chosen_settings(table: StudyTable) -> dict[Levels, str]:
    """Levels of what is compared -> the nuisance settings that were chosen for them."""
    chosen = {}
    for row in table.tuning:
        if row.best is not None:
            levels = row.candidates[row.best].levels
            chosen[table.study.compared_levels(levels)] = name_settings(table.study, levels)
    return chosen


def _stands_at(contrast: Contrast, base: Mapping[str, str], chosen: Mapping[Levels, str]) -> str:
    """One sentence; empty where the two sides are not one cell each."""
    if contrast.estimand != "simple":
        return ""
    mine, its = (
        chosen.get(tuple({**base, contrast.factor: level}.items()))
        for level in (contrast.level, contrast.reference)
    )
    if mine is None or its is None:
        return ""
    if mine == its:
        return f" Best for both: {mine}."
    return f" {contrast.level} stands at its best {mine}, {contrast.reference} at {its}."


def _contrast_row(contrast: Contrast, scale: Scale, stands_at: str) -> ContrastRow:
    diverged, runs = contrast.diverged
    return ContrastRow(
        factor=contrast.factor,
        level=contrast.level,
        reference=contrast.reference,
        role=verdict_role(contrast),
        verdict=verdict_words(contrast),
        delta=scale.delta(contrast.delta),
        interval=scale.interval(contrast.ci),
        adjusted=scale.interval(contrast.ci_adjusted),
        n=contrast.n,
        p_adjusted=probability(contrast.p_adjusted),
        diverged=f"{diverged}/{runs}" if runs else NONE,
        needs=_needs(contrast),
        sentence=contrast.sentence + stands_at,
        warnings=contrast.warnings,
        survivors=contrast.delta is not None
        and contrast.divergence is not None
        and contrast.divergence.any,
    )


def verdict_role(contrast: Contrast) -> str:
    """How a verdict is coloured."""
    if contrast.verdict == verdict.MATTERS:
        return "worse" if contrast.direction == "worse" else "better"
    return "open" if contrast.verdict == verdict.INCONCLUSIVE else "same"


def verdict_words(contrast: Contrast) -> str:
    """A verdict as the report's tables say it."""
    if contrast.verdict == verdict.MATTERS and contrast.direction:
        return f"matters, {contrast.direction}"
    return contrast.verdict.lower()


def _needs(contrast: Contrast) -> str:
    if contrast.verdict != verdict.INCONCLUSIVE:
        return ""
    if contrast.needs_seeds is None or contrast.needs_seeds > MOST_SEEDS:
        return f"> {MOST_SEEDS}"
    return f"+{contrast.needs_seeds}"
