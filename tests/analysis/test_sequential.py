"""Looking after every block: validity of the e-process, and which cells get the next seeds."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from simulated_studies import Factors, one_at_a_time, run

from ablate.analysis import anytime
from ablate.analysis.analysis import analyze_results
from ablate.analysis.results import Objective
from ablate.analysis.sequential import open_levels

FACTORS: Factors = {"warmup": ["10k", "2k"], "beta2": ["999", "99", "98"], "lr": ["1", "5"]}
BASE = {factor: levels[0] for factor, levels in FACTORS.items()}
OBJECTIVE = Objective("top1", "maximize", 0.005)


def growing_t(effect: float, *, studies: int, most: int = 30) -> np.ndarray:
    """t statistic [study, n - 2] of growing samples, n = 2..most."""
    x = np.random.default_rng(3).normal(effect, 1, (studies, most))
    n = np.arange(2, most + 1)
    mean = x.cumsum(1)[:, 1:] / n
    variance = ((x**2).cumsum(1)[:, 1:] - n * mean**2) / (n - 1)
    t: np.ndarray = mean / np.sqrt(variance / n)
    return t


def test_looking_after_every_seed_keeps_the_error() -> None:
    """Over n = 2..30 the e-process rejects a null in < 5 % of studies, repeated t in > 20 %."""
    t = growing_t(0.0, studies=1500)
    n = np.arange(2, 31)
    e = np.array([[anytime.log_e(x, k - 1, k) for x, k in zip(row, n, strict=True)] for row in t])
    assert (e.max(axis=1) >= math.log(20)).mean() <= 0.05
    repeated = (2 * stats.t.sf(np.abs(t), n - 1) < 0.05)[:, 1:].any(axis=1).mean()
    assert repeated > 0.2


def test_confidence_sequence_is_the_inverted_test() -> None:
    """The half-width is where the evidence reaches 1/alpha exactly."""
    for df, information in ((4, 5.0), (16, 3.0), (40, 7.5)):
        half = anytime.anytime_half_width(0.7, df, information)
        assert anytime.anytime_p(half / 0.7, df, information) == pytest.approx(0.05)
    assert anytime.anytime_half_width(1.0, 1, 2.0) == math.inf


def test_confidence_sequence_has_its_simulated_width() -> None:
    """Half-widths in sd of a difference at n = 4, 5, 6, 10, as simulated independently."""
    widths = [anytime.anytime_half_width(1 / math.sqrt(n), n - 1, n) for n in (4, 5, 6, 10)]
    assert widths == pytest.approx([3.6, 2.4, 1.9, 1.26], abs=0.06)


def test_only_open_cells_get_more_seeds() -> None:
    """A huge effect and tight equivalences are closed, the borderline level stays open."""
    results = run(
        one_at_a_time(FACTORS), seeds=6, sigma=0.0012,
        effects={"warmup=2k": 0.05, "beta2=98": 0.005}, seed=1,
    )  # fmt: skip
    found = open_levels(results, baseline=BASE, objective=OBJECTIVE)
    assert found == {tuple((BASE | {"beta2": "98"}).items())}


def test_sequential_intervals_are_wider_and_say_so() -> None:
    """The price of looking: the confidence sequence contains the fixed-n interval."""
    results = run(one_at_a_time(FACTORS), seeds=5, sigma=0.002)
    fixed = analyze_results(results, baseline=BASE, objective=OBJECTIVE)
    always = analyze_results(results, baseline=BASE, objective=OBJECTIVE, is_sequential=True)
    for one, two in zip(fixed.contrasts, always.contrasts, strict=True):
        assert one.ci is not None and two.ci is not None
        assert two.ci[0] < one.ci[0] and one.ci[1] < two.ci[1]
        assert two.method == "confidence sequence"


def test_what_the_first_look_decides_stays_decided() -> None:
    """Clear levels are judged on the first three seeds with half the error, whatever comes later;
    the rest on the confidence sequence of all seeds."""
    results = run(
        one_at_a_time(FACTORS), seeds=6, sigma=0.002,
        effects={"warmup=2k": 0.05, "beta2=98": 0.004}, seed=2,
    )  # fmt: skip
    analysis = analyze_results(
        results, baseline=BASE, objective=OBJECTIVE, is_sequential=True, first_look=3
    )
    clear, close = analysis.contrast("warmup", "2k"), analysis.contrast("beta2", "98")
    assert (clear.verdict, clear.n) == ("MATTERS", 6), "the estimate is of all seeds"
    assert "decided at 3 seeds" in clear.warnings[0]
    assert (close.method, close.n) == ("confidence sequence", 6)
    three = [r for r in results if r.seed < 3]
    fixed = analyze_results(three, baseline=BASE, objective=OBJECTIVE).contrast("warmup", "2k")
    assert clear.p_adjusted == pytest.approx(2 * (fixed.p_adjusted or 0), rel=1e-6)
    assert clear.delta != fixed.delta, "the first look's estimate is inflated by having decided"
    assert clear.confidence == 0.975 and "97.5 % interval" in clear.sentence
    assert clear.sentence.startswith("2k is better than 10k")
    open_now = open_levels(results, baseline=BASE, objective=OBJECTIVE, first_look=3)
    assert tuple((BASE | {"warmup": "2k"}).items()) not in open_now


@settings(max_examples=25)
@given(
    first=st.integers(2, 4), effect=st.floats(-0.03, 0.03), spread=st.floats(0.001, 0.01),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_a_study_that_ended_at_its_first_look_says_what_that_look_decided(
    first: int, effect: float, spread: float, seed: int
) -> None:
    """No seed is added where nothing is open, so the report must not call it open; and its
    sentences are of its verdicts."""
    results = run(
        one_at_a_time(FACTORS), seeds=first, sigma=spread, effects={"warmup=2k": effect}, seed=seed
    )
    found = analyze_results(
        results, baseline=BASE, objective=OBJECTIVE, is_sequential=True, first_look=first
    )
    open_now = open_levels(results, baseline=BASE, objective=OBJECTIVE, first_look=first)
    assert {tuple((BASE | {f: level}).items()) for f, level in found.undecided()} == open_now
    for contrast in found.contrasts:
        undecided = contrast.verdict == "INCONCLUSIVE"
        assert ("undecided" in contrast.sentence) == undecided
