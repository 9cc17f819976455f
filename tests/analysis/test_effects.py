"""Contrasts and intervals, against statsmodels and scipy as oracles."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from simulated_studies import Factors, one_at_a_time, run
from statsmodels.formula.api import ols
from statsmodels.stats.anova import anova_lm

from ablate.analysis import effects
from ablate.analysis.analysis import Analysis, analyze_results
from ablate.analysis.multiplicity import benjamini_hochberg, dunnett_p, dunnett_quantile, holm
from ablate.analysis.results import Objective, Result, tabulate
from ablate.errors import AnalysisError

FACTORS: Factors = {"warmup": ["10k", "2k", "1k"], "beta2": ["999", "98"], "lr": ["1", "5"]}
BASE = {factor: levels[0] for factor, levels in FACTORS.items()}
OBJECTIVE = Objective("top1", "maximize", 0.005)


def judged(results: list[Result], **options: object) -> Analysis:
    return analyze_results(results, baseline=BASE, objective=OBJECTIVE, **options)  # type: ignore[arg-type]


def test_pooled_interval_equals_the_two_way_anova_of_statsmodels() -> None:
    """Delta, standard error, df and p are those of value ~ cell + seed by an independent code."""
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
    assert ours.method == "pooled two-way ANOVA"
    assert ours.delta == pytest.approx(model.params[name])
    assert ours.standard_error == pytest.approx(model.bse[name])
    assert ours.p == pytest.approx(model.pvalues[name])
    assert ours.ci == pytest.approx(tuple(model.conf_int().loc[name]))
    assert ours.df == model.df_resid


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
    assert ours.standard_error == pytest.approx(model.bse[name])


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


def test_a_noisy_cell_leaves_the_pool() -> None:
    """One level 12 times as noisy is found, named, and judged on its own differences only."""
    factors: Factors = {f: ["0", "1", "2"] for f in "abcd"}
    results = run(one_at_a_time(factors), seeds=6, sigma=0.002, noise_of={"c=2": 0.024}, seed=4)
    base = dict.fromkeys("abcd", "0")
    analysis = analyze_results(results, baseline=base, objective=OBJECTIVE)
    noisy, calm = analysis.contrast("c", "2"), analysis.contrast("a", "1")
    assert "c=2" in analysis.guards[0]
    assert noisy.method == "paired t" and "noise" in noisy.why_not_pooled
    assert calm.method == "pooled two-way ANOVA"
    assert analysis.noise.sigma_residual == pytest.approx(0.002, rel=0.35)


def test_equal_noise_is_rarely_called_unequal() -> None:
    """The guard fires in about 5 % of studies of equal noise, which is its level."""
    table = tabulate(run(one_at_a_time(FACTORS), seeds=3, sigma=1))
    generator = np.random.default_rng(0)
    fired = 0
    for _ in range(400):
        values = generator.standard_normal(table.values.shape)
        fired += effects.unequal_variance(values, effects.fit(values, tuple(range(5)))) is not None
    assert 5 <= fired <= 34


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


def test_a_contrast_noisier_than_the_pool_says_so() -> None:
    """Three differences that scatter far beyond the shared noise carry a warning."""
    factors: Factors = {f: ["0", "1", "2"] for f in "abcdef"}
    results = run(one_at_a_time(factors), seeds=3, sigma=0.002, noise_of={"c=2": 0.007}, seed=11)
    analysis = analyze_results(results, baseline=dict.fromkeys("abcdef", "0"), objective=OBJECTIVE)
    contrast = analysis.contrast("c", "2")
    warned = any("shared noise" in warning for warning in contrast.warnings)
    assert warned or contrast.why_not_pooled
    assert not any(analysis.contrast("a", "1").warnings)
