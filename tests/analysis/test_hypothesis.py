"""What was expected beforehand, held against what the runs show."""

from __future__ import annotations

import pytest
from simulated_studies import Factors, one_at_a_time, run

from ablate.analysis.analysis import analyze_results
from ablate.analysis.hypothesis import Expectation, hold_against
from ablate.analysis.results import Objective
from ablate.errors import StudyError
from ablate.study import parse_study

FACTORS: Factors = {"a": ["0", "1"], "b": ["0", "1"], "c": ["0", "1", "2"]}
BASE = dict.fromkeys(FACTORS, "0")
OBJECTIVE = Objective("loss", "minimize", 0.005)


def held(expected: list[Expectation], effects: dict[str, float], seed: int = 0) -> list[str]:
    results = run(one_at_a_time(FACTORS), seeds=4, sigma=0.003, effects=effects, seed=seed)
    analysis = analyze_results(results, baseline=BASE, objective=OBJECTIVE)
    found = hold_against(expected, analysis.contrasts, OBJECTIVE, is_sequential=False)
    return [finding.found for finding in found]


def test_each_expectation_is_confirmed_contradicted_or_open() -> None:
    """A loss that falls is better; a factor named alone speaks of each of its levels."""
    expected = [
        Expectation("a", "1", "better"), Expectation("b", "1", "better"),
        Expectation("c", None, "equivalent"),
    ]  # fmt: skip
    assert held(expected, {"a=1": -0.03, "b=1": 0.03, "c=2": 0.03}) == [
        "confirmed", "contradicted", "confirmed", "contradicted",
    ]  # fmt: skip


@pytest.mark.calibration
def test_a_named_side_is_tested_on_that_side_with_five_percent_for_all() -> None:
    """Two levels without any effect, both expected to be better: confirmed in at most one study of
    ten (nominal .05, 200 studies); a real effect is confirmed at least as often as it is found."""
    expected = [Expectation("a", "1", "better"), Expectation("b", "1", "better")]
    false = sum("confirmed" in held(expected, {}, seed) for seed in range(200))
    assert false <= 20
    small = {"a=1": -0.007}
    sided = found = 0
    for seed in range(60):
        sided += held(expected[:1], small, seed) == ["confirmed"]
        results = run(one_at_a_time(FACTORS), seeds=4, sigma=0.003, effects=small, seed=seed)
        contrast = analyze_results(results, baseline=BASE, objective=OBJECTIVE).contrast("a", "1")
        found += contrast.direction == "better"
    assert sided >= found > 0


TEXT = """\
name: h
recipe: openclip
baseline: {model: tiny-rn-a, train_data: t.tar, imagenet_val: val, precision: fp32, beta2: 0.999}
factors: {beta2: [0.999, 0.98]}
seeds: [0, 1]
"""


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("hypothesis: {beta1: better}", "beta1.*is not a factor"),
        ("hypothesis: {beta2=0.9: better}", "is no level of beta2"),
        ("hypothesis: {beta2=0.999: worse}", "baseline's own level"),
        ("hypothesis: {beta2=0.98: faster}", "better"),
    ],
)
def test_expectations_of_nothing_are_refused(line: str, words: str) -> None:
    """A wrong factor, level or word is named with what is allowed."""
    with pytest.raises(StudyError, match=words):
        parse_study(TEXT + line + "\n", path="h.yaml")
    study = parse_study(TEXT + "hypothesis: {beta2=0.98: better}\n", path="h.yaml")
    assert study.hypothesis == (Expectation("beta2", "0.98", "better"),)
