"""Simulated studies by the thousand: do the promises hold? On demand:

    pytest -m calibration tests/calibration

Each test prints what it measured (pytest -s). The unmarked tests are the small part that runs
with every suite. Measured with 9 cells, noise 0.6 of the margin (1000 studies; from the seventh
row on with one noise for all cells, and where marked * 400 studies or fewer):

    null, 2/3/5/8 seeds      coverage .963 .965 .953 .958, familywise error .020 .031 .044 .046
    effects at the margin    called EQUIVALENT .033 .049 .045 (3/5/8 seeds)
    power, measured/forecast .620/.632 .535/.554 .239/.252
    the same for EQUIVALENT  .211/.243 .592/.603 .891/.882
    interaction of 4 sigma   found .926, invented .053
    survivors 4 sigma better called better .000, worse .944; their averages say better in .694
    divergence at random     accuses a level in .023 to .051 (3 seeds), .000 to .065 (5 seeds *)
    seeds until decided      familywise error .000, wrong EQUIVALENT .013, 76-84 % of the runs *
    importances              covered .963 .967 (3/5 seeds); resampled seed blocks .701 .829
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
import pytest
from scipy import stats
from simulated_studies import Factors, one_at_a_time, run

from ablate.analysis import power
from ablate.analysis.analysis import Analysis, Contrast, analyze_results
from ablate.analysis.results import Objective, Result
from ablate.analysis.sequential import open_levels

STUDIES = 1000
MARGIN = 0.005
SIGMA = 0.003
FACTORS: Factors = {"a": "012", "b": "012", "c": "012", "d": "01", "e": "01"}
BASE = dict.fromkeys(FACTORS, "0")
OBJECTIVE = Objective("top1", "maximize", MARGIN, chance=0.001)
Effects = Mapping[str, float]


_task: Callable[[int], Any] | None = None


def studies(task: Callable[[int], Any], count: int) -> list[Any]:
    """task(0), task(1), ... on two cores; in this process when there are few."""
    global _task
    if count < 200:
        return [task(number) for number in range(count)]
    _task = task  # children are forked, so that a task may be a closure
    with multiprocessing.get_context("fork").Pool(2) as pool:
        return pool.map(_call, range(count), chunksize=20)


def _call(number: int) -> Any:
    assert _task is not None
    return _task(number)


def analyze(results: list[Result], *, first_look: int | None = None) -> Analysis:
    return analyze_results(
        results,
        baseline=BASE,
        objective=OBJECTIVE,
        is_sequential=first_look is not None,
        first_look=first_look,
    )


@dataclass
class Tally:
    """What came of many studies with known true effects (by "factor=level"; 0 when absent)."""

    effects: Effects
    covered: list[bool] = field(default_factory=list)
    false_alarm: list[bool] = field(default_factory=list)
    wrong_equivalent: list[bool] = field(default_factory=list)
    matters: dict[str, list[bool]] = field(default_factory=dict)
    equivalent: dict[str, list[bool]] = field(default_factory=dict)

    def add(self, analysis: Analysis) -> None:
        alarm = False
        for c in analysis.contrasts:
            name = f"{c.factor}={c.level}"
            true = self.effects.get(name, 0.0)
            if c.ci is not None:
                self.covered.append(c.ci[0] <= true <= c.ci[1])
            alarm |= true == 0 and c.direction is not None
            if abs(true) >= MARGIN:
                self.wrong_equivalent.append(c.verdict in ("EQUIVALENT", "NEGLIGIBLE"))
            self.matters.setdefault(name, []).append(c.verdict == "MATTERS")
            self.equivalent.setdefault(name, []).append(c.verdict == "EQUIVALENT")
        self.false_alarm.append(alarm)

    def show(self, title: str) -> None:
        wrong = f"{np.mean(self.wrong_equivalent):.3f}" if self.wrong_equivalent else "-"
        print(
            f"\n{title}: {len(self.false_alarm)} studies, coverage {np.mean(self.covered):.3f}, "
            f"familywise error {np.mean(self.false_alarm):.3f}, wrong EQUIVALENT {wrong}"
        )


def simulate(
    count: int, seeds: int, *, effects: Effects | None = None, first: int = 0, **options: object
) -> Tally:
    def one(study: int) -> Analysis:
        return analyze(
            run(
                one_at_a_time(FACTORS), seeds=seeds, sigma=SIGMA, effects=effects or {},
                seed=first + study, **options,  # type: ignore[arg-type]
            )
        )  # fmt: skip

    tally = Tally(effects or {})
    for analysis in studies(one, count):
        tally.add(analysis)
    return tally


def test_small_part_of_the_calibration() -> None:
    """150 studies: nothing is far off (limits are 4 standard errors from the nominal values)."""
    tally = simulate(150, 3, effects={"a=1": MARGIN, "b=1": -0.02})
    tally.show("small part")
    assert np.mean(tally.covered) >= 0.90
    assert np.mean(tally.false_alarm) <= 0.05 + 4 * 0.018
    assert np.mean(tally.wrong_equivalent) <= 0.05 + 4 * 0.013
    assert np.mean(tally.matters["b=1"]) >= 0.9


@pytest.mark.calibration
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seeds", [2, 3, 5, 8])
def test_null_studies(seeds: int) -> None:
    """Nothing is planted: intervals cover in 93-97 %, a factor is accused in at most 6 % of studies
    (up to the simulation's own error of two standard errors)."""
    tally = simulate(STUDIES, seeds, first=10_000 * seeds)
    tally.show(f"null, {seeds} seeds")
    slack = 2 * np.sqrt(0.05 * 0.95 / STUDIES)
    assert 0.93 <= np.mean(tally.covered) <= 0.97
    assert np.mean(tally.false_alarm) <= 0.05 + slack


@pytest.mark.calibration
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seeds", [3, 5, 8])
def test_planted_studies(seeds: int) -> None:
    """Effects exactly at the margin, the worst case, are called EQUIVALENT in at most 6 %; large
    ones are found."""
    effects = {"a=1": MARGIN, "b=1": -MARGIN, "c=1": 1.5 * MARGIN, "d=1": 0.02}
    tally = simulate(STUDIES, seeds, effects=effects, first=10_000 * seeds + 5000)
    tally.show(f"planted, {seeds} seeds")
    at_margin = [*tally.equivalent["a=1"], *tally.equivalent["b=1"]]
    print(f"EQUIVALENT at the margin itself: {np.mean(at_margin):.3f}")
    assert 0.93 <= np.mean(tally.covered) <= 0.97
    assert np.mean(at_margin) <= 0.06
    assert np.mean(tally.wrong_equivalent) <= 0.06
    assert np.mean(tally.false_alarm) <= 0.06
    assert np.mean(tally.matters["d=1"]) >= 0.99


@pytest.mark.calibration
@pytest.mark.timeout(1800)
def test_power_is_as_forecast() -> None:
    """The share of studies that find a planted effect is within 5 points of `detection_power`,
    and the share that find equivalence within 5 points of `equivalence_power`."""
    for seeds, effect in ((3, 0.009), (5, 0.006), (8, 0.004)):
        tally = simulate(STUDIES, seeds, effects={"a=1": effect}, first=777_000 + 10_000 * seeds)
        # MATTERS: shown to differ, and the estimate reaches the margin; the rarer of the two.
        reaches = float(stats.norm.sf((MARGIN - effect) / (SIGMA * np.sqrt(2 / seeds))))
        differs = power.detection_power(seeds, effect, sigma=SIGMA, contrasts=8, cells=9)
        forecast = min(differs, reaches)
        found = np.mean(tally.matters["a=1"])
        same = np.mean([np.mean(tally.equivalent[name]) for name in ("b=1", "c=2", "e=1")])
        hoped = power.equivalence_power(seeds, MARGIN, sigma=SIGMA, cells=9)
        print(
            f"\n{seeds} seeds, effect {effect}: found {found:.3f}, forecast {forecast:.3f}; "
            f"equivalent {same:.3f}, forecast {hoped:.3f}"
        )
        assert found == pytest.approx(forecast, abs=0.05)
        assert same == pytest.approx(hoped, abs=0.05)


@pytest.mark.calibration
@pytest.mark.timeout(1800)
def test_interactions_are_found_and_not_invented() -> None:
    """2 x 3 crossing, 4 seeds: a planted interaction of 4 sigma is found in over 90 %, none is
    seen in at least 94 % of additive studies."""
    cells = [dict(zip("ab", levels, strict=True)) for levels in product("01", "012")]
    found: dict[float, list[bool]] = {0.0: [], 4 * SIGMA: []}
    for size, hits in found.items():

        def shown(study: int, size: float = size) -> set[tuple[str, str]]:
            results = run(
                cells, seeds=4, sigma=SIGMA, seed=study,
                effects={"a=1": 0.01, "b=2": -0.01, "a=1,b=1": size},
            )  # fmt: skip
            analysis = analyze_results(results, baseline={"a": "0", "b": "0"}, objective=OBJECTIVE)
            return {i.levels for i in analysis.interactions if (i.p_adjusted or 1.0) <= 0.05}

        for levels in studies(shown, STUDIES):
            hits.append(("1", "1") in levels if size else bool(levels))
    print({size: float(np.mean(hits)) for size, hits in found.items()})
    assert np.mean(found[4 * SIGMA]) >= 0.9
    assert np.mean(found[0.0]) <= 0.06


@pytest.mark.calibration
@pytest.mark.timeout(1800)
def test_survivors_never_win() -> None:
    """A level diverges with probability 0.6 and its survivors are 4 sigma better: it is never
    called better, and mostly called worse by 8 seeds, where averages of survivors would call it
    better in most studies."""

    def one(study: int) -> Contrast:
        generator = np.random.default_rng([5, study])
        lost = [("d=1", s) for s in range(8) if generator.random() < 0.6]
        results = run(
            one_at_a_time(FACTORS), seeds=8, sigma=SIGMA, effects={"d=1": 4 * SIGMA},
            diverged=lost, seed=study,
        )  # fmt: skip
        return analyze(results).contrast("d", "1")

    better = worse = naive = 0
    for contrast in studies(one, STUDIES):
        better += contrast.direction == "better"
        worse += contrast.direction == "worse"
        naive += contrast.p is not None and contrast.p < 0.05 and (contrast.delta or 0) > 0
    print(
        f"\nbetter {better / STUDIES:.3f}, worse {worse / STUDIES:.3f}, "
        f"survivors' averages: better {naive / STUDIES:.3f}"
    )
    assert better / STUDIES <= 0.01
    assert worse / STUDIES >= 0.9
    assert naive / STUDIES >= 0.5


@pytest.mark.calibration
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seeds", [3, 5])
def test_divergence_that_strikes_at_random_accuses_no_level(seeds: int) -> None:
    """All cells diverge at the same rate, whatever it is: at most 6 % of studies accuse a level."""
    for rate in (0.02, 0.1, 0.2, 0.35, 0.5):

        def accuses(study: int, rate: float = rate) -> bool:
            generator = np.random.default_rng([int(1000 * rate), study, seeds])
            results = [
                Result(r.levels, r.seed, "diverged")
                if generator.random() < rate else r
                for r in run(one_at_a_time(FACTORS), seeds=seeds, sigma=SIGMA, seed=study)
            ]  # fmt: skip
            return any(c.direction is not None for c in analyze(results).contrasts)

        share = np.mean(studies(accuses, STUDIES))
        print(f"\n{seeds} seeds, rate {rate}: {share:.3f}")
        assert share <= 0.06


def adaptive(
    study: int, effects: Effects, *, least: int = 3, most: int = 12
) -> tuple[Analysis, int]:
    """`seeds: {min, max, until: decided}`: the final analysis, and how many runs were spent."""
    every = run(one_at_a_time(FACTORS), seeds=most, sigma=SIGMA, effects=effects, seed=study)
    done = [r for r in every if r.seed < least]
    for block in range(least, most):
        wanted = open_levels(done, baseline=BASE, objective=OBJECTIVE, first_look=least)
        if not wanted:
            break
        wanted |= {tuple(BASE.items())}
        done += [r for r in every if r.seed == block and r.levels in wanted]
    return analyze(done, first_look=least), len(done)


@pytest.mark.calibration
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "effects", [{}, {"a=1": 0.02, "b=1": MARGIN, "c=1": -MARGIN}], ids=["null", "planted"]
)
def test_adding_seeds_until_decided_keeps_the_promises(effects: Effects) -> None:
    """With looks after every block, and seeds only for open contrasts, all error rates hold."""
    tally = Tally(effects)
    spent = []
    for analysis, runs in studies(lambda study: adaptive(study, effects), STUDIES):
        tally.add(analysis)
        spent.append(runs)
    tally.show(f"until decided, {dict(effects)}")
    print(f"runs spent: mean {np.mean(spent):.1f} of {9 * 12}")
    assert np.mean(tally.false_alarm) <= 0.06
    assert np.mean(tally.covered) >= 0.93
    if tally.wrong_equivalent:
        assert np.mean(tally.wrong_equivalent) <= 0.06


def bootstrap_interval(
    statistic: Callable[[np.ndarray], float], y: np.ndarray, generator: np.random.Generator
) -> tuple[float, float]:
    """Percentile interval over resampled seed blocks."""
    draws = [statistic(y[:, generator.integers(0, y.shape[1], y.shape[1])]) for _ in range(200)]
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)


@pytest.mark.calibration
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seeds", [3, 5])
def test_importances_cover_where_resampled_blocks_do_not(seeds: int) -> None:
    """Intervals of omega squared cover the true share in at least 90 %; intervals from resampled
    seed blocks are shown beside them."""
    factors: Factors = {"a": "012", "b": "01", "c": "01"}
    base = dict.fromkeys(factors, "0")
    effects = {"a=1": 0.006, "b=1": 0.005}
    block = SIGMA
    variance_a, variance_b = 0.006**2 * 2 / 9, 0.005**2 / 4
    truth = variance_a / (variance_a + variance_b + SIGMA**2 + block**2)

    def one(study: int) -> tuple[bool, bool] | None:
        generator = np.random.default_rng([0, study])
        results = run(
            one_at_a_time(factors), seeds=seeds, sigma=SIGMA, block=block, effects=effects,
            seed=study,
        )  # fmt: skip
        analysis = analyze_results(results, baseline=base, objective=OBJECTIVE)
        found = next((i for i in analysis.importances if i.factor == "a"), None)
        if found is None or found.ci is None:
            return None
        y = np.array([r.value for r in results]).reshape(-1, seeds)

        def share(y: np.ndarray) -> float:
            n = y.shape[1]
            residual = y - y.mean(1, keepdims=True) - y.mean(0) + y.mean()
            mse = (residual**2).sum() / ((len(y) - 1) * (n - 1))
            parts = [
                y[rows].mean(1).var() - mse * (len(rows) - 1) / len(rows) / n
                for rows in ([0, 1, 2], [0, 3], [0, 4])
            ]
            rest = (((y - y.mean(1, keepdims=True)) ** 2).sum() + len(y) * mse) / y.size
            return float(parts[0] / (sum(parts) + rest))

        low, high = bootstrap_interval(share, y, generator)
        return found.ci[0] <= truth <= found.ci[1], low <= truth <= high

    pairs = [pair for pair in studies(one, STUDIES) if pair is not None]
    ours, theirs = np.mean(pairs, axis=0)
    print(f"\n{seeds} seeds: ours {ours:.3f}, resampled blocks {theirs:.3f}")
    assert ours >= 0.9
