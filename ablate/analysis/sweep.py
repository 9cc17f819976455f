"""What a search says beside its cells: which factors went with good scores, and what it ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ablate.analysis.results import Result
from ablate.analysis.table import StudyTable
from ablate.errors import AnalysisError
from ablate.study import Search
from ablate.trial import Outcome


@dataclass(frozen=True, slots=True)
class Sweep:
    """Exploratory shares of a search's factors."""

    note: str
    """How they were computed and what they cannot say; or why there are none."""
    shares: tuple[tuple[str, float, int], ...]
    """(factor, share of the variation, cells ended early off its baseline), largest first."""
    num_cells: int
    num_pruned: int
    pruning: tuple[str, ...]
    """How the rungs stood, a line each."""


def sweep_of(table: StudyTable) -> Sweep | None:
    """The importances of a search; None for other designs and before anything has ended."""
    study = table.study
    if not isinstance(study.design, Search) or not table.results:
        return None
    from ablate.search import importances  # the sampler's engine; only a search's report needs it

    def score(result: Result) -> float | None:
        return table.chance if result.outcome == Outcome.DIVERGED else result.value

    complete = _complete(table)
    try:
        found = importances(study, complete, score=score)
    except AnalysisError as error:
        return Sweep(str(error), (), 0, 0, table.pruning)
    note = (
        f"Share of the score's variation over {found.num_cells} cells by Optuna's fANOVA. "
        "Exploratory: the sampler looked where it expected good scores, so the cells are no fair "
        "sample, and there is no interval."
    )
    if found.num_pruned:
        note += f" The {found.num_pruned} cells that were ended early have no score and no part."
    return Sweep(
        note,
        tuple((f, share, found.pruned_off_baseline[f]) for f, share in found.shares.items()),
        found.num_cells,
        found.num_pruned,
        table.pruning,
    )


def _complete(table: StudyTable) -> Sequence[Result]:
    """Results of cells whose every seed has ended: means of different seeds differ by luck."""
    whole = {cell.levels for cell in table.cells if all(row.ended for row in cell.trials)}
    return [result for result in table.results if result.levels in whole]
