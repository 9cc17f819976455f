"""Results that are no textbook's: identical, tied, coarse, without pairs, without a baseline."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from scipy import stats

from ablate.analysis.analysis import Analysis, analyze_results
from ablate.analysis.answer import Contrast
from ablate.analysis.results import Objective, Result

Values = Sequence[float | None]


def analyse(
    cells: Mapping[str, Values], *, seeds: Mapping[str, Sequence[int]] | None = None
) -> Analysis:
    """One factor a level (`base` is the baseline's); None is a run that failed."""
    factors = [name for name in cells if name != "base"]
    results = [
        Result(
            tuple((f, "on" if f == name else "base") for f in factors),
            ((seeds or {}).get(name) or range(len(values)))[place],
            "failed" if value is None else "completed",
            value,
        )
        for name, values in cells.items()
        for place, value in enumerate(values)
    ]
    objective = Objective("value", "maximize", 0.005)
    return analyze_results(results, baseline=dict.fromkeys(factors, "base"), objective=objective)


def only(found: Analysis) -> Contrast:
    (contrast,) = found.contrasts
    return contrast


def test_a_level_that_changes_no_run_is_told_so() -> None:
    """Equal bits in every seed: no p, no interval, a difference of 0, and the likely cause
    (optuna-dashboard 409, neptune-optuna 9)."""
    found = analyse({"base": [0.20, 0.21, 0.19], "flag": [0.20, 0.21, 0.19]})
    flag = only(found)
    assert (flag.verdict, flag.delta, flag.ci, flag.p_adjusted) == ("INCONCLUSIVE", 0.0, None, None)
    assert "identical results in all 3 seeds" in flag.sentence
    assert "worse" not in flag.sentence and "better" not in flag.sentence
    assert found.factors[0].sentence.startswith("flag changed no run")
    assert found.headline == "flag changed no run: is it applied?"


def test_a_level_that_changed_no_run_leaves_the_factor_its_answer() -> None:
    """One level equals the baseline in each seed, the other is within the margin: the factor
    changes nothing of interest, and of the first it is asked whether it is applied."""
    values = {"off": (0.5, 0.52, 0.51), "kept": (0.5, 0.52, 0.51), "other": (0.501, 0.519, 0.511)}
    results = [
        Result((("flag", level),), seed, "completed", value)
        for level, own in values.items()
        for seed, value in enumerate(own)
    ]
    found = analyze_results(
        results, baseline={"flag": "off"}, objective=Objective("accuracy", "maximize", 0.05)
    )
    assert found.headline == (
        "flag changes nothing of interest; flag=kept changed no run: is it applied?"
    )
    assert found.factors[0].verdict == "EQUIVALENT"


def test_differences_of_rounding_alone_are_none() -> None:
    """0.1 + 0.2 is not 0.3 in the last bit, and the same result."""
    flag = only(analyse({"base": [0.1 + 0.2, 0.1 + 0.7, 0.3], "flag": [0.3, 0.8, 0.3]}))
    assert flag.identical and flag.delta == 0.0
    assert "identical results in all 3 seeds" in flag.sentence


def test_beside_others_it_is_told_too() -> None:
    """A dead flag among levels that do something keeps its own sentence."""
    cells = {"base": [0.20, 0.21, 0.19], "dead": [0.20, 0.21, 0.19], "live": [0.26, 0.26, 0.25]}
    found = {c.factor: c for c in analyse(cells).contrasts}
    assert found["dead"].identical and found["dead"].delta == 0.0
    assert found["live"].verdict == "MATTERS"


@pytest.mark.parametrize(
    ("base", "level", "step"),
    [([3 / 12, 4 / 12], [4 / 12, 5 / 12], "1/12"), ([0.25, 0.33], [0.33, 0.41], "0.08")],
)
def test_equal_differences_of_a_coarse_metric_are_no_certainty(
    base: Values, level: Values, step: str
) -> None:
    """12 images and two seeds: the interval has a width, and the reason is said (rliable 20)."""
    found = only(analyse({"base": base, "a": level}))
    assert found.verdict == "INCONCLUSIVE" and found.ci is not None
    assert found.ci[0] < 0 < found.ci[1]
    assert f"moves in steps of {step}" in found.warnings[0]


def test_a_difference_far_beyond_the_metrics_step_matters() -> None:
    """The same five steps in each of three seeds are more than rounding."""
    found = only(analyse({"base": [0.20, 0.21, 0.19], "a": [0.25, 0.26, 0.24]}))
    assert found.verdict == "MATTERS" and found.ci is not None and found.ci[0] < found.ci[1]


def test_seeds_that_change_nothing_leave_it_open() -> None:
    """Constant in both arms and apart: how sure cannot be said."""
    assert only(analyse({"base": [0.2] * 4, "a": [0.25] * 4})).verdict == "INCONCLUSIVE"
    same = only(analyse({"base": [0.2] * 4, "a": [0.2] * 4}))
    assert same.delta == 0.0 and same.identical


def test_ties_are_no_differences() -> None:
    """Seeds in another order give a difference of exactly nothing, not of 1e-17."""
    found = only(analyse({"base": [2 / 12, 3 / 12], "a": [3 / 12, 2 / 12]}))
    assert found.delta == 0.0 and not found.identical and found.verdict == "INCONCLUSIVE"


def test_false_differences_of_a_coarse_metric_stay_below_five_percent() -> None:
    """12 images, two seeds, no effect: 11.5 % of such studies found one when an equal difference
    was taken for a noise of nothing."""
    generator = np.random.default_rng(7)
    num_false = 0
    for _ in range(300):
        runs = generator.binomial(12, 0.3, size=(2, 2)) / 12
        found = only(analyse({"base": list(runs[0]), "a": list(runs[1])}))
        num_false += found.verdict in ("MATTERS", "NEGLIGIBLE")
    assert num_false <= 300 * 0.05


def test_seeds_that_do_not_pair_are_judged_by_welch() -> None:
    """No common seed: the numbers of Welch's test, and that it was taken."""
    base, level = [0.20, 0.21, 0.19], [0.251, 0.263, 0.240]
    found = only(analyse({"base": base, "a": level}, seeds={"a": [3, 4, 5]}))
    parts = [np.var(base, ddof=1) / 3, np.var(level, ddof=1) / 3]
    assert found.delta == pytest.approx(np.mean(level) - np.mean(base))
    assert found.standard_error == pytest.approx(math.sqrt(sum(parts)))
    assert found.df == int(sum(parts) ** 2 / sum(part**2 / 2 for part in parts))
    assert "Welch" in found.method and "Welch" in found.sentence
    assert found.verdict == "MATTERS"


def test_a_single_run_is_held_against_the_spread_of_the_baseline() -> None:
    """Is it a lucky seed? One run of another seed matters where a new run of the baseline would
    hardly come so far (Student's prediction interval), else it is open with its distance."""
    base = [0.712, 0.705, 0.709, 0.715]
    near, far = (
        only(analyse({"base": base, "a": [value]}, seeds={"a": [7]})) for value in (0.719, 0.78)
    )
    assert near.delta == pytest.approx(0.719 - np.mean(base))
    assert near.standard_error == pytest.approx(np.std(base, ddof=1) * math.sqrt(1 + 1 / 4))
    assert near.p == pytest.approx(2 * stats.t.sf(near.delta / near.standard_error, 3))
    assert near.df == 3 and near.verdict == "INCONCLUSIVE" and near.needs_seeds
    assert far.verdict == "MATTERS" and "a single run against several" in far.sentence
    assert any("a single run" in warning for warning in far.warnings)


def test_luck_alone_is_called_a_gain_in_five_percent_of_single_runs() -> None:
    """1000 single runs of the baseline's own distribution against three of its seeds."""
    generator = np.random.default_rng(11)
    draws = generator.normal(0.7, 0.01, size=(1000, 4))
    found = [only(analyse({"base": row[:3], "a": row[3:]}, seeds={"a": [9]})) for row in draws]
    assert 25 <= sum(c.p is not None and c.p <= 0.05 for c in found) <= 75


def test_one_run_a_side_is_a_difference_and_no_more() -> None:
    """Nothing is known of the noise: the difference, undecided, and what it takes."""
    found = only(analyse({"base": [0.70], "a": [0.75]}, seeds={"a": [1]}))
    assert found.delta == pytest.approx(0.05) and found.ci is None and found.p is None
    assert found.verdict == "INCONCLUSIVE" and "without an interval" in found.sentence


def test_a_baseline_that_failed_is_named() -> None:
    """The side that has no result is the one that is told."""
    found = analyse({"base": [None, None, None], "a": [0.2, 0.21, 0.19]})
    assert "base has no result to be compared with" in only(found).sentence
    assert "No run of the baseline completed: nothing can be compared with it." in found.warnings
    failed = only(analyse({"base": [0.2, 0.21, 0.19], "a": [None, None, None]}))
    assert "3 of its runs failed" in failed.sentence


def test_hundreds_of_levels_take_seconds_and_name_their_adjustment() -> None:
    """600 levels in 300 factors: Holm's adjustment, said, at most 20 s of processor."""
    generator = np.random.default_rng(3)
    began = time.process_time()
    factors = [f"f{i}" for i in range(300)]
    usual = dict.fromkeys(factors, "base")
    cells = [usual, *({**usual, f: level} for f in factors for level in ("x", "y"))]
    found = analyze_results(
        [
            Result(tuple(cell.items()), seed, "completed", 0.2 + 0.003 * generator.normal())
            for cell in cells
            for seed in range(3)
        ],
        baseline=usual,
        objective=Objective("value", "maximize", 0.005),
    )
    assert len(found.contrasts) == 600 and found.adjustment == "holm"
    assert any("Holm's is taken" in text for text in found.warnings)
    assert sum(c.verdict == "MATTERS" for c in found.contrasts) <= 2
    assert time.process_time() - began < 20


def test_dunnett_and_holm_agree_where_both_can_be_had() -> None:
    """Beyond the switch intervals are those of Bonferroni: not a quarter wider."""
    generator = np.random.default_rng(5)
    cells = {"base": list(0.2 + 0.003 * generator.normal(size=3))}
    cells |= {f"f{i}": list(0.2 + 0.003 * generator.normal(size=3)) for i in range(60)}
    factors = [name for name in cells if name != "base"]
    results = [
        Result(tuple((f, "on" if f == n else "base") for f in factors), s, "completed", v)
        for n, values in cells.items()
        for s, v in enumerate(values)
    ]
    widths = {}
    for adjustment in ("dunnett", "holm"):
        found = analyze_results(
            results, baseline=dict.fromkeys(factors, "base"),
            objective=Objective("value", "maximize", 0.005), adjustment=adjustment,
        )  # fmt: skip
        ci = found.contrasts[0].ci_adjusted
        assert ci is not None
        widths[adjustment] = ci[1] - ci[0]
    assert 1.0 < widths["holm"] / widths["dunnett"] < 1.25


@pytest.mark.parametrize("unit", [1e-12, 1e9])
def test_numbers_far_from_the_margin_are_not_written_as_zero(unit: float) -> None:
    """A difference of 5e-13 and a margin of 0.005 beside values of 1e9 are numbers, not 0."""
    rows = {"base": [0.20, 0.21, 0.19, 0.2], "lr": [0.25, 0.27, 0.24, 0.26]}
    found = only(analyse({name: [v * unit for v in values] for name, values in rows.items()}))
    sentence = found.sentence.replace("more than the margin", "less than the margin")
    assert not re.search(r"(?<![\d.])[-+]?0(\.0*)?(?![\d.])", sentence.split("seeds")[0]), sentence
