"""What a study can show: the noise between its seeds, and the smallest difference it resolves."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ablate.analysis import anytime, effects, power
from ablate.analysis.contrasts import ALPHA
from ablate.analysis.results import Result, tabulate
from ablate.study import LeaveOneOut, Search, Study, design
from ablate.trial.identity import Cell, Levels


def too_few_seeds(study: Study, num_cells: int) -> list[str]:
    """A seed count with which nothing can be shown, however large the effect."""
    if isinstance(study.design, Search):
        return []
    if study.sequential is None:
        n = len(study.seeds)
        if math.isfinite(power.critical(n, cells=max(num_cells, 2))):
            return []
        return [
            f"{n} seed cannot show any difference, however large: there is nothing to measure "
            "noise with. Two give intervals, three or more useful ones"
        ]
    n, questions = study.sequential.max, max(num_cells - 1, 1)
    half = anytime.anytime_half_width(
        1.0, (max(num_cells, 2) - 1) * (n - 1), n, alpha=ALPHA / 2 / questions
    )
    if math.isfinite(half):
        return []
    return [
        f"{n} seeds at most cannot show any difference after the first look: an interval that is "
        f"valid at every look is still without end for {questions} comparisons. Raise seeds.max"
    ]


def detectable_of(study: Study, sigma: float | None, num_cells: int) -> tuple[float | None, str]:
    """The minimum detectable effect of a contrast with the baseline, pooled over cells."""
    n = study.sequential.min if study.sequential else len(study.seeds)
    if isinstance(study.design, Search):
        return None, "what a search resolves, its model tells from how its cells scatter"
    if n < 2 or num_cells < 2:
        return None, "one seed cannot show any difference: there is nothing to measure noise with"
    asked = num_cells - 1
    if not isinstance(study.design, LeaveOneOut):
        asked = min(asked, sum(len(f.distinct()) - 1 for f in study.compared))
    value = power.mde(n, sigma=sigma or 1.0, contrasts=max(asked, 1), cells=num_cells)
    if not math.isfinite(value):
        return None, "these seeds cannot show any difference"
    return value, study.objective.metric if sigma else "standard deviations of one run"


def resolution_of(
    study: Study, cells: Sequence[Cell], detectable: float | None
) -> tuple[tuple[str, str, float], ...]:
    """`detectable` for each contrast, by the share of the noise that its weights leave."""
    if detectable is None or isinstance(study.design, (Search, LeaveOneOut)):
        return ()
    names = {factor.name for factor in study.compared}
    table = tabulate(
        Result(tuple(pair for pair in cell.levels if pair[0] in names), 0, "completed", 0.0)
        for cell in cells
    )
    base = study.baseline_levels()
    reference = tuple(base[factor] for factor in table.factors)
    estimand = "auto" if design.fraction(study) is None else "additive"
    found = []
    for factor in table.factors:
        for level in table.levels(factor):
            if level == base[factor]:
                continue
            weights = effects.compare(table, reference, factor, level, estimand=estimand).weights
            size = float(weights @ weights)
            if size > 0:  # one cell against another: 2
                found.append((factor, level, detectable * math.sqrt(size / 2)))
    return tuple(found)


def noise_of(ended: Sequence[Result]) -> float | None:
    """Upper 80 % bound of the standard deviation between seeds, pooled over the ended cells.

    None below two degrees of freedom.
    """
    values: dict[Levels, list[float]] = {}
    for result in ended:
        if result.value is not None:
            values.setdefault(result.levels, []).append(result.value)
    repeated = [group for group in values.values() if len(group) > 1]
    freedom = sum(len(group) - 1 for group in repeated)
    if freedom < 2:
        return None
    squares = sum((len(group) - 1) * float(np.var(group, ddof=1)) for group in repeated)
    return power.sigma_upper(math.sqrt(squares / freedom), freedom) or None
