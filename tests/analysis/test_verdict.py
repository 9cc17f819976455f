"""Verdicts on crafted studies: what must be said, and what must never be said."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from simulated_studies import Factors, one_at_a_time, run

from ablate.analysis import verdict
from ablate.analysis.analysis import Analysis, analyze_results
from ablate.analysis.results import Objective, Result

FACTORS: Factors = {"warmup": ["10k", "2k"], "beta2": ["999", "99", "98"], "lr": ["1", "5"]}
BASE = {factor: levels[0] for factor, levels in FACTORS.items()}
OBJECTIVE = Objective("imagenet_top1", "maximize", 0.005, chance=0.001, percent=True)


def judged(results: list[Result], *, objective: Objective = OBJECTIVE) -> Analysis:
    analysis = analyze_results(results, baseline=BASE, objective=objective)
    json.dumps(analysis.to_dict(), allow_nan=False)
    return analysis


def exactly(values: dict[str, list[float | None]]) -> list[Result]:
    """Results with these values; the key is the changed level, "" the baseline's; None diverged."""
    results = []
    for key, column in values.items():
        cell = BASE | dict([key.split("=")] if key else [])
        for seed, value in enumerate(column):
            outcome = "diverged" if value is None else "completed"
            results.append(Result(tuple(cell.items()), seed, outcome, value))
    return results


@pytest.mark.parametrize(
    ("different", "inside", "delta", "word"),
    [
        (True, False, 0.02, "MATTERS"),
        (True, True, 0.002, "NEGLIGIBLE"),
        (False, True, 0.002, "EQUIVALENT"),
        (False, False, 0.002, "INCONCLUSIVE"),
        (True, False, 0.004, "INCONCLUSIVE"),
    ],
)
def test_the_table_of_verdicts(different: bool, inside: bool, delta: float, word: str) -> None:
    """Difference shown x inside the margin shown gives the verdict."""
    assert verdict.judge(delta, different=different, inside=inside, margin=0.005) == word


def test_four_verdicts_and_their_sentences() -> None:
    """A planted gain, a planted trifle and idle levels are told apart in words."""
    results = run(
        one_at_a_time(FACTORS), seeds=12, sigma=0.002,
        effects={"warmup=2k": 0.02, "beta2=98": 0.0027}, seed=3,
    )  # fmt: skip
    analysis = judged(results)
    warmup, trifle = analysis.contrast("warmup", "2k"), analysis.contrast("beta2", "98")
    idle = analysis.contrast("lr", "5")
    assert (warmup.verdict, warmup.direction) == ("MATTERS", "better")
    assert trifle.verdict == "NEGLIGIBLE"
    assert idle.verdict == "EQUIVALENT"
    assert "2k is better than 10k: +2." in warmup.sentence and "12 seeds" in warmup.sentence
    assert "margin of 0.50 points" in trifle.sentence
    assert "equivalent within the margin" in idle.sentence
    assert analysis.headline == "warmup matters; beta2, lr change nothing of interest."


def test_one_seed_gives_differences_without_a_verdict() -> None:
    """n = 1: no interval, INCONCLUSIVE, and a plain sentence that asks for seeds."""
    analysis = judged(run(one_at_a_time(FACTORS), seeds=1, sigma=0.01))
    for contrast in analysis.contrasts:
        assert contrast.verdict == "INCONCLUSIVE"
        assert contrast.ci is None and contrast.p is None and contrast.delta is not None
        assert contrast.needs_seeds == 2
        assert "1 seed only" in contrast.sentence
    assert analysis.importances == ()


def test_two_seeds_are_enough_for_a_pooled_interval() -> None:
    """n = 2: all cells together tell the noise; each pair alone has one degree of freedom."""
    analysis = judged(run(one_at_a_time(FACTORS), seeds=2, sigma=0.002, effects={"lr=5": -0.05}))
    contrast = analysis.contrast("lr", "5")
    assert 2 < contrast.df <= 4 and contrast.method == "two-way, cells' own noise"
    assert (contrast.verdict, contrast.direction) == ("MATTERS", "worse")


def test_a_large_p_is_never_called_no_effect() -> None:
    """Noise far above the margin leaves everything undecided, with the number of seeds to run."""
    analysis = judged(run(one_at_a_time(FACTORS), seeds=3, sigma=0.03))
    for contrast in analysis.contrasts:
        assert contrast.verdict == "INCONCLUSIVE"
        assert contrast.needs_seeds is None or contrast.needs_seeds > 0
        assert "no effect" not in contrast.sentence.lower()
        assert "undecided" in contrast.sentence


def test_survivors_do_not_make_a_diverging_level_look_good() -> None:
    """5 of 8 runs diverge, the other 3 beat the baseline: the averages of survivors would call it
    better; it must be judged worse."""
    results = run(
        one_at_a_time(FACTORS), seeds=8, sigma=0.002, effects={"lr=5": 0.03},
        diverged=[("lr=5", s) for s in range(5)],
    )  # fmt: skip
    contrast = judged(results).contrast("lr", "5")
    assert contrast.delta is not None and contrast.delta > 0.02
    assert contrast.p is not None and contrast.p < 0.05
    assert (contrast.verdict, contrast.direction) == ("MATTERS", "worse")
    assert contrast.basis == "divergence"
    assert contrast.diverged == (5, 8)
    assert contrast.divergence is not None and contrast.divergence.composite_delta is not None
    assert contrast.divergence.composite_delta < -0.05
    assert "diverged in 5 of 8" in contrast.sentence and "survivors only" in contrast.sentence


def test_one_divergence_neither_condemns_nor_equates() -> None:
    """1 of 5 diverged and the survivors look alike: undecided, never EQUIVALENT."""
    results = run(one_at_a_time(FACTORS), seeds=5, sigma=0.0005, diverged=[("lr=5", 2)])
    analysis = judged(results)
    contrast = analysis.contrast("lr", "5")
    assert contrast.verdict == "INCONCLUSIVE"
    assert "diverged in 1 of 5" in contrast.sentence
    assert analysis.contrast("warmup", "2k").verdict == "EQUIVALENT"


def test_worse_survivors_and_a_divergence_agree() -> None:
    """Survivors far below the baseline settle the matter even if one divergence could not."""
    results = run(
        one_at_a_time(FACTORS), seeds=5, sigma=0.002, effects={"lr=5": -0.05},
        diverged=[("lr=5", 2)],
    )  # fmt: skip
    contrast = judged(results).contrast("lr", "5")
    assert (contrast.verdict, contrast.direction, contrast.basis) == (
        "MATTERS", "worse", "difference",
    )  # fmt: skip


def test_a_baseline_that_always_diverges_is_beaten() -> None:
    """No difference can be formed; the divergence counts alone give the verdict."""
    results = run(
        one_at_a_time(FACTORS), seeds=4, sigma=0.002,
        diverged=[("warmup=10k,beta2=999,lr=1", s) for s in range(4)],
    )  # fmt: skip
    analysis = judged(results)
    contrast = analysis.contrast("warmup", "2k")
    assert contrast.delta is None and contrast.ci is None
    assert (contrast.verdict, contrast.direction) == ("MATTERS", "better")
    assert any("compared with diverged in 4 of 4" in w for w in analysis.warnings)


def test_one_lost_baseline_run_does_not_cost_every_verdict() -> None:
    """The baseline diverged once: a level that is clearly better and never diverged is still found,
    an idle one is not called equivalent."""
    results = run(
        one_at_a_time(FACTORS), seeds=4, sigma=0.002, effects={"warmup=2k": 0.02},
        diverged=[("warmup=10k,beta2=999,lr=1", 1)],
    )  # fmt: skip
    analysis = judged(results)
    better, idle = analysis.contrast("warmup", "2k"), analysis.contrast("lr", "5")
    assert (better.verdict, better.direction) == ("MATTERS", "better")
    assert better.method == "two-way, cells' own noise" and better.n == 3
    assert "diverged in 0 of 4" in better.sentence
    assert idle.verdict == "INCONCLUSIVE"


def test_failed_runs_are_missing_not_results() -> None:
    """Crashes and lost machines neither count as divergence nor enter a mean."""
    results = run(one_at_a_time(FACTORS), seeds=4, sigma=0.002)
    lost = [Result(r.levels, r.seed, "failed") if i in (4, 9) else r for i, r in enumerate(results)]
    removed = [r for i, r in enumerate(results) if i not in (4, 9)]
    assert [c.ci for c in judged(lost).contrasts] == [c.ci for c in judged(removed).contrasts]
    assert judged(lost).contrasts[0].diverged == (0, 3)


def test_an_infeasible_level_says_so() -> None:
    """A level that ran out of memory in every seed has no difference, and the reason is given."""
    results = [
        Result(r.levels, r.seed, "infeasible") if dict(r.levels)["lr"] == "5" else r
        for r in run(one_at_a_time(FACTORS), seeds=3, sigma=0.002)
    ]
    contrast = judged(results).contrast("lr", "5")
    assert contrast.verdict == "INCONCLUSIVE" and contrast.delta is None
    assert "3 of its runs infeasible" in contrast.sentence


def test_seeds_that_change_nothing_allow_no_verdict() -> None:
    """Identical values in all seeds are copies, not replicates."""
    analysis = judged(exactly({"": [0.2] * 3, "lr=5": [0.25] * 3, "warmup=2k": [0.2] * 3}))
    assert {c.verdict for c in analysis.contrasts} == {"INCONCLUSIVE"}
    assert "seeds do not reach the training" in analysis.warnings[0]


def test_a_constant_difference_over_varying_seeds_counts() -> None:
    """Zero residual variance with live seeds: the difference is shown, with a warning."""
    seeds = [0.2, 0.21, 0.19]
    contrast = judged(
        exactly({"": seeds, "lr=5": [x + 0.03 for x in seeds], "warmup=2k": seeds})
    ).contrast("lr", "5")
    assert (contrast.verdict, contrast.direction) == ("MATTERS", "better")


def test_everything_diverged_or_nothing_ran_is_still_an_analysis() -> None:
    """Degenerate studies give sentences, not tracebacks."""
    nothing = judged(exactly({"": [None, None], "lr=5": [None, None]}))
    assert nothing.contrast("lr", "5").verdict == "INCONCLUSIVE"
    assert nothing.best is None
    alone = judged(exactly({"": [0.2, 0.21]}))
    assert alone.contrasts == () and alone.noise.sigma_seed == pytest.approx(0.00707, abs=1e-4)
    no_baseline = judged(exactly({"lr=5": [0.2, 0.21]}))
    assert no_baseline.contrast("lr", "5").estimand == "missing"


def test_divergence_on_both_sides_alike_is_no_reason() -> None:
    """Where as many runs diverge with a level as without it, the sentence says that this tells
    nothing, and no number of seeds is named; survivors within the margin are told as that."""
    gone = judged(exactly({"": [None, None], "lr=5": [None, None]})).contrast("lr", "5")
    assert "both diverge alike, in 2 of 2 and 2 of 2 runs, and no seed is left" in gone.sentence
    seeds = [0.20, 0.21, 0.19, 0.20, 0.21, 0.19, 0.2]
    near = [x + 0.0001 * (-1) ** i for i, x in enumerate(seeds)]
    some = judged(exactly({"": [*seeds, None], "lr=5": [*near, None], "warmup=2k": [*seeds, 0.2]}))
    found = some.contrast("lr", "5")
    assert found.verdict == "INCONCLUSIVE"
    assert "both diverge alike, in 1 of 8 and 1 of 8 runs" in found.sentence
    assert "(7 seeds, within the margin of" in found.sentence
    for sentence in (gone.sentence, found.sentence):
        assert "more seeds" not in sentence and "probability" not in sentence


def test_two_sides_at_chance_are_not_equivalent() -> None:
    """Also where a third setting has learnt: equal scores of runs that learnt nothing say
    nothing."""
    seeds = [0.180, 0.181, 0.179]
    analysis = judged(
        exactly({"": seeds, "lr=5": seeds[::-1], "warmup=2k": [x + 0.1 for x in seeds]}),
        objective=replace(OBJECTIVE, chance=0.18),
    )
    found = analysis.contrast("lr", "5")
    assert found.verdict == "INCONCLUSIVE" and "neither is shown to be better" in found.sentence
    assert analysis.contrast("warmup", "2k").verdict == "MATTERS"


def test_best_is_a_stable_cell() -> None:
    """The best cell never diverged, even if its rival's survivors score higher."""
    analysis = judged(exactly({"": [0.2, 0.21], "lr=5": [0.4, None], "warmup=2k": [0.23, 0.25]}))
    assert analysis.best == BASE | {"warmup": "2k"}


@pytest.mark.calibration
def test_permuting_labels_within_seeds_gives_uniform_p() -> None:
    """Under the null the raw p of a contrast is uniform (Kolmogorov-Smirnov over 300 studies)."""
    from scipy import stats

    p = []
    for seed in range(300):
        found = analyze_results(
            run(one_at_a_time(FACTORS), seeds=3, sigma=0.003, seed=seed),
            baseline=BASE, objective=OBJECTIVE,
        ).contrasts[0].p  # fmt: skip
        assert found is not None
        p.append(found)
    assert stats.kstest(p, "uniform").pvalue > 0.001


def test_noise_is_recovered() -> None:
    """sigma_seed, sigma_residual and rho come back from a large study, inside their intervals."""
    factors: Factors = {f: ["0", "1", "2"] for f in "abcde"}
    results = run(one_at_a_time(factors), seeds=30, sigma=0.004, block=0.003)
    noise = analyze_results(
        results, baseline=dict.fromkeys("abcde", "0"), objective=OBJECTIVE
    ).noise
    assert noise.sigma_residual == pytest.approx(0.004, rel=0.1)
    assert noise.sigma_seed == pytest.approx(np.hypot(0.004, 0.003), rel=0.2)
    assert noise.sigma_seed_ci is not None
    assert noise.sigma_seed_ci[0] < 0.005 < noise.sigma_seed_ci[1]
    assert noise.rho == pytest.approx(0.36, abs=0.2)


def test_verdicts_do_not_depend_on_the_unit() -> None:
    """Percent instead of fractions, another origin, another order of runs: the same verdicts."""
    results = run(
        one_at_a_time(FACTORS), seeds=4, sigma=0.002, effects={"warmup=2k": 0.02},
        diverged=[("lr=5", 1)],
    )  # fmt: skip
    moved = [
        Result(r.levels, r.seed, r.outcome, None if r.value is None else 7 + 100 * r.value)
        for r in reversed(results)
    ]
    one = judged(results, objective=Objective("m", "maximize", 0.005))
    two = judged(moved, objective=Objective("m", "maximize", 0.5))
    for c in one.contrasts:
        other = two.contrast(c.factor, c.level)
        assert (c.verdict, c.direction, c.needs_seeds) == (
            other.verdict, other.direction, other.needs_seeds,
        )  # fmt: skip
        assert c.p_adjusted == pytest.approx(other.p_adjusted, rel=1e-6)
        assert c.ci is not None and other.ci is not None
        assert other.ci == pytest.approx([100 * x for x in c.ci], rel=1e-6)


def test_minimising_mirrors_maximising() -> None:
    """Negated values with the direction turned give the same verdicts and directions."""
    results = run(
        one_at_a_time(FACTORS), seeds=5, sigma=0.002, effects={"warmup=2k": 0.02},
        diverged=[("lr=5", s) for s in range(4)],
    )  # fmt: skip
    mirrored = [
        Result(r.levels, r.seed, r.outcome, None if r.value is None else -r.value) for r in results
    ]
    up = judged(results)
    down = judged(mirrored, objective=Objective("loss", "minimize", 0.005, chance=-0.001))
    assert [(c.verdict, c.direction) for c in up.contrasts] == [
        (c.verdict, c.direction) for c in down.contrasts
    ]
    assert up.best == down.best
