"""Which cheap rung predicts a study: verdicts of its rungs, and of early looks at its own runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any

from ablate.analysis.analysis import analyze_results
from ablate.analysis.ladder import Agreement, Verdicts, agree
from ablate.analysis.results import Result
from ablate.errors import AnalysisError
from ablate.records.folder import StudyRecord
from ablate.report.scale import objective_of
from ablate.study import Search, Study
from ablate.study.table import StudyTable, TrialRow, read_table
from ablate.trial.identity import Outcome

EARLY = (0.25, 0.5, 0.75)
"""Shares of a schedule at which a finished study is looked at."""
_WORDS = {2: "half", 3: "a third", 4: "a quarter", 5: "a fifth", 10: "a tenth"}


@dataclass(frozen=True, slots=True)
class Rung:
    """A cheaper way to ask the same."""

    name: str
    cost: float | None
    """Of a run, as a share of a whole one; None where it is not known."""
    found: Agreement


@dataclass(frozen=True, slots=True)
class Ladder:
    """What `ablate ladder` says."""

    study: str
    comparisons: int
    rungs: tuple[Rung, ...]
    sentence: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def read_ladder(
    study: Study, record: StudyRecord, rungs: Iterable[tuple[str, Study, StudyRecord]] = ()
) -> Ladder:
    """Hold the verdicts of rungs, and of early looks at the study's own runs, against its own.

    Raises:
        AnalysisError: the study is a search, or none of its comparisons has been run.
    """
    if isinstance(study.design, Search):
        raise AnalysisError("a search has no fixed comparisons that a rung could predict")
    table = read_table(study, record)
    whole = _verdicts(table, _own(table))
    if not whole:
        raise AnalysisError(f"{study.name} has no result yet; launch it first")
    found = [
        Rung(f"rung {number} ({changes})", _cost(other, table), agree(whole, _verdicts(other, own)))
        for number, (changes, rung, folder) in enumerate(rungs, start=1)
        if (own := _own(other := read_table(rung, folder)))
    ]
    found += _early(table, whole)
    return Ladder(study.name, len(whole), tuple(found), _advise(found))


def _own(table: StudyTable) -> list[Result]:
    return [result for result in table.results if result.levels not in table.added]


def _verdicts(table: StudyTable, results: Sequence[Result]) -> Verdicts:
    base = table.study.compared_baseline()
    if len({result.levels for result in results}) < 2:
        return {}
    found = analyze_results(results, baseline=base, objective=objective_of(table))
    return {(c.factor, c.level): c for c in found.contrasts}


def _cost(rung: StudyTable, whole: StudyTable) -> float | None:
    """Worker-hours of a completed run over those of a whole one."""
    hours = [
        [row.cost.worker_hours for row in table.rows if row.state == Outcome.COMPLETED]
        for table in (rung, whole)
    ]
    if not all(hours) or not fmean(hours[1]):
        return None
    return fmean(hours[0]) / fmean(hours[1])


def _early(table: StudyTable, whole: Verdicts) -> list[Rung]:
    """Looks at the runs themselves on their way: free, but their schedules were not at an end."""
    rows = {row.id: row for row in table.rows}
    found = []
    for share in EARLY:
        values = {name: _at(table, row, share) for name, row in rows.items()}
        if any(value is None for name, value in values.items()
               if rows[name].state == Outcome.COMPLETED):  # fmt: skip
            continue
        results = [
            replace(result, value=values[result.trial_id])
            if result.outcome == Outcome.COMPLETED
            else result
            for result in _own(table)
        ]
        name = f"an early look at {share:.0%} of the schedule"
        found.append(Rung(name, share, agree(whole, _verdicts(table, results))))
    return found


def _at(table: StudyTable, row: TrialRow, share: float) -> float | None:
    """The objective at the last evaluation within a share of a run; None where there was none."""
    metric = table.study.objective.metric
    within = [
        float(found[metric])
        for found in table.record.record(row.id).evaluations()
        if metric in found and found["step"] <= row.step * share
    ]
    return within[-1] if within else None


def _advise(rungs: Sequence[Rung]) -> str:
    if not rungs:
        return "There is no rung, and no run was evaluated on its way."
    if not rungs[0].found.of:
        return "The study itself decides nothing, so no rung can be held against it."
    good = [rung for rung in rungs if rung.found.stands_for_it and (rung.cost or 1.0) < 1.0]
    if not good:
        best = max(rungs, key=lambda rung: rung.found.share)
        return (
            f"No rung gives the same verdict in nine of ten: the best, {best.name}, gives it in "
            f"{best.found.same} of {best.found.of}. Run the whole study."
        )
    use = min(good, key=lambda rung: rung.cost or 1.0)
    low, high = use.found.interval or (0.0, 1.0)
    return (
        f"Use {use.name}: {cost_words(use.cost)} of the cost, the same verdict in {use.found.same} "
        f"of {use.found.of} (95 % interval of the share {low:.0%} to {high:.0%})."
    )


def cost_words(share: float | None) -> str:
    """A share of the cost, for people: ``a fifth``, ``12 %``."""
    if share is None:
        return "an unknown part"
    for parts, word in _WORDS.items():
        if abs(share * parts - 1) <= 0.05:
            return word
    return f"{share:.2g} times" if share > 1 else f"{share:.0%}"
