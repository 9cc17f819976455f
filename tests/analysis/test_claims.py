"""What a sentence claims is what was shown, and no more."""

from __future__ import annotations

import numpy as np
import pytest
from simulated_studies import Factors, one_at_a_time, run

from ablate.analysis.analysis import analyze_results
from ablate.analysis.recommend import told_apart
from ablate.analysis.results import Objective, tabulate

GOAL = Objective("top1", "maximize", margin=0.5, chance=0.0)
FACTORS: Factors = {f: ["0", "1"] for f in "abcd"}
BASE = dict.fromkeys(FACTORS, "0")


@pytest.mark.parametrize(
    ("effect", "says"), [(0.6, "exceeds the margin of 0.500 is not shown"), (2.0, "is shown")]
)
def test_to_matter_is_not_to_exceed_the_margin(effect: float, says: str) -> None:
    """An estimate just beyond the margin says that it is not shown to lie there; one whose whole
    interval lies beyond it says so."""
    results = run(one_at_a_time(FACTORS), seeds=6, sigma=0.1, effects={"a=1": effect}, seed=2)
    found = analyze_results(results, baseline=BASE, objective=GOAL).contrast("a", "1")
    assert found.verdict == "MATTERS" and says in found.sentence
    assert ("; more than the margin" in found.sentence) == (effect == 2.0)


def test_a_sequential_interval_bears_its_own_confidence() -> None:
    """With a first look half of the error is spent there: its intervals are of 97.5 %."""
    results = run(one_at_a_time(FACTORS), seeds=3, sigma=0.1, effects={"a=1": 2.0}, seed=2)
    analysis = analyze_results(
        results, baseline=BASE, objective=GOAL, is_sequential=True, first_look=3
    )
    found = analysis.contrast("a", "1")
    assert found.confidence == pytest.approx(0.975)
    assert "97.5 % interval" in found.sentence and "(95 % interval" not in found.sentence


@pytest.mark.calibration
def test_the_best_of_equal_cells_is_rarely_said_to_beat_one() -> None:
    """The largest of nine equal means is compared as one that was chosen: in about 5 % of studies
    some cell is said to be worse, where Dunnett's test said so in 13 %; a cell that is really
    worse is still told apart."""
    factors: Factors = {f: ["0", "1"] for f in "abcdefgh"}
    wrong = 0
    for seed in range(200):
        table = tabulate(run(one_at_a_time(factors), seeds=3, sigma=1.0, block=0.5, seed=seed))
        best = table.cells[int(np.nanargmax(table.values.mean(axis=1)))]
        wrong += bool(told_apart(table, table.cells, best))
    assert wrong <= 20  # of 200 at 5 %: more than 20 has a probability of 0.001
    effects = {"a=1": -8.0}
    table = tabulate(run(one_at_a_time(factors), seeds=3, sigma=1.0, effects=effects, seed=1))
    best = table.cells[int(np.nanargmax(table.values.mean(axis=1)))]
    assert "1" in {cell[0] for cell in told_apart(table, table.cells, best)}
