"""Sentences that people act on: crossovers, confounded effects, divergence, and no learning."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from simulated_studies import one_at_a_time, run

from ablate.analysis.analysis import Analysis, analyze_results
from ablate.analysis.results import Objective, Result

GOAL = Objective("top1", "maximize", margin=0.5, chance=0.0)


def cross(a: dict[tuple[str, str], float], *, sigma: float = 0.2, seeds: int = 5) -> Analysis:
    """A 2 x 2 crossing with these true cell means."""
    rng = np.random.default_rng(3)
    blocks = rng.normal(0, 0.3, seeds)
    results = [
        Result((("A", x), ("B", y)), s, "completed", float(10 + a[x, y] + blocks[s] + e))
        for x, y in product("01", repeat=2)
        for s, e in enumerate(rng.normal(0, sigma, seeds))
    ]
    return analyze_results(results, baseline={"A": "0", "B": "0"}, objective=GOAL)


@pytest.mark.parametrize("alone", [-1.0, 1.0])
def test_no_factor_can_be_set_either_way_over_a_crossover(alone: float) -> None:
    """Where A helps at one level of B and hurts at the other, no average is announced as the
    answer: A depends on B, and its effect at each level is told with an interval."""
    truth = {("0", "0"): 0.0, ("1", "0"): alone, ("0", "1"): 0.0, ("1", "1"): -3 * alone}
    analysis = cross(truth)
    found = analysis.contrast("A", "1")
    assert found.verdict == "DEPENDS" and "depends on B" in found.sentence
    assert "nothing of interest" not in analysis.headline
    assert "depend on each other" in analysis.headline
    told = {s.given: s for s in analysis.simple if s.factor == "A"}
    assert told["B", "0"].ci[0] < alone < told["B", "0"].ci[1]
    assert told["B", "1"].ci[0] < -3 * alone < told["B", "1"].ci[1]


def test_effects_of_one_sign_still_matter() -> None:
    """An interaction that changes only the size of an effect takes no verdict away."""
    analysis = cross({("0", "0"): 0, ("1", "0"): 1, ("0", "1"): 0, ("1", "1"): 4})
    assert analysis.contrast("A", "1").verdict == "MATTERS"


def test_a_confounded_effect_stands_out_and_does_not_matter() -> None:
    """What shares its estimate with pairs of others is never called more than standing out."""
    results = run(
        one_at_a_time({"A": "01", "B": "01"}), seeds=5, sigma=0.1, effects={"A=1": 3.0}, seed=1
    )
    options = {"baseline": {"A": "0", "B": "0"}, "objective": GOAL}
    for extra in ({"partial": {"A": "made by pairs"}}, {"aliases": {"A": ["B x C"]}}):
        analysis = analyze_results(results, **options, **extra)
        found = analysis.contrast("A", "1")
        assert found.verdict == "STANDS_OUT" and "or it is" in found.sentence
        assert "A stands out, alone or through a pair" in analysis.headline


def test_divergence_is_said_in_the_headline() -> None:
    """2 of 2 against 0 of 2 is told with its rates, and lr is not called undecided."""
    results = run(
        one_at_a_time({"lr": "01", "wd": "01"}), seeds=2, sigma=0.1,
        diverged=[("lr=1", 0), ("lr=1", 1)],
    )  # fmt: skip
    analysis = analyze_results(results, baseline={"lr": "0", "wd": "0"}, objective=GOAL)
    assert "lr=1 diverged in 2 of 2 runs (0: 0 of 2)" in analysis.headline
    assert "lr is undecided" not in analysis.headline
    assert "Fisher p = " in analysis.contrast("lr", "1").sentence


def crossing(exploding: bool, seed: int) -> Analysis:
    """lr x warmup x beta2, 18 cells x 3 seeds; every run of lr=2 may diverge."""
    rng = np.random.default_rng(seed)
    blocks = rng.normal(0, 0.003, 3)
    results = []
    for lr, warmup, beta in product("012", "012", "01"):
        for s in range(3):
            value = 0.3 + 0.02 * (warmup == "1") + blocks[s] + rng.normal(0, 0.002)
            gone = exploding and lr == "2"
            results.append(
                Result(
                    (("lr", lr), ("warmup", warmup), ("beta2", beta)), s,
                    "diverged" if gone else "completed", None if gone else float(value),
                )
            )  # fmt: skip
    return analyze_results(
        results,
        baseline={"lr": "0", "warmup": "0", "beta2": "0"},
        objective=Objective("top1", "maximize", margin=0.005, chance=0.001),
    )


def test_one_exploding_level_leaves_the_other_factors_decided() -> None:
    """With a level that diverges in every run the others are judged where it is absent, as often
    and as rightly as without it, and say so."""
    decided = {True: 0, False: 0}
    for exploding, seed in product((True, False), range(20)):
        analysis = crossing(exploding, seed)
        found = {name: analysis.contrast(*name) for name in (("warmup", "1"), ("beta2", "1"))}
        decided[exploding] += sum(c.verdict != "INCONCLUSIVE" for c in found.values())
        assert found["warmup", "1"].verdict == "MATTERS"
        assert found["beta2", "1"].direction is None
        if exploding:
            assert "judged without lr=2" in found["beta2", "1"].warnings[0]
            assert analysis.contrast("lr", "2").verdict == "MATTERS"
    assert decided[True] >= decided[False] - 2


def test_identical_runs_are_called_identical() -> None:
    """A level that changes nothing in any run is not 'worse by 0.0000'."""
    rows = run(one_at_a_time({"a": "01", "b": "01"}), seeds=3, sigma=0.1, effects={"b=1": 1.0})
    base = {r.seed: r.value for r in rows if dict(r.levels) == {"a": "0", "b": "0"}}
    rows = [
        Result(r.levels, r.seed, r.outcome, base[r.seed]) if dict(r.levels)["a"] == "1" else r
        for r in rows
    ]
    found = analyze_results(rows, baseline={"a": "0", "b": "0"}, objective=GOAL).contrast("a", "1")
    assert "identical results in all 3 seeds" in found.sentence and "applied" in found.sentence


def test_nothing_is_equivalent_where_nothing_was_learnt() -> None:
    """At chance, or by the trials' own proof, no level is called equivalent; the headline says it
    first."""
    results = run(one_at_a_time({"a": "01", "b": "01"}), seeds=3, sigma=0.001)
    options = {"baseline": {"a": "0", "b": "0"}}
    goal = Objective("top1", "maximize", margin=0.02, chance=0.18)
    for found in (
        analyze_results(results, objective=goal, **options),
        analyze_results(results, objective=GOAL, unlearnt="no run has learnt", **options),
    ):
        assert {c.verdict for c in found.contrasts} == {"INCONCLUSIVE"}
        assert found.headline.startswith("Nothing was learnt")
    sound = analyze_results(results, objective=GOAL, **options)
    assert {c.verdict for c in sound.contrasts} == {"EQUIVALENT"}


def test_more_than_fifty_seeds_are_never_named() -> None:
    """Beside "> 50" stands what the study can show, and never a number of seeds."""
    for seed in range(30):
        results = run(one_at_a_time({"a": "01", "b": "01", "c": "01"}), seeds=3, sigma=0.01,
                      seed=seed)  # fmt: skip
        goal = Objective("top1", "maximize", margin=0.0002)
        analysis = analyze_results(results, baseline=dict.fromkeys("abc", "0"), objective=goal)
        for c in analysis.contrasts:
            if c.verdict == "INCONCLUSIVE":
                assert c.needs_seeds is None or c.needs_seeds <= 50
                if c.needs_seeds is None:
                    assert "more than 50 more seeds" in c.sentence and "show" in c.sentence
