"""Adding seeds block by block, only where the answer is still open (`until: decided`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

from ablate.analysis import effects
from ablate.analysis.analysis import analyze_results
from ablate.analysis.results import Objective, Result, tabulate


class Question(Protocol):
    """What a study file says about its objective."""

    @property
    def metric(self) -> str: ...
    @property
    def direction(self) -> str: ...
    @property
    def margin(self) -> float | None: ...


def open_levels(
    results: Iterable[Result],
    *,
    baseline: Mapping[str, str],
    objective: Question,
    first_look: int | None = None,
    estimand: str = "auto",
) -> frozenset[tuple[tuple[str, str], ...]]:
    """The cells, as in `Result.levels`, that take part in a contrast more seeds could decide.

    Ask after each complete block of seeds and run the next one for these cells and the baseline.
    Intervals stay valid however often one looks; the final report must say `is_sequential=True`
    and give the same `first_look` (the study's smallest number of seeds).
    """
    rows = list(results)
    analysis = analyze_results(
        rows,
        baseline=baseline,
        objective=Objective(objective.metric, objective.direction, objective.margin),
        is_sequential=True,
        is_running=True,
        first_look=first_look,
        estimand=estimand,
    )
    table = tabulate(rows)
    reference = tuple(baseline[factor] for factor in table.factors)
    home = table.shared.get(reference)
    found: set[tuple[tuple[str, str], ...]] = set()
    for factor, level in analysis.undecided():
        comparison = effects.compare(table, reference, factor, level, estimand=estimand)
        for row in (*comparison.level_rows, *comparison.reference_rows):
            if table.cells[row] != home:
                found.add(tuple(zip(table.factors, table.cells[row], strict=True)))
    return frozenset(found)
