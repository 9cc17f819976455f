"""What a difference may owe to rounding or to tuning is not shown as the level's own."""

from __future__ import annotations

import numpy as np
import pytest

from ablate.analysis.analysis import analyze_results
from ablate.analysis.results import Objective, Result
from ablate.analysis.tuning import Tuned, possible_loss


def two_cells(scores: dict[str, list[float]]) -> list[Result]:
    return [
        Result((("lr", level),), seed, "completed", value)
        for level, values in scores.items()
        for seed, value in enumerate(values)
    ]


def test_equal_differences_on_few_images_prove_nothing() -> None:
    """12 images, 2 seeds, no effect: the same difference in both seeds happens in one study of
    eight and says nothing; at most 5 % of 400 studies may call it one."""
    generator = np.random.default_rng(0)
    goal = Objective("top1", "maximize", images=12)
    false = 0
    for _ in range(400):
        right = generator.binomial(12, 0.5, (2, 2)) / 12
        (found,) = analyze_results(
            two_cells({"1": list(right[0]), "2": list(right[1])}), baseline={"lr": "1"},
            objective=goal,
        ).contrasts  # fmt: skip
        false += found.direction is not None
        assert found.ci is None or found.ci[1] > found.ci[0]
    assert false <= 20


TUNED = Tuned(level=(0.20, 0.21, 0.19), reference=(0.20, 0.18, 0.205), seeds=1)


@pytest.mark.parametrize(("gain", "verdict"), [(0.012, "INCONCLUSIVE"), (0.2, "MATTERS")])
def test_a_difference_that_tuning_may_have_made_is_not_the_levels(
    gain: float, verdict: str
) -> None:
    """Both sides tuned on one noisy seed: a small sure difference is undecided, and the sentence
    says what would help; one beyond anything tuning could lose stays."""
    generator = np.random.default_rng(4)
    scores = {
        "1": list(0.2 + 0.01 * generator.standard_normal(12)),
        "2": list(0.2 + gain + 0.01 * generator.standard_normal(12)),
    }
    options = {"baseline": {"lr": "1"}, "objective": Objective("top1", "maximize", 0.001)}
    plain = analyze_results(two_cells(scores), **options).contrasts[0]  # type: ignore[arg-type]
    tuned = analyze_results(
        two_cells(scores),
        **options,
        tuned={("lr", "2"): TUNED},  # type: ignore[arg-type]
    ).contrasts[0]
    assert plain.verdict == "MATTERS"
    assert tuned.verdict == verdict
    assert ("tune on more seeds" in tuned.sentence) == (verdict == "INCONCLUSIVE")


def test_more_tuning_seeds_lose_less() -> None:
    """The possible loss falls with the tuning seeds, and is none where noise is none."""
    scores = (0.0, 0.5, 1.0, 0.4, -0.2)
    lost = [possible_loss(scores, 0.5, seeds) for seeds in (1, 3, 9)]
    assert lost[0] > lost[1] > lost[2] >= 0
    assert possible_loss(scores, 0.0, 1) == 0
    assert possible_loss((0.1, float("nan")), 0.5, 1) == float("inf")
