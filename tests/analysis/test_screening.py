"""Unreplicated screens, fractions, importances beyond the ANOVA."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from simulated_studies import run
from statsmodels.formula.api import ols
from statsmodels.stats.anova import anova_lm

from ablate.analysis import fit, screening
from ablate.analysis.analysis import analyze_results
from ablate.analysis.results import Objective, tabulate
from ablate.study import factorial

OBJECTIVE = Objective("top1", "maximize", 0.005)


def cells_of(matrix: np.ndarray) -> list[dict[str, str]]:
    names = "abcdefghijklmno"[: matrix.shape[1]]
    return [
        {f: "new" if x > 0 else "old" for f, x in zip(names, row, strict=True)} for row in matrix
    ]


def base_of(count: int) -> dict[str, str]:
    return dict.fromkeys("abcdefghijklmno"[:count], "old")


def test_simulated_critical_values_are_the_published_ones() -> None:
    """Ye & Hamada (2000), 5 %: 2.30 and 4.87 for 7 effects, 2.16 and 4.24 for 15."""
    for m, one, all_ in ((7, 2.297, 4.867), (15, 2.156, 4.240)):
        single, largest = screening.null_ratios(m)
        assert np.quantile(single, 0.95) == pytest.approx(one, abs=0.04)
        assert np.quantile(largest, 0.95) == pytest.approx(all_, abs=0.15)


def test_one_seed_screen_points_at_the_active_factors() -> None:
    """16 runs, 8 factors, one seed: the two planted effects stand out, nothing else does; without
    replicates they are still no verdicts."""
    design = factorial.fractional(8, resolution="IV")
    results = run(
        cells_of(design.matrix), seeds=1, sigma=0.002,
        effects={"c=new": 0.02, "f=new": -0.015}, seed=2,
    )  # fmt: skip
    analysis = analyze_results(
        results, baseline=base_of(8), objective=OBJECTIVE, estimand="additive"
    )
    assert analysis.screen is not None
    assert len(analysis.screen.effects) == 15
    standing = [e.name for e in analysis.screen.effects if e.p_adjusted <= 0.05]
    assert standing == ["c", "f"]
    assert analysis.screen.effects[0].delta == pytest.approx(0.02, abs=0.003)
    assert {c.verdict for c in analysis.contrasts} == {"INCONCLUSIVE"}
    assert analysis.contrast("c", "new").delta == pytest.approx(analysis.screen.effects[0].delta)


def test_noise_alone_rarely_stands_out() -> None:
    """In at most 9 % of 300 screens of pure noise anything stands out (nominal 5 %)."""
    design = factorial.fractional(8, resolution="IV")
    alarms = 0
    for seed in range(300):
        table = tabulate(run(cells_of(design.matrix), seeds=1, sigma=1, seed=seed))
        found = screening.screen(table, ("old",) * 8)
        assert found is not None
        alarms += found.effects[0].p_adjusted <= 0.05
    assert alarms <= 27


def test_a_replicated_fraction_is_judged_like_statsmodels() -> None:
    """Plackett-Burman, 3 seeds: main effects of the additive model with the pure error of cell and
    seed, equal to an independent computation."""
    design = factorial.plackett_burman(5, fold_over=False)
    results = run(cells_of(design.matrix), seeds=3, sigma=0.003, effects={"b=new": 0.02})
    analysis = analyze_results(
        results, baseline=base_of(5), objective=OBJECTIVE, estimand="additive",
        aliases={"a": ["b x c"]},
    )  # fmt: skip
    contrast = analysis.contrast("b", "new")
    frame = pd.DataFrame([{**dict(r.levels), "seed": str(r.seed), "y": r.value} for r in results])
    frame["cell"] = frame[list("abcde")].agg("".join, axis=1)
    pure = ols("y ~ C(cell) + C(seed)", frame).fit()
    mains = frame.groupby("b")["y"].mean()
    assert contrast.estimand == "additive"
    assert contrast.delta == pytest.approx(mains["new"] - mains["old"])
    assert contrast.standard_error == pytest.approx(np.sqrt(pure.mse_resid * 4 / len(frame)))
    assert (contrast.verdict, contrast.direction) == ("MATTERS", "better")
    assert "b x c" in analysis.contrast("a", "new").sentence
    assert analysis.screen is None


def test_interactions_behind_a_fraction_are_noticed() -> None:
    """A strong interaction makes the additive model fail visibly; none, no warning."""
    design = factorial.fractional(4, resolution="IV")
    for size, expected in ((0.03, True), (0.0, False)):
        results = run(cells_of(design.matrix), seeds=3, sigma=0.002, effects={"a=new,b=new": size})
        analysis = analyze_results(
            results, baseline=base_of(4), objective=OBJECTIVE, estimand="additive"
        )
        assert any("without interactions" in w for w in analysis.warnings) == expected


def test_lack_of_fit_is_the_anova_of_statsmodels() -> None:
    """Mains against all interactions of a 2 x 3 crossing."""
    from ablate.analysis import effects

    cells = [{"a": a, "b": b} for a in "01" for b in "012"]
    results = run(cells, seeds=3, sigma=0.004, effects={"a=1,b=2": 0.008})
    table = tabulate(results)
    fitted = fit.pool(table)
    frame = pd.DataFrame([{**dict(r.levels), "seed": str(r.seed), "y": r.value} for r in results])
    oracle = anova_lm(ols("y ~ C(a)*C(b) + C(seed)", frame).fit())
    assert effects.lack_of_fit_p(table, fitted) == pytest.approx(oracle.loc["C(a):C(b)", "PR(>F)"])


def test_a_fraction_of_resolution_five_separates_its_interactions() -> None:
    """16 of 32 cells, 2 seeds: all ten pairs are estimated, the planted one alone stands out; at
    resolution III pairs are confounded and none is claimed."""
    for resolution, pairs in (("V", 10), ("III", 0)):
        design = factorial.fractional(5, resolution=resolution)
        results = run(cells_of(design.matrix), seeds=2, sigma=0.002, effects={"b=new,d=new": 0.02})
        analysis = analyze_results(
            results, baseline=base_of(5), objective=OBJECTIVE, estimand="additive"
        )
        assert len(analysis.interactions) == pairs
        shown = [i.factors for i in analysis.interactions if i.verdict == "MATTERS"]
        assert shown == [("b", "d")][:pairs]
        assert bool(analysis.not_estimable) == (pairs == 0)


@pytest.mark.parametrize("seeds", [2, 6])
def test_a_fraction_that_a_diverging_level_takes_apart_says_so(seeds: int) -> None:
    """Of four cells the two with c=new always diverge, and the other two differ in a and b at
    once: c is judged by its rate, a and b cannot be, and no number of seeds would change that."""
    design = factorial.plackett_burman(3, fold_over=False)
    results = run(
        cells_of(design.matrix), seeds=seeds, sigma=0.003,
        diverged=[("c=new", seed) for seed in range(seeds)],
    )  # fmt: skip
    found = analyze_results(results, baseline=base_of(3), objective=OBJECTIVE, estimand="additive")
    for name in "ab":
        contrast = found.contrast(name, "new")
        assert (contrast.verdict, contrast.needs_seeds) == ("INCONCLUSIVE", None)
        assert "diverge alike" in contrast.sentence
    exploding = found.contrast("c", "new")
    assert exploding.diverged == (2 * seeds, 2 * seeds)
    assert f"diverged in {2 * seeds} of {2 * seeds} runs" in exploding.sentence
    assert (exploding.verdict == "MATTERS") == (seeds == 6)
    assert "c=new diverged" in found.headline
