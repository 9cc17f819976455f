"""Which of its evaluations a run counts with: what each choice gives, and what it tells."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ablate.analysis.course import best_of, values_of, weigh

Rows = list[dict[str, float]]
NUMBERS = st.floats(-10, 10)


@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=8), st.integers(2, 5))
def test_every_choice_gives_what_it_says(points: list[tuple[float, float]], k: int) -> None:
    """The last, the mean of the last k where there are so many, the metric where the other set is
    best; upside down where less is better; what was not measured, or
    nothing can be compared with, counts for nothing."""
    rows: Rows = [{"top1": mine, "val": other} for mine, other in points]
    rows.insert(0, {"val": 99.0})
    rows += [{"top1": float("nan"), "val": 99.0}, {"top1": 1e217, "val": 99.0}]
    mine, others = [p[0] for p in points], [p[1] for p in points]
    for sign, place in ((1.0, others.index(max(others))), (-1.0, others.index(min(others)))):
        found = values_of(rows, metric="top1", k=k, heldout="val", sign=sign)
        assert found["last"] == mine[-1]
        assert found["best_by_heldout"] == mine[place], "the earliest of equals"
        if len(mine) < k:
            assert "mean_last_k" not in found
        else:
            assert found["mean_last_k"] == pytest.approx(sum(mine[-k:]) / k)
    assert best_of(rows, metric="top1", heldout=None, sign=1.0) is None


def studies(count: int, *, share: float) -> list[dict[str, np.ndarray]]:
    """12 cells x 4 seeds, true spread 2, noise 1 of the last evaluation; the noise of the other
    choice has a part `share` in common with it and is as large at 1."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(count):
        truth, block = rng.normal(0, 2, (12, 1)), rng.normal(0, 1, 4)
        one, other = rng.normal(0, 1, (2, 12, 4))
        mixed = share * one + (np.sqrt(1 - share**2) if share == 0.6 else 0.0) * other
        found.append({"last": truth + block + one, "mean_last_k": truth + block + mixed})
    return found


def test_signal_and_noise_are_what_was_planted() -> None:
    """Over 200 studies; a noise half as large is told from the last evaluation's nearly always,
    one as large hardly ever (nominal .05)."""
    equal = [weigh(values) for values in studies(200, share=0.6)]
    assert np.mean([told[0].noise for told in equal]) == pytest.approx(1.0, abs=0.03)
    assert np.mean([told[0].spread for told in equal]) == pytest.approx(2.0, abs=0.1)
    assert np.mean([(told[1].p or 0.0) < 0.05 for told in equal]) <= 0.05 + 3 * 0.0155
    halved = [weigh(values) for values in studies(20, share=0.5)]
    assert all((told[1].p or 0.0) < 0.05 and told[1].ratio > told[0].ratio for told in halved)


def test_too_few_runs_tell_nothing() -> None:
    """Two cells of two seeds have one degree of freedom."""
    assert weigh({"last": np.ones((2, 2)), "mean_last_k": np.ones((2, 2))}) == ()
