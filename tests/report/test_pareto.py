"""Score against cost: a front of what is shown, not of luck."""

from __future__ import annotations

import numpy as np

from ablate.analysis.results import Result, tabulate
from ablate.report.pareto import pareto_front, shown_front


def fronts(studies: int, means: list[float]) -> tuple[list[int], list[int]]:
    """Cells on the front of the numbers and on the shown one; the cost rises from cell to cell."""
    generator = np.random.default_rng(1)
    plain, shown = [], []
    names = [(str(i),) for i in range(len(means))]
    for _ in range(studies):
        y = np.array(means)[:, None] + generator.standard_normal((len(means), 3))
        known = tabulate(
            Result((("cell", name),), seed, "completed", float(value))
            for (name,), row in zip(names, y, strict=True)
            for seed, value in enumerate(row)
        )
        merits = [(-float(cost), float(row.mean())) for cost, row in enumerate(y)]
        plain.append(sum(pareto_front(merits)))
        shown.append(sum(shown_front(known, names, merits)))
    return plain, shown


def test_cells_of_equal_score_make_a_front_of_one() -> None:
    """9 cells, equal but for their cost: the numbers alone put more than one on the front in nine
    of ten studies, what is shown in at most one of ten."""
    plain, shown = fronts(100, [0.0] * 9)
    assert np.mean(np.array(plain) > 1) > 0.8
    assert np.mean(np.array(shown) > 1) <= 0.1


def test_a_clearly_better_dearer_cell_stays_on_the_front() -> None:
    """Two of four cells are better by ten standard deviations each step: three on the front."""
    _, shown = fronts(20, [0.0, 0.0, 10.0, 20.0])
    assert np.mean(np.array(shown) == 3) >= 0.9
