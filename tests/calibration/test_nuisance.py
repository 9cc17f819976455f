"""Why a nuisance is tuned inside every level, and on seeds of its own. Simulated, by the hundred:

    pytest -m calibration -s tests/calibration/test_nuisance.py

The unmarked test is the small part that runs with every suite.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from ablate.analysis.analysis import analyze_results
from ablate.analysis.results import Objective, Result
from ablate.analysis.tuning import Tuned
from ablate.study import Study, design, parse_study

SIGMA, MARGIN = 0.003, 0.005
TEXT = """\
name: nuisance
recipe: openclip
baseline: {model: tiny-rn-a, train_data: t.tar, imagenet_val: val, precision: fp32, lr: 1.0e-3}
factors: {beta2: [0.999, 0.98]}
nuisance: {settings: {lr: [5.0e-4, 1.0e-3, 2.0e-3]}, seeds: [1000]}
seeds: [0, 1, 2, 3, 4, 5, 6, 7]
"""
PEAKED = {"0.0005": -0.03, "0.001": 0.0, "0.002": -0.03}
"""Response to lr of the baseline: its usual value is its best."""
SHIFTED = {"0.0005": 0.0, "0.001": -0.03, "0.002": -0.08}
"""Equal at its own best, which is another lr."""
FLAT = {"0.0005": 0.0, "0.001": 0.0, "0.002": 0.0}
"""Equal, and lr does not matter: the best of three scores is all luck."""


def simulate(study: Study, level: Mapping[str, float], number: int) -> list[Result]:
    """All results of one study; `level` is the response to lr of beta2=0.98."""
    generator = np.random.default_rng(number)
    block = {seed: generator.normal(0, SIGMA) for seed in (*study.seeds, *study.candidates.seeds)}
    known: list[Result] = []
    while True:
        done = {result.trial_id for result in known}
        new = [trial for trial in design.propose(study, known) if trial.id not in done]
        if not new:
            return known
        for trial in sorted(new, key=lambda trial: trial.id):
            levels = dict(trial.cell.levels)
            response = level if levels["beta2"] == "0.98" else PEAKED
            value = 0.2 + response[levels["lr"]] + block[trial.seed] + generator.normal(0, SIGMA)
            known.append(Result(trial.cell.levels, trial.seed, "completed", value, trial.id))


def judge(results: list[Result]) -> tuple[str, float, bool]:
    """Verdict on beta2=0.98, its difference, and whether the interval covers the true one, 0."""
    stripped = [
        Result((("beta2", dict(r.levels)["beta2"]),), r.seed, r.outcome, r.value) for r in results
    ]
    analysis = analyze_results(
        stripped, baseline={"beta2": "0.999"}, objective=Objective("top1", "maximize", MARGIN)
    )
    [found] = analysis.contrasts
    assert found.ci is not None and found.delta is not None
    return found.verdict, found.delta, found.ci[0] <= 0 <= found.ci[1]


def measure(studies: int) -> None:
    study = parse_study(TEXT, path="n.yaml")
    untuned = parse_study(TEXT.replace("nuisance:", "# nuisance:"), path="n.yaml")
    assert not untuned.candidates.levels
    ours, usual = [], []
    for number in range(studies):
        results = simulate(study, SHIFTED, number)
        ours.append(judge(design.settled(study, results)))
        generator = np.random.default_rng(10_000 + number)
        usual.append(
            judge(
                [
                    Result(
                        (("beta2", level),), seed, "completed",
                        0.2 + size + float(generator.normal(0, SIGMA)),
                    )
                    for seed in study.seeds
                    for level, size in (("0.999", 0.0), ("0.98", SHIFTED["0.001"]))
                ]
            )
        )  # fmt: skip
    blamed = np.mean([verdict == "MATTERS" for verdict, *_ in usual])
    wrongly = np.mean([verdict == "MATTERS" for verdict, *_ in ours])
    covered = np.mean([inside for *_, inside in ours])
    same = np.mean([verdict == "EQUIVALENT" for verdict, *_ in ours])
    print(
        f"\nequal at its own best lr, {studies} studies: at the usual lr called worse "
        f"{blamed:.3f}; tuned: called different {wrongly:.3f}, equivalent {same:.3f}, "
        f"interval covers {covered:.3f}"
    )
    assert blamed >= 0.95
    assert wrongly <= 0.06
    assert covered >= 0.95 - 4 * np.sqrt(0.05 * 0.95 / studies)
    assert same >= 0.5

    reused, fresh = [], []
    for number in range(studies):
        results = simulate(study, FLAT, 50_000 + number)
        scores = {
            cell: design.tune(study, study.cell({"beta2": cell}), results).scores
            for cell in ("0.999", "0.98")
        }
        best = {cell: max(s for s in found if s is not None) for cell, found in scores.items()}
        reused.append(best["0.98"] - best["0.999"])
        fresh.append(judge(design.settled(study, results))[1])
    error = float(np.std(fresh) / np.sqrt(studies))
    print(
        "equal, lr without effect: mean difference of the scores that chose "
        f"{np.mean(reused):+.5f}, of fresh seeds {np.mean(fresh):+.5f} (+-{error:.5f}); "
        "the truth is 0"
    )
    assert np.mean(reused) > 0.5 * SIGMA, "the best of three noisy scores is too good"
    assert abs(np.mean(fresh)) <= 4 * error


def test_a_level_that_needs_another_lr_is_judged_at_its_own_best() -> None:
    """At the usual lr an equal level is called worse; tuned it is not, and fresh seeds are needed:
    the scores that chose are too good (100 studies)."""
    measure(100)


@pytest.mark.calibration
@pytest.mark.timeout(1800)
def test_a_thousand_nuisance_studies() -> None:
    """The same in 1,000 studies."""
    measure(1000)


def equal_levels_tuned(
    studies: int, *, curvature: float, seeds: int, tuning_seeds: int
) -> tuple[float, float]:
    """Share of studies with a false difference between four levels that are equal at every
    setting, without and with what tuning may have lost. Units: standard deviations of a run."""
    generator = np.random.default_rng([int(100 * curvature), seeds, tuning_seeds])
    response = -curvature * (np.arange(5) - 2.0) ** 2
    plain, ours = [], []
    for _ in range(studies):
        scores = response + generator.standard_normal((4, 5)) / np.sqrt(tuning_seeds)
        means = response[scores.argmax(axis=1)]
        values = means[:, None] + generator.standard_normal((4, seeds))
        results = [
            Result(
                tuple((f"f{j}", "1" if i == j + 1 else "0") for j in range(3)), seed, "completed",
                float(value),
            )
            for i, row in enumerate(values)
            for seed, value in enumerate(row)
        ]  # fmt: skip
        tuned = {
            (f"f{j}", "1"): Tuned(list(scores[j + 1]), list(scores[0]), tuning_seeds)
            for j in range(3)
        }
        for told, found in ((None, plain), (tuned, ours)):
            analysis = analyze_results(
                results, baseline=dict.fromkeys(("f0", "f1", "f2"), "0"),
                objective=Objective("top1", "maximize", 0.5), tuned=told,
            )  # fmt: skip
            found.append(any(c.verdict == "MATTERS" for c in analysis.contrasts))
    return float(np.mean(plain)), float(np.mean(ours))


@pytest.mark.calibration
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("curvature", [0.25, 0.5, 1.0])
def test_tuning_on_few_seeds_makes_few_false_differences(curvature: float) -> None:
    """Equal levels, five candidates, the pick on one or three seeds: a false difference in at most
    .15 of studies of 8 seeds, where without the allowance it is up to .4."""
    for seeds, tuning_seeds in ((3, 1), (8, 1), (8, 3)):
        plain, ours = equal_levels_tuned(
            250, curvature=curvature, seeds=seeds, tuning_seeds=tuning_seeds
        )
        print(
            f"\ncurvature {curvature}, {seeds} seeds, {tuning_seeds} tuning seeds: "
            f"without the allowance {plain:.3f}, with it {ours:.3f}"
        )
        assert ours <= 0.15
