"""The best cell: by its mean over complete seed blocks, and with what is known against it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from ablate.analysis import verdict
from ablate.analysis.analysis import Contrast, analyze_results
from ablate.analysis.results import Result
from ablate.analysis.scale import objective_of, scale_of
from ablate.analysis.table import CellRow, StudyTable, TrialRow
from ablate.errors import AnalysisError
from ablate.trial import Outcome
from ablate.wording import counted


@dataclass(frozen=True, slots=True)
class Choice:
    """The best cell and how it was found."""

    cell: CellRow
    trial: TrialRow
    """The run of the median seed."""
    score: float
    """Mean over `seeds`, diverged runs at chance."""
    seeds: tuple[int, ...]
    """Blocks that all compared cells have completed."""
    compared: int
    """Cells that were compared."""
    rivals: tuple[str, ...]
    """Cells that are not shown to be worse."""
    over_baseline: Contrast | None
    """None when the baseline itself is chosen, or there is nothing to compare."""
    sentence: str
    warnings: tuple[str, ...]


def choose(table: StudyTable) -> Choice:
    """The cell with the best mean over the seed blocks that all complete cells share.

    Raises:
        AnalysisError: no cell has all its trials scored and one of them completed.
    """
    sign = table.study.objective.sign
    complete = [
        cell
        for cell in table.cells
        if cell.values() and all(row.scored for row in cell.trials) and _scores(cell, table.chance)
    ]
    if not complete:
        raise AnalysisError(
            f"study {table.study.name!r} has no cell whose trials have all ended with a score, so "
            "there is no best one yet. Launch it again to run what is missing."
        )
    shared = set.intersection(*({row.seed for row in cell.trials} for cell in complete))
    if not shared:  # only hand-picked seeds can lead here
        raise AnalysisError("no two cells share a seed, so they cannot be compared; add seeds")
    means = {
        cell.levels: fmean(s for seed, s in _scores(cell, table.chance).items() if seed in shared)
        for cell in complete
    }
    # Of equal means the one with fewer changes is listed first, and max keeps the first.
    best = max(complete, key=lambda cell: sign * means[cell.levels])
    against = _against(table, best, complete, sorted(shared))
    rivals = tuple(name for name, c in against.items() if c.verdict != verdict.MATTERS)
    base = table.baseline
    over = against.get(base.name)
    warnings = []
    left = sum(not cell.trials or not all(r.scored for r in cell.trials) for cell in table.cells)
    if left:
        warnings.append(
            f"{left} of {len(table.cells)} cells have no score for all their seeds and were not "
            "compared"
        )
    if any(row.state == Outcome.DIVERGED for row in best.trials):
        gone = best.count(Outcome.DIVERGED)
        warnings.append(f"{gone} of {len(best.trials)} runs of this setting diverged")
    return Choice(
        cell=best,
        trial=_median(best, sign),
        score=means[best.levels],
        seeds=tuple(sorted(shared)),
        compared=len(complete),
        rivals=rivals,
        over_baseline=over,
        sentence=_sentence(table, best, means[best.levels], sorted(shared), rivals, over),
        warnings=tuple(warnings),
    )


def _scores(cell: CellRow, chance: float | None) -> dict[int, float]:
    """Seed -> score; empty when a run diverged and chance is not known."""
    scores = {}
    for row in cell.trials:
        score = chance if row.state == Outcome.DIVERGED else row.value
        if score is None:
            return {}
        scores[row.seed] = score
    return scores


def _against(
    table: StudyTable, best: CellRow, cells: Sequence[CellRow], seeds: Sequence[int]
) -> dict[str, Contrast]:
    """Every other cell compared with the best one, all at once: name -> contrast."""
    if len(cells) < 2:
        return {}
    results = [
        Result(
            levels=(("cell", cell.name),),
            seed=row.seed,
            outcome=row.state,
            value=row.value,
            trial_id=row.id,
        )
        for cell in cells
        for row in cell.trials
        if row.seed in seeds
    ]
    analysis = analyze_results(results, baseline={"cell": best.name}, objective=objective_of(table))
    return {contrast.level: contrast for contrast in analysis.contrasts}


def _median(cell: CellRow, sign: float) -> TrialRow:
    """The completed run in the middle; of two middle ones the worse."""
    ran = [row for row in cell.trials if row.value is not None]
    ran.sort(key=lambda row: (sign * (row.value or 0.0), row.seed))
    return ran[(len(ran) - 1) // 2]


def _sentence(
    table: StudyTable,
    best: CellRow,
    score: float,
    seeds: Sequence[int],
    rivals: Sequence[str],
    over: Contrast | None,
) -> str:
    scale = scale_of(table.study, ())
    count = counted(len(seeds), "seed")
    text = f"Best: {best.name}, {table.study.objective.metric} {scale.value(score)} over {count}."
    if best is table.baseline:
        text += " No other setting has a better mean."
    elif over is not None and over.verdict == verdict.MATTERS:
        text += " It is shown to be better than the baseline"
        if over.ci is not None:
            low, high = sorted((-over.ci[0], -over.ci[1]))
            text += f" (difference {scale.interval((low, high))} {scale.unit}".rstrip() + ")"
        text += "."
    elif over is not None:
        text += " That it is better than the baseline is not shown: there is no clear winner."
    others = [name for name in rivals if name != "baseline"]
    if others:
        listed = "; ".join(others[:4]) + (f"; {len(others) - 4} more" if len(others) > 4 else "")
        text += f" Not told apart from it: {listed}."
    return text


def choose_cell(table: StudyTable, levels: Mapping[str, str]) -> Choice:
    sign = table.study.objective.sign
    cell = table.cell(levels)
    if cell is None or not cell.values():
        ran = "; ".join(other.name for other in table.cells if other.values())
        raise AnalysisError(
            f"no completed run of the cell {dict(levels)}. Cells with one: {ran or 'none'}"
        )
    scale = scale_of(table.study, ())
    return Choice(
        cell=cell,
        trial=_median(cell, sign),
        score=fmean(cell.values()),
        seeds=tuple(row.seed for row in cell.trials if row.value is not None),
        compared=1,
        rivals=(),
        over_baseline=None,
        sentence=f"As asked: {cell.name}, {table.study.objective.metric} {scale.value(cell.mean)} "
        "over its completed runs.",
        warnings=(),
    )


def with_seed(choice: Choice, seed: int) -> Choice:
    found = [row for row in choice.cell.trials if row.seed == seed and row.value is not None]
    if not found:
        ran = ", ".join(str(row.seed) for row in choice.cell.trials if row.value is not None)
        raise AnalysisError(
            f"{choice.cell.name} has no completed run with seed {seed}; it has {ran}"
        )
    return replace(choice, trial=found[0])
