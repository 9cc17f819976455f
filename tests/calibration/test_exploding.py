"""One level that explodes in every run costs the other factors nothing.

pytest -m calibration -s tests/calibration/test_exploding.py
"""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from simulated_studies import run

from ablate.analysis.analysis import analyze_results
from ablate.analysis.results import Objective

MARGIN = 0.005
FACTORS = {"lr": ["1", "3", "10"], "warmup": ["0", "1"], "beta2": ["0", "1", "2"]}
BASE = {"lr": "1", "warmup": "0", "beta2": "0"}


def simulate(studies: int, *, explodes: bool) -> tuple[float, float, float]:
    """(share of decided comparisons of the others, false differences, wrong EQUIVALENT), a 3 x 2 x
    3 crossing with lr=10 run and diverging, or not run."""
    lrs = FACTORS["lr"] if explodes else FACTORS["lr"][:2]
    cells = [
        dict(zip(FACTORS, levels, strict=True))
        for levels in product(lrs, FACTORS["warmup"], FACTORS["beta2"])
    ]
    decided, false, wrong = [], [], []
    for number in range(studies):
        results = run(
            cells, seeds=4, sigma=0.006, seed=number,
            effects={"warmup=1": 0.006, "beta2=2": MARGIN},
            diverged=[("lr=10", seed) for seed in range(4)],
        )  # fmt: skip
        analysis = analyze_results(
            results, baseline=BASE, objective=Objective("top1", "maximize", MARGIN, chance=0.01)
        )
        for factor, level in (("warmup", "1"), ("beta2", "1"), ("beta2", "2")):
            c = analysis.contrast(factor, level)
            decided.append(c.verdict != "INCONCLUSIVE")
            if (factor, level) == ("beta2", "1"):
                false.append(c.direction is not None)
            else:
                wrong.append(c.verdict in ("EQUIVALENT", "NEGLIGIBLE"))
    return float(np.mean(decided)), float(np.mean(false)), float(np.mean(wrong))


def compare(studies: int) -> tuple[float, float]:
    with_it, without = simulate(studies, explodes=True), simulate(studies, explodes=False)
    print(
        f"\n{studies} studies: decided {with_it[0]:.3f} with an exploding level, {without[0]:.3f} "
        f"without; false differences {with_it[1]:.3f}, {without[1]:.3f}; wrong EQUIVALENT "
        f"{with_it[2]:.3f}, {without[2]:.3f}"
    )
    assert max(with_it[1:]) <= 0.06 + 3 * np.sqrt(0.05 * 0.95 / studies)
    return with_it[0], without[0]


def test_an_exploding_level_hides_no_other_answer() -> None:
    """25 studies: the other factors are decided about as often as where it was not run."""
    with_it, without = compare(25)
    assert abs(with_it - without) <= 0.2


@pytest.mark.calibration
@pytest.mark.timeout(1800)
def test_an_exploding_level_costs_at_most_three_points() -> None:
    """300 studies: the others are decided as often, within 3 points."""
    with_it, without = compare(300)
    assert abs(with_it - without) <= 0.03
