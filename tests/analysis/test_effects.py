"""Contrasts and intervals, against statsmodels and scipy as oracles."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from simulated_studies import Factors, one_at_a_time, run
from statsmodels.formula.api import ols
from statsmodels.stats.anova import anova_lm

from ablate.analysis import fit, noise
from ablate.analysis.analysis import Analysis, analyze_results
from ablate.analysis.multiplicity import benjamini_hochberg, dunnett_p, dunnett_quantile, holm
from ablate.analysis.results import Objective, Result, tabulate
from ablate.errors import AnalysisError

FACTORS: Factors = {"warmup": ["10k", "2k", "1k"], "beta2": ["999", "98"], "lr": ["1", "5"]}
BASE = {factor: levels[0] for factor, levels in FACTORS.items()}
OBJECTIVE = Objective("top1", "maximize", 0.005)


def judged(results: list[Result], **options: object) -> Analysis:
    return analyze_results(results, baseline=BASE, objective=OBJECTIVE, **options)  # type: ignore[arg-type]


def by_hand(results: list[Result], level: tuple[str, str]) -> tuple[float, float]:
    """(standard error, df) of a level against the baseline of a balanced study, another way.

    A cell's variance from the sum of squares of its residuals, less what the others' noise adds to
    them; a third or so of it is its own (six degrees of freedom are the shared one's, two at the
    baseline), the rest the residual mean square.
    """
    cells = list(dict.fromkeys(r.levels for r in results))
    y = np.array([[r.value for r in results if r.levels == cell] for cell in cells], dtype=float)
    num, seeds = y.shape
    model = y - y.mean(1, keepdims=True) - y.mean(0, keepdims=True) + y.mean()
    mse = (model**2).sum() / ((num - 1) * (seeds - 1))
    ones = cells.index(tuple({**BASE, **dict([level])}.items())), cells.index(tuple(BASE.items()))
    freedom = (seeds - 1) * (num - 1) / num
    variances, parts, shared = [], [], 0.0
    for row, prior in zip(ones, (6, 2), strict=True):
        own = ((model[row] ** 2).sum() / (seeds - 1) - mse / num) / (1 - 2 / num)
        kept = prior / (prior + freedom)
        variances.append((kept * mse + (1 - kept) * max(own, 0.05 * mse)) / seeds)
        parts.append(variances[-1] ** 2 / (prior + freedom))
        shared += kept * mse / seeds
    total = sum(variances)
    most = (num - 1) * (seeds - 1)
    return math.sqrt(total), min(most, total**2 / (sum(parts) + shared**2 / most))


def test_fit_is_the_two_way_anova_of_statsmodels() -> None:
    """Effects, residual variance and df are those of value ~ cell + seed by an independent code;
    the interval has each cell's own noise in it, as computed by hand."""
    results = run(one_at_a_time(FACTORS), seeds=4, sigma=0.003, effects={"warmup=2k": 0.01})
    ours = judged(results).contrast("warmup", "2k")
    frame = pd.DataFrame(
        {
            "y": [r.value for r in results],
            "cell": ["base" if dict(r.levels) == BASE else str(r.levels) for r in results],
            "seed": [str(r.seed) for r in results],
        }
    )
    model = ols("y ~ C(cell, Treatment('base')) + C(seed)", frame).fit()
    name = next(n for n in model.params.index if "'2k'" in n)
    fitted = fit.pool(tabulate(results))
    assert (fitted.mse, fitted.df) == (pytest.approx(model.mse_resid), model.df_resid)
    assert ours.method == "two-way, cells' own noise"
    assert ours.delta == pytest.approx(model.params[name])
    error, df = by_hand(results, ("warmup", "2k"))
    assert (ours.standard_error, ours.df) == (pytest.approx(error), pytest.approx(df))
    assert ours.p == pytest.approx(2 * stats.t.sf(abs(model.params[name]) / error, df))
    half = float(stats.t.isf(0.025, df)) * error
    assert ours.ci == pytest.approx((model.params[name] - half, model.params[name] + half))


def test_missing_runs_keep_the_least_squares_answer() -> None:
    """With runs missing at random the pooled contrast is still that of statsmodels."""
    results = run(one_at_a_time(FACTORS), seeds=4, sigma=0.003)
    results = [r for i, r in enumerate(results) if i not in (1, 7, 14)]
    ours = judged(results).contrast("lr", "5")
    frame = pd.DataFrame(
        {
            "y": [r.value for r in results],
            "cell": ["base" if dict(r.levels) == BASE else str(r.levels) for r in results],
            "seed": [str(r.seed) for r in results],
        }
    )
    model = ols("y ~ C(cell, Treatment('base')) + C(seed)", frame).fit()
    name = next(n for n in model.params.index if "'lr', '5'" in n)
    assert ours.delta == pytest.approx(model.params[name])
    assert fit.pool(tabulate(results)).mse == pytest.approx(model.mse_resid)


def test_two_cells_give_the_paired_t_test() -> None:
    """With one contrast there is nothing to pool: exactly scipy's paired t."""
    results = run(one_at_a_time({"lr": ["1", "5"]}), seeds=5, sigma=0.01)
    ours = analyze_results(results, baseline={"lr": "1"}, objective=OBJECTIVE).contrasts[0]
    by_cell = {lv: [r.value for r in results if r.levels == (("lr", lv),)] for lv in ("1", "5")}
    test = stats.ttest_rel(by_cell["5"], by_cell["1"])
    assert ours.method == "paired t"
    assert ours.p == pytest.approx(test.pvalue)
    assert ours.ci == pytest.approx(tuple(test.confidence_interval()))


def test_full_factorial_gives_main_effects_and_the_interaction() -> None:
    """In a complete crossing mains are averages over the other factor; the planted interaction
    is found, with the F test of statsmodels."""
    cells = [{"a": a, "b": b} for a in ("0", "1") for b in ("0", "1")]
    results = run(cells, seeds=4, sigma=0.002, effects={"a=1": 0.01, "a=1,b=1": 0.02})
    analysis = analyze_results(results, baseline={"a": "0", "b": "0"}, objective=OBJECTIVE)
    frame = pd.DataFrame([{**dict(r.levels), "seed": str(r.seed), "y": r.value} for r in results])
    table = anova_lm(ols("y ~ C(a)*C(b) + C(seed)", frame).fit())
    main = analysis.contrast("a", "1")
    assert main.estimand == "main"
    assert main.delta == pytest.approx(0.02, abs=0.004)
    assert main.p == pytest.approx(table.loc["C(a)", "PR(>F)"])
    (interaction,) = analysis.interactions
    assert interaction.p == pytest.approx(table.loc["C(a):C(b)", "PR(>F)"])
    assert interaction.delta == pytest.approx(0.02, abs=0.006)
    assert interaction.verdict == "MATTERS"
    assert not analysis.not_estimable


def test_omega_squared_equals_the_textbook_formula() -> None:
    """(SS - df MSE) / (total SS + MSE) from statsmodels' table, in a balanced crossing."""
    cells = [{"a": a, "b": b} for a in "012" for b in "01"]
    results = run(cells, seeds=3, sigma=0.004, effects={"a=1": 0.01, "b=1": 0.006})
    analysis = analyze_results(results, baseline={"a": "0", "b": "0"}, objective=OBJECTIVE)
    frame = pd.DataFrame([{**dict(r.levels), "seed": str(r.seed), "y": r.value} for r in results])
    table = anova_lm(ols("y ~ C(a)*C(b) + C(seed)", frame).fit())
    mse = table.loc["Residual", "mean_sq"]
    total = table["sum_sq"].sum()
    for importance in analysis.importances:
        row = table.loc[f"C({importance.factor})"]
        assert importance.share == pytest.approx(
            (row["sum_sq"] - row["df"] * mse) / (total + mse), rel=1e-6
        )
        assert importance.p == pytest.approx(row["PR(>F)"])
        assert importance.ci is not None
        assert importance.ci[0] <= importance.share <= importance.ci[1]


def test_dunnett_agrees_with_scipy() -> None:
    """Adjusted p of unpaired samples against one control: scipy.stats.dunnett is the oracle."""
    generator = np.random.default_rng(2)
    control = generator.normal(0, 1, 8)
    samples = [generator.normal(mean, 1, 8) for mean in (0.3, 0.9, 1.6)]
    oracle = stats.dunnett(*samples, control=control, rng=np.random.default_rng(0))
    correlation = np.full((3, 3), 0.5) + 0.5 * np.eye(3)
    for statistic, p in zip(oracle.statistic, oracle.pvalue, strict=True):
        assert dunnett_p(statistic, correlation, 4 * 7) == pytest.approx(p, abs=0.002)
    # Two-sided 5 %, 8 comparisons, df 16: published as 2.97.
    eight = np.full((8, 8), 0.5) + 0.5 * np.eye(8)
    assert dunnett_quantile(0.05, eight, 16) == pytest.approx(2.97, abs=0.01)


def test_holm_and_bh_agree_with_statsmodels() -> None:
    """Step-down and step-up adjustments are those of statsmodels."""
    from statsmodels.stats.multitest import multipletests

    p = [0.011, 0.3, 0.0004, 0.04, 0.04]
    assert holm(p) == pytest.approx(list(multipletests(p, method="holm")[1]))
    assert benjamini_hochberg(p) == pytest.approx(list(multipletests(p, method="fdr_bh")[1]))


def test_a_noisy_cell_is_named_and_has_wider_intervals() -> None:
    """One level 12 times as noisy: it is named, its interval is far wider than the others', and
    theirs are as wide as their own noise makes them."""
    factors: Factors = {f: ["0", "1", "2"] for f in "abcd"}
    results = run(one_at_a_time(factors), seeds=6, sigma=0.002, noise_of={"c=2": 0.024}, seed=2)
    base = dict.fromkeys("abcd", "0")
    analysis = analyze_results(results, baseline=base, objective=OBJECTIVE)
    noisy, calm = analysis.contrast("c", "2"), analysis.contrast("a", "1")
    assert "c=2 look noisier" in analysis.guards[0]
    assert noisy.standard_error is not None and calm.standard_error is not None
    assert noisy.standard_error > 4 * calm.standard_error
    own = 0.002 * np.sqrt(2 / 6)
    assert 0.6 * own < calm.standard_error < 1.6 * own
    assert calm.verdict == "EQUIVALENT"


def test_the_main_effect_of_a_crossing_has_the_variance_of_all_cells() -> None:
    """Where every cell takes part alike, the cells' own noise adds up to the residual variance:
    one noisy cell costs no contrast its degrees of freedom."""
    cells = [{"a": a, "b": b, "c": c} for a in "01" for b in "01" for c in "01"]
    results = run(cells, seeds=3, sigma=0.002, noise_of={"a=1,b=1,c=1": 0.008}, seed=3)
    analysis = analyze_results(results, baseline=dict.fromkeys("abc", "0"), objective=OBJECTIVE)
    for contrast in analysis.contrasts:
        assert contrast.df > 6
        assert contrast.why_not_pooled == ""


@pytest.mark.parametrize(
    ("kind", "most"),
    [("normal", 8), ("lognormal", 28)],
)
@pytest.mark.calibration
def test_equal_noise_is_rarely_said_to_be_unequal(kind: str, most: int) -> None:
    """A cell is called noisier in about 1 % of studies of equal noise, and in at most a seventh
    where the noise is skewed: one outlying run of three looks like a noisy cell."""
    table = tabulate(run(one_at_a_time(FACTORS), seeds=3, sigma=1))
    generator = np.random.default_rng(0)
    said = 0
    for _ in range(200):
        values = generator.standard_normal(table.values.shape)
        fitted = fit.fit(np.exp(values) if kind == "lognormal" else values, tuple(range(5)))
        said += noise.looks_noisier(fitted.residuals, fitted.layout) is not None
    assert said <= most


def test_cells_that_share_their_runs_are_one_cell() -> None:
    """A merged level (same trial ids) is equivalent by construction and adds no data."""
    factors: Factors = {"gather": ["none", "both"], "lr": ["1", "5"]}
    results = run(one_at_a_time(factors), seeds=3, sigma=0.01, ids=True)
    base = {f: lv[0] for f, lv in factors.items()}
    shared = [
        Result(
            tuple((f, "both" if f == "gather" else v) for f, v in r.levels),
            r.seed, r.outcome, r.value, r.trial_id,
        )
        for r in results if dict(r.levels) == base
    ]  # fmt: skip
    without = [r for r in results if dict(r.levels)["gather"] == "none"]
    one = analyze_results(without + shared, baseline=base, objective=OBJECTIVE)
    two = analyze_results(without, baseline=base, objective=OBJECTIVE)
    merged = one.contrast("gather", "both")
    assert (merged.estimand, merged.verdict, merged.delta) == ("shared", "EQUIVALENT", 0.0)
    assert one.contrast("lr", "5").ci == two.contrast("lr", "5").ci
    assert one.num_runs == 6


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"outcome": "exploded"}, "exploded"),
        ({"value": float("nan")}, "completed with value nan"),
        ({"seed": 1}, "two runs of"),
        ({"levels": (("lr", "1"),)}, "every result must give a level to every factor"),
    ],
)
def test_results_that_do_not_fit_are_refused(change: dict[str, object], words: str) -> None:
    """Each malformed result is named, with what to change."""
    results = run(one_at_a_time(FACTORS), seeds=2, sigma=1)
    bad = {
        name: getattr(results[0], name)
        for name in ("levels", "seed", "outcome", "value")
    } | change  # fmt: skip
    with pytest.raises(AnalysisError, match=words):
        judged([Result(**bad), *results[1:]])  # type: ignore[arg-type]
