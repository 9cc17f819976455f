"""What is said of one factor of a sweep."""

from __future__ import annotations

import numpy as np
import pytest

from ablate.analysis.axes import Axis
from ablate.analysis.sweep import MOVED, NOTHING, OPEN, Effect, Estimate
from ablate.report.scale import Scale
from ablate.report.sweep_words import effect_row

LEVELS = Axis("beta2", levels=("0.9", "0.98", "0.999"), is_ordered=True)


def effect(verdict: str, span: Estimate) -> Effect:
    mean = np.array([0.2, 0.2 + span.mean, 0.19])
    return Effect(
        axis=LEVELS,
        verdict=verdict,
        span=span,
        nodes=LEVELS.nodes,
        mean=mean,
        low=mean - 0.01,
        high=mean + 0.01,
        good=(False, True, False),
        points=(),
        best=1,
        worst=2,
    )


@pytest.mark.parametrize(
    ("verdict", "span", "says"),
    [
        (MOVED, Estimate(0.02, 0.01, 0.03), "It moves the score by 2.00 points (1.00 to 3.00)"),
        (OPEN, Estimate(0.02, 0.001, 0.04), "more than the margin is open"),
        (OPEN, Estimate(0.02, -0.01, 0.04), "neither shown nor ruled out"),
        (NOTHING, Estimate(0.001, -0.001, 0.003), "less than the margin: choose freely"),
    ],
)
def test_a_factor_is_said_to_do_what_its_interval_shows(
    verdict: str, span: Estimate, says: str
) -> None:
    """A movement that excludes zero is called one, whether or not it is known to reach the margin;
    one that does not is called neither an effect nor none."""
    row = effect_row(effect(verdict, span), (), (LEVELS,), Scale(percent=True, decimals=2))
    assert says in row.sentence
    assert ("moves the score" in row.sentence) == (span.low > 0)
