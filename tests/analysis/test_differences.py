"""What no table of levels lists, and cells without a completed run."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from simulated_studies import run

from ablate.analysis.analysis import analyze_results
from ablate.analysis.differences import differences, steps, whole
from ablate.analysis.results import Objective, Result, tabulate

BASE = dict.fromkeys("abc", "0")
CELLS = [dict(zip("abc", levels, strict=True)) for levels in product("01", repeat=3)]


def without_111(results: list[Result]) -> list[Result]:
    return [
        replace(r, outcome="failed", value=None) if {v for _, v in r.levels} == {"1"} else r
        for r in results
    ]


def test_a_cell_of_a_crossing_without_a_run_is_left_out_with_its_partner_and_said() -> None:
    """2 x 2 x 2, the cell 111 failed in every seed: the effects are averages of the three settings
    left, with the noise of all cells, and the interaction of a and b is judged where c = 0."""
    results = without_111(run(CELLS, seeds=4, sigma=0.3, effects={"a=1,b=1": 2.0}, seed=3))
    analysis = analyze_results(results, baseline=BASE, objective=Objective(margin=0.3))
    a = analysis.contrast("a", "1")
    values = {tuple(v for _, v in r.levels): [] for r in results}
    for r in results:
        if r.value is not None:
            values[tuple(v for _, v in r.levels)].append(r.value)
    mean = {cell: np.mean(seen) for cell, seen in values.items() if seen}
    pairs = [(("1", b, c), ("0", b, c)) for b, c in product("01", repeat=2) if b + c != "11"]
    assert a.delta == pytest.approx(np.mean([mean[up] - mean[down] for up, down in pairs]))
    assert a.why_not_pooled == "" and a.df > 8
    assert any("averaged over 3 of 4 settings" in text for text in a.warnings)
    (shown,) = [i for i in analysis.interactions if i.factors == ("a", "b")]
    assert shown.verdict == "MATTERS"
    assert not any("No interaction" in text for text in analysis.not_estimable)


def test_a_target_is_judged_as_a_whole_and_beyond_the_sum_of_its_changes() -> None:
    """a and b give 1 each and 2 more together: the target is 4 better, 2 beyond the sum."""
    results = run(
        CELLS, seeds=5, sigma=0.1, effects={"a=1": 1.0, "b=1": 1.0, "a=1,b=1": 2.0}, seed=1
    )
    table = tabulate(results)
    base, target = ("0", "0", "0"), ("1", "1", "0")
    total, beyond = differences(table, whole(base, target, [("1", "0", "0"), ("0", "1", "0")]))
    for found, truth in ((total, 4.0), (beyond, 2.0)):
        assert found is not None and found.ci is not None
        assert found.delta == pytest.approx(truth, abs=0.3)
        assert found.ci[0] < truth < found.ci[1] and found.ci[0] > 0


def test_steps_of_a_path_are_judged_one_on_top_of_the_other() -> None:
    """Intervals of all three steps cover the truth together in at least 90 of 100 studies."""
    path = [("0", "0", "0"), ("1", "0", "0"), ("1", "1", "0"), ("1", "1", "1")]
    cells = [dict(zip("abc", cell, strict=True)) for cell in path]
    covered = 0
    for seed in range(100):
        results = run(cells, seeds=4, sigma=0.3, effects={"a=1": 1.0, "c=1": -1.0}, seed=seed)
        found = differences(tabulate(results), steps(path))
        covered += all(
            f is not None and f.ci is not None and f.ci[0] <= truth <= f.ci[1]
            for f, truth in zip(found, (1.0, 0.0, -1.0), strict=True)
        )
    assert covered >= 90
