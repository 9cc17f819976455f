"""Whatever a study's results look like, they are analysed without a crash, a warning or a NaN."""

from __future__ import annotations

import json
from itertools import product

import numpy as np
import pytest

from ablate.analysis.analysis import analyze_results
from ablate.analysis.results import OUTCOMES, Objective, Result


def any_results(generator: np.random.Generator) -> tuple[dict[str, str], list[Result]]:
    """A baseline and results with gaps, all outcomes, shared ids, and numbers of any kind."""
    count = int(generator.integers(1, 5))
    factors = {f"f{i}": [str(j) for j in range(generator.integers(1, 5))] for i in range(count)}
    base = dict.fromkeys(factors, "0")
    cells = [dict(zip(factors, names, strict=True)) for names in product(*factors.values())]
    generator.shuffle(cells)
    cells = cells[: generator.integers(1, 15)]
    if base not in cells and generator.random() < 0.8:
        cells.insert(0, base)
    scale, digits = [(1, 9), (1, 2), (1, 0), (1e-9, 20), (1e9, 9)][generator.integers(5)]
    results = []
    for i, cell in enumerate(cells):
        for seed in range(int(generator.integers(1, 7))):
            if generator.random() < 0.1:
                continue
            outcome = "completed" if generator.random() < 0.8 else str(generator.choice(OUTCOMES))
            value = round(scale * float(generator.normal(0.2, 0.01)), digits)
            results.append(
                Result(
                    tuple(cell.items()), seed, outcome, value if outcome == "completed" else None,
                    f"{i // 2}-{seed}" if generator.random() < 0.1 else "",
                )
            )  # fmt: skip
    return base, results


@pytest.mark.parametrize(
    "part", [0, *(pytest.param(part, marks=pytest.mark.exhaustive) for part in (1, 2, 3))]
)
def test_any_study_can_be_analysed(part: int) -> None:
    """Strict JSON, a sentence for every contrast, intervals that contain their estimate, and
    simultaneous ones that are not narrower."""
    generator = np.random.default_rng(part)
    for _ in range(40):
        base, results = any_results(generator)
        if not results:
            continue
        objective = Objective(
            "m",
            str(generator.choice(["maximize", "minimize"])),
            [None, 0.005, 0.0][generator.integers(3)],
            [None, 0.001][generator.integers(2)],
            bool(generator.integers(2)),
        )
        analysis = analyze_results(
            results,
            baseline=base,
            objective=objective,
            adjustment=str(generator.choice(["dunnett", "holm", "none"])),
            is_sequential=bool(generator.integers(2)),
            first_look=[None, 2, 3][generator.integers(3)],
            estimand=str(generator.choice(["auto", "simple", "additive"])),
        )
        json.dumps(analysis.to_dict(), allow_nan=False)
        for contrast in analysis.contrasts:
            assert contrast.sentence and "nan" not in contrast.sentence
            if contrast.ci is None or contrast.delta is None:
                continue
            assert contrast.ci[0] <= contrast.delta <= contrast.ci[1]
            if contrast.ci_adjusted is not None:
                width = contrast.ci[1] - contrast.ci[0]
                assert contrast.ci_adjusted[1] - contrast.ci_adjusted[0] >= width * (1 - 1e-9)
