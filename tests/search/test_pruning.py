"""Pruning that does not mistake a slow start for a bad setting."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from scipy import stats

from ablate.errors import PlanError
from ablate.search.pruning import Decision, Rungs, check_rungs, earliest_rung, false_prunes, gate

WARMUPS = (0.01, 0.04, 0.12)
"""Fractions of the schedule; the longest wins at the end and is last at a tenth."""

Curve = Callable[[float], float]
Run = tuple[float, float, Curve]


def curve(warmup: float, quality: float, rng: np.random.Generator) -> Curve:
    """Score over the schedule: slower with a longer warmup, better at its end."""
    final = 0.18 + 0.15 * warmup + quality + rng.normal(0, 0.001)
    start = 2.5 * warmup
    noise = rng.normal(0, 0.001, size=101)

    def score(fraction: float) -> float:
        risen = 1 - math.exp(-5 * max(fraction - start, 0.0))
        reached = final * risen / (1 - math.exp(-5 * (1 - start)))
        return reached + float(noise[round(100 * fraction)])

    return score


def trials(rng: np.random.Generator, count: int = 36) -> list[Run]:
    """(warmup, quality of the other settings, curve), in random order."""
    drawn = []
    for index in range(count):
        warmup = WARMUPS[index % 3]
        quality = float(rng.normal(0, 0.004))
        drawn.append((warmup, quality, curve(warmup, quality, rng)))
    return [drawn[i] for i in rng.permutation(count)]


def in_parallel(
    runs: list[Run],
    rungs: Sequence[float],
    goes_on: Callable[[int, float, float], bool],
    ends: Callable[[int, float], None],
    rng: np.random.Generator,
) -> tuple[list[int], float]:
    """Train twelve at a time, reaching each rung in random order; who ended, and compute spent."""
    ended: list[int] = []
    spent = 0.0
    for first in range(0, len(runs), 12):
        alive = list(range(first, min(first + 12, len(runs))))
        for rung in rungs:
            rng.shuffle(alive)
            kept = [i for i in alive if goes_on(i, rung, runs[i][2](rung))]
            spent += rung * (len(alive) - len(kept))
            alive = kept
        for i in alive:
            ends(i, runs[i][2](1.0))
        spent += len(alive)
        ended += alive
    return ended, spent


def winner_of_plain_halving(runs: list[Run], rng: np.random.Generator) -> float:
    """Warmup of the best run that asynchronous successive halving (factor 3) lets end."""
    recorded: dict[float, list[float]] = {1 / 9: [], 1 / 3: []}

    def goes_on(_: int, rung: float, score: float) -> bool:
        recorded[rung].append(score)
        return bool(score >= np.percentile(recorded[rung], 100 * (1 - 1 / 3)))

    ended, _ = in_parallel(runs, list(recorded), goes_on, lambda i, score: None, rng)
    return max((runs[i][2](1.0), runs[i][0]) for i in ended)[1]


def run_with_rungs(
    runs: list[Run], rng: np.random.Generator, *, stratified: bool
) -> tuple[list[int], float]:
    """The runs that our rules let end, and the compute spent."""
    rungs = Rungs([0.3, 0.5], warmup_fractions=WARMUPS)

    def goes_on(i: int, rung: float, score: float) -> bool:
        stratum = (("warmup", str(runs[i][0])),) if stratified else ()
        return rungs.report(str(i), stratum, rung, score) != Decision.PRUNE

    return in_parallel(
        runs, rungs.rungs, goes_on, lambda i, score: rungs.finish(str(i), score), rng
    )


@pytest.mark.parametrize("stratified", [True, False])
def test_a_slow_start_is_not_pruned(stratified: bool) -> None:
    """Where plain halving picks the wrong warmup in at least 80 % of 200 searches, we in at most 5.

    Also when nobody said that warmup changes the speed: the rung then does not foretell the end,
    and its gate stays shut.
    """
    right = max(WARMUPS)
    wrong_plain = wrong_ours = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        runs = trials(rng)
        wrong_plain += winner_of_plain_halving(runs, rng) != right
        ended, _ = run_with_rungs(runs, rng, stratified=stratified)
        wrong_ours += max((runs[i][2](1.0), runs[i][0]) for i in ended)[1] != right
    assert wrong_plain >= 160
    assert wrong_ours <= 10


def test_compute_is_saved_where_early_scores_foretell_the_end() -> None:
    """With one warmup, a fifth of the compute is saved and a top-three run is kept."""
    saved, kept = [], 0
    for seed in range(30):
        rng = np.random.default_rng(seed)
        runs = []
        for _ in range(36):
            quality = float(rng.normal(0, 0.01))
            runs.append((0.01, quality, curve(0.01, quality, rng)))
        ended, spent = run_with_rungs(runs, rng, stratified=False)
        saved.append(1 - spent / len(runs))
        finals = sorted(score(1.0) for *_, score in runs)
        kept += max(runs[i][2](1.0) for i in ended) >= finals[-3]
    assert np.mean(saved) >= 0.2
    assert kept >= 29


def test_rungs_before_the_end_of_warmup_are_refused() -> None:
    """The first rung allowed is named, and lies a tenth of the schedule behind every warmup."""
    assert earliest_rung([0.01, 0.2]) == pytest.approx(0.3)
    assert earliest_rung([]) == 0.25
    with pytest.raises(PlanError, match="first rung allowed is 0.30"):
        check_rungs([0.28], [0.2])
    with pytest.raises(PlanError, match="no fraction"):
        check_rungs([500], [0.0])
    check_rungs([0.3, 0.9], [0.2])


def test_a_rung_is_shut_until_eight_runs_agree() -> None:
    """Seven runs in perfect order are too few; eight open it; a shuffled order never does."""
    rng = np.random.default_rng(0)
    order = [float(value) for value in range(12)]
    assert not gate(order[:7], order[:7], rng=rng).open
    assert gate(order[:8], order[:8], rng=rng).open
    shuffled = [float(value) for value in rng.permutation(12)]
    assert not gate(order, shuffled, rng=rng).open
    assert not gate(order, [1.0] * 12, rng=rng).open
    assert not gate([*order[:7], math.nan], order[:8], rng=rng).open


def test_tau_is_kendalls() -> None:
    """The gate's tau, ties included, is scipy's tau-b."""
    rng = np.random.default_rng(3)
    early = rng.integers(0, 6, size=15).astype(float)
    final = early + rng.integers(0, 4, size=15)
    expected = stats.kendalltau(early, final).statistic
    assert gate(early, final, rng=rng).tau == pytest.approx(expected)


def test_a_non_finite_score_is_ended_and_enters_no_threshold() -> None:
    """NaN neither passes a rung, as in a rule that asks "is it worse?", nor moves the rung."""
    rungs = Rungs([0.5], warmup_fractions=[0.0], keep=0.5)
    for number in range(10):
        assert rungs.report(f"good {number}", (), 0.5, float(number)) == Decision.GO_ON
        rungs.finish(f"good {number}", float(number))
    for value in (math.nan, math.inf, -math.inf):
        assert rungs.report(f"bad {value}", (), 0.5, value) == Decision.PRUNE
    assert rungs.gate(0.5).num_runs == 10
    assert rungs.report("next", (), 0.5, 8.5) == Decision.GO_ON


def test_strata_are_judged_apart() -> None:
    """The worst of one level is not ended for being worse than another level's best."""
    rungs = Rungs([0.5], warmup_fractions=[0.0])
    for number in range(60):
        rungs.report(f"fast {number}", (("warmup", "short"),), 0.5, 10.0 + number)
        rungs.finish(f"fast {number}", 10.0 + number)
    assert rungs.gate(0.5).open
    assert rungs.report("slow", (("warmup", "long"),), 0.5, 1.0) == Decision.GO_ON
    worse = [rungs.report(f"n{i}", (("warmup", "short"),), 0.5, 1.0) for i in range(40)]
    assert worse.count(Decision.PRUNE) > 25
    assert 1 <= worse.count(Decision.CANARY) <= 10


def test_canaries_that_win_switch_pruning_off() -> None:
    """When those that would have been ended keep ending among the best, nothing is ended more."""
    rungs = Rungs([0.5], warmup_fractions=[0.0])
    for number in range(200):
        rungs.report(f"run {number}", (), 0.5, float(number))
        rungs.finish(f"run {number}", float(number))
    assert rungs.gate(0.5).open
    canaries = 0
    for number in range(400):
        if not rungs.false_prunes().tolerable:
            break
        if rungs.report(f"late {number}", (), 0.5, -float(number)) == Decision.CANARY:
            canaries += 1
            rungs.finish(f"late {number}", 1000.0 + number)
    assert canaries == 2  # both won; with 95 % confidence that is more than a tenth
    assert not rungs.false_prunes().tolerable
    assert rungs.report("after", (), 0.5, -1000.0) == Decision.GO_ON


def test_the_interval_of_false_prunes_is_exact() -> None:
    """Clopper-Pearson: 0 of 29 has the upper bound 1 - 0.025 ** (1 / 29)."""
    found = false_prunes(0, 29)
    assert found.low == 0.0
    assert found.high == pytest.approx(1 - 0.025 ** (1 / 29))
    assert found.tolerable
    assert not false_prunes(5, 10).tolerable
    assert false_prunes(0, 0) == false_prunes(0, 0)
    assert false_prunes(0, 0).high == 1.0
