"""What a study asks, and the answer to each question as rows of a table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ablate.analysis import verdict
from ablate.analysis.analysis import Analysis, Contrast, analyze_results
from ablate.analysis.differences import Difference, differences, steps, whole
from ablate.analysis.results import Result, tabulate
from ablate.analysis.sentences import Scale as SentenceScale
from ablate.analysis.sentences import diverges_alike, was_seen
from ablate.analysis.tuning import Tuned
from ablate.analysis.verdict import MOST_SEEDS
from ablate.errors import AnalysisError
from ablate.report.aliases import main_aliases, partial_aliases
from ablate.report.learning import nothing_learnt
from ablate.report.path import walked
from ablate.report.scale import NONE, Scale, objective_of, probability
from ablate.study import (
    AblationPath,
    FractionalFactorial,
    LeaveOneOut,
    Observed,
    PlackettBurman,
    Search,
    Study,
    design,
)
from ablate.study.table import StudyTable, name_settings
from ablate.trial.identity import Levels
from ablate.words import name_seeds

OBSERVED = (
    "These runs were made elsewhere, and no plan gave settings to runs: a difference may come from "
    "whatever else was changed between them (code, data, machine, the day), those that were given "
    "up may be missing, and whoever looked before choosing what to run next makes the best look "
    "too good. No two runs are paired. Take a difference as a reason to ask, and ask it as a study."
)
"""What is said above every comparison of runs that were imported."""


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
    if isinstance(study.design, Search):
        return _after_search(table, study.design)
    listed = isinstance(study.design, (FractionalFactorial, PlackettBurman))
    # What was run to confirm a combination was chosen by these results, and joins no comparison.
    own = [result for result in table.results if result.levels not in table.added]
    found = _judge(table, own, base, "additive" if listed else "auto")
    if found is None:
        return ()
    note = OBSERVED if isinstance(study.design, Observed) else tuned
    if isinstance(study.design, AblationPath):
        note = f"{tuned} {along_the_path(table)}".strip()
    return (Question("baseline", "Against the baseline", note, "the baseline", found),)


def along_the_path(table: StudyTable) -> str:
    """Every step of the path that has been run, against the cell before it."""
    run = walked(table)
    if len(run) < 2:
        return ""
    own = [result for result in table.results if result.levels not in table.added]
    cells = [tuple(level for _, level in cell.levels) for _, cell in run]
    scale = SentenceScale.of(objective_of(table), [], None)
    said = "; ".join(
        f"{name} {_with_interval(found, scale)}"
        for (name, _), found in zip(run[1:], differences(tabulate(own), steps(cells)), strict=True)
    )
    return (
        f"Step by step, each on top of those before: {said}. The intervals hold for all steps "
        "together; the order was found on the same runs, so a step's gain is a little too large."
    )


def _with_interval(found: Difference | None, scale: SentenceScale) -> str:
    if found is None:
        return "without a result"
    if found.ci is None:
        return scale.signed(found.delta)
    return f"{scale.signed(found.delta)} ({scale.interval(found.ci)})"


def _after_search(table: StudyTable, search: Search) -> tuple[Question, ...]:
    """What followed a search; its own cells are answered by :mod:`ablate.report.sweep`."""
    study = table.study
    target = design.winner(study, table.results)
    if search.then != "leave_one_out" or target is None:
        return ()
    picked = (
        f"The target, {study.change_name(target)}, is the best cell that the search found on these "
        "same seeds, so part of its lead is luck. "
    )
    return _leave_one_out(table, target, note=picked)


def _leave_one_out(
    table: StudyTable, target: Mapping[str, str], *, note: str = ""
) -> tuple[Question, ...]:
    base = table.study.compared_baseline()
    target = {**base, **target}
    reverted, added = design.both_ways(base, target)
    asked = []
    together = _as_a_whole(table, base, target, added[1:])
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
        ("added", "Each change made alone", together, added, base, "the baseline"),
    ):
        wanted = {tuple(levels.items()) for levels in cells}
        mine = [result for result in table.results if result.levels in wanted]
        found = _judge(table, mine, reference, "simple")
        if found is not None:
            asked.append(Question(key, title, words, against, found))
    return tuple(asked)


def _as_a_whole(
    table: StudyTable,
    base: Mapping[str, str],
    target: Mapping[str, str],
    alone: Sequence[Mapping[str, str]],
) -> str:
    """The target against the baseline, and whether it is more than the sum of its changes."""
    cells = [tuple(levels.values()) for levels in (base, target, *alone)]
    names = {tuple(levels.items()) for levels in (base, target, *alone)}
    mine = [result for result in table.results if result.levels in names]
    if not mine:
        return ""
    scale = SentenceScale.of(objective_of(table), [], None)
    total, beyond = differences(tabulate(mine), whole(cells[0], cells[1], cells[2:]))
    if total is None:
        return ""
    text = f"The target as a whole against the baseline: {_with_interval(total, scale)}. "
    if beyond is not None and len(alone) > 1:
        text += (
            f"Beyond the sum of its changes made alone: {_with_interval(beyond, scale)}; both "
            "intervals hold together. "
        )
    return f"{text}Each of the two tables of this study has its own 5 % for false differences."


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
            is_exploratory=isinstance(study.design, (Search, Observed)),
            estimand=estimand,
            aliases=main_aliases(study),
            partial=partial_aliases(study),
            unlearnt=nothing_learnt(table),
            tuned=_tuning(table, reference),
        )
    except AnalysisError:
        if results:
            raise
        return None


def _tuning(table: StudyTable, reference: Mapping[str, str]) -> dict[tuple[str, str], Tuned]:
    """(factor, level) -> how it and the reference were tuned, of single changes."""
    study = table.study
    known: dict[Levels, tuple[float, ...]] = {}
    for row in table.tuning:
        if row.best is not None:
            levels = study.compared_levels(row.candidates[row.best].levels)
            sign = study.objective.sign
            known[levels] = tuple(math.nan if s is None else sign * s for s in row.scores)
    usual = known.get(tuple(reference.items()))
    if usual is None:
        return {}
    found = {}
    for levels, scores in known.items():
        changed = [(name, level) for name, level in levels if reference[name] != level]
        if len(changed) == 1:
            found[changed[0]] = Tuned(scores, usual, len(study.candidates.seeds))
    return found


def _tuning_note(study: Study) -> str:
    if not study.candidates.levels:
        return ""
    names = " and ".join(factor.name for factor in study.nuisance)
    tuned, own = study.candidates.seeds, study.seeds
    return (
        f"Each level stands at its own best {names}, the best of the same "
        f"{len(study.candidates.levels)} candidates on {name_seeds(tuned)}. The choice is not "
        f"judged by the runs that made it: what is compared are new runs on {name_seeds(own)}. The "
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
    if contrast.verdict == verdict.STANDS_OUT:
        return "better" if contrast.direction == "better" else "worse"
    return "open" if contrast.verdict in (verdict.INCONCLUSIVE, verdict.DEPENDS) else "same"


def verdict_words(contrast: Contrast) -> str:
    """A verdict as the report's tables say it."""
    if contrast.identical:
        return "identical"
    if contrast.verdict == verdict.MATTERS and contrast.direction:
        return f"matters, {contrast.direction}"
    if contrast.verdict == verdict.STANDS_OUT:
        return f"stands out, {contrast.direction}"
    return contrast.verdict.lower()


def _needs(contrast: Contrast) -> str:
    if contrast.verdict != verdict.INCONCLUSIVE or diverges_alike(contrast):
        return ""
    if contrast.identical or not was_seen(contrast):
        return ""
    if contrast.needs_seeds is None or contrast.needs_seeds > MOST_SEEDS:
        return f"> {MOST_SEEDS}"
    return f"+{contrast.needs_seeds}"
