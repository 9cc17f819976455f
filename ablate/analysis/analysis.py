"""Results -> `Analysis`: every contrast with its interval and verdict, and one sentence a factor.

analysis = analyze_results(results, baseline={"warmup": "10000", ...},
                           objective=Objective("imagenet_top1", "maximize", margin=0.005))
analysis.factors[0].sentence
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
from scipy import special, stats

from ablate.analysis import anytime, effects, power, sentences, verdict
from ablate.analysis.answer import (
    Analysis,
    CellSummary,
    Contrast,
    FactorSummary,
    Interaction,
    Interval,
    Noise,
)
from ablate.analysis.divergence import Divergence, clopper_pearson, compare_divergence
from ablate.analysis.effects import Comparison, Estimate, Fit
from ablate.analysis.importance import importances
from ablate.analysis.multiplicity import benjamini_hochberg, dunnett_p, dunnett_quantile, holm
from ablate.analysis.results import Cell, FloatArray, Objective, Result, Table, tabulate
from ablate.analysis.screening import screen
from ablate.errors import AnalysisError

__all__ = ["ALPHA", "Analysis", "Contrast", "Interaction", "analyze_results"]

ALPHA = 0.05
"""Familywise error of "matters", and error of each "equivalent"; all intervals follow from it."""


def analyze_results(
    results: Iterable[Result],
    *,
    baseline: Mapping[str, str],
    objective: Objective,
    adjustment: str = "dunnett",
    is_sequential: bool = False,
    first_look: int | None = None,
    is_exploratory: bool = False,
    estimand: str = "auto",
    aliases: Mapping[str, Sequence[str]] | None = None,
) -> Analysis:
    """Judge every level of every factor against the baseline's level.

    `baseline` names the level of every factor in the cell all others are compared with (for
    leave-one-out: the best cell). `adjustment`: dunnett | holm | none. `is_sequential`: seeds were
    added by looking at the results; intervals and p-values are then valid at any time, and wider.
    `first_look`: how many seeds there were at the first look, if that was fixed beforehand: half
    of the error is spent there on ordinary, narrower intervals, and what they decide stays decided.
    `is_exploratory`: the cells were chosen by a search. `estimand`: auto | simple | additive, see
    effects.compare; fractions and searches are additive. `aliases`: factor -> effects confounded
    with it, from the design. Raises AnalysisError for results that do not fit together.
    """
    if adjustment not in ("dunnett", "holm", "none"):
        raise AnalysisError(f"adjustment {adjustment!r}: use 'dunnett', 'holm' or 'none'")
    table = tabulate(results)
    reference = _reference_cell(table, baseline)
    ask = _Question(objective, adjustment, estimand, aliases or {})
    has_first_look = is_sequential and first_look is not None and first_look >= 2
    alpha = ALPHA / 2 if has_first_look else ALPHA
    judged = _judge(table, reference, ask, alpha=alpha, is_sequential=is_sequential)
    contrasts = judged.contrasts
    if has_first_look:
        early = _judge(
            table.of_seeds(table.seeds[:first_look]), reference, ask, alpha=alpha,
            is_sequential=False,
        )  # fmt: skip
        contrasts = tuple(_earlier(c, early.contrasts) for c in contrasts)
    fitted, comparisons, say = judged.fitted, judged.comparisons, judged.say
    interactions = _interactions(
        table, reference, fitted, objective, say, estimand=estimand, is_sequential=is_sequential
    )
    factors = tuple(
        _summarize(f, [c for c in contrasts if c.factor == f], say)
        for f in table.factors
        if any(c.factor == f for c in contrasts)
    )
    cells = _cells(table, reference)
    noise = _noise(table, fitted)
    return Analysis(
        objective=objective,
        baseline=dict(zip(table.factors, reference, strict=True)),
        alpha=ALPHA,
        adjustment=adjustment,
        is_sequential=is_sequential,
        is_exploratory=is_exploratory,
        num_runs=int((table.outcomes != "").sum()),
        seeds=table.seeds,
        headline=sentences.headline(contrasts, interactions),
        factors=factors,
        contrasts=contrasts,
        interactions=interactions,
        not_estimable=_not_estimable(table, interactions, contrasts, aliases),
        importances=importances(table, comparisons, fitted, exploratory=is_exploratory),
        screen=screen(table, reference) if fitted.df < 1 else None,
        noise=noise,
        cells=cells,
        best=_best(cells, objective),
        guards=tuple(sentences.guard(table, reference, guard) for guard in judged.guards),
        warnings=_warnings(table, reference, fitted, comparisons, judged.seeds_inert),
    )


# ---- parts -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Question:
    """What is asked of every contrast alike."""

    objective: Objective
    adjustment: str
    estimand: str
    aliases: Mapping[str, Sequence[str]]


@dataclass(frozen=True, slots=True)
class _Judged:
    """The contrasts at one look, and what they were made from."""

    contrasts: tuple[Contrast, ...]
    comparisons: list[Comparison]
    fitted: Fit
    guards: tuple[effects.Guard, ...]
    say: sentences.Scale
    seeds_inert: bool


def _judge(
    table: Table, reference: Cell, ask: _Question, *, alpha: float, is_sequential: bool
) -> _Judged:
    fitted, guards = effects.pool(table, keep=table.index(reference))
    comparisons = [
        effects.compare(table, reference, factor, level, estimand=ask.estimand)
        for i, factor in enumerate(table.factors)
        for level in table.levels(factor)
        if level != reference[i]
    ]
    removed = {guard.row: guard for guard in guards}
    estimates = [_estimate(table, fitted, c, removed) for c in comparisons]
    seeds_inert = _seeds_do_nothing(table)
    family = _Family(comparisons, estimates, fitted, ask.adjustment, is_sequential, alpha)
    say = sentences.Scale.of(ask.objective, [e.delta for e in estimates if e], _sigma(fitted))
    contrasts = tuple(
        _contrast(
            table,
            comparison,
            found,
            fitted,
            ask.objective,
            family,
            seeds_inert=seeds_inert,
            aliases=tuple(ask.aliases.get(comparison.factor, ())),
            say=say,
        )
        for comparison, found in zip(comparisons, estimates, strict=True)
    )
    return _Judged(contrasts, comparisons, fitted, guards, say, seeds_inert)


def _earlier(contrast: Contrast, early: Sequence[Contrast]) -> Contrast:
    """The contrast as the first look decided it, if it did."""
    for before in early:
        same = (before.factor, before.level) == (contrast.factor, contrast.level)
        if same and before.verdict != verdict.INCONCLUSIVE:
            note = f"decided at the first look, with {before.n} seeds"
            return replace(before, warnings=(*before.warnings, note))
    return contrast


def _reference_cell(table: Table, baseline: Mapping[str, str]) -> Cell:
    missing = [factor for factor in table.factors if factor not in baseline]
    if missing:
        raise AnalysisError(
            f"the baseline gives no level to {', '.join(missing)}: name one for each factor"
        )
    return tuple(baseline[factor] for factor in table.factors)


def _sigma(fitted: Fit) -> float | None:
    return math.sqrt(fitted.mse) if fitted.df and fitted.mse > 0 else None


def _seeds_do_nothing(table: Table) -> bool:
    """Every cell has the same value in all its seeds, and at least one has two."""
    counts = (~np.isnan(table.values)).sum(axis=1)
    if not (counts >= 2).any():
        return False
    part = table.values[counts >= 2]
    return bool((np.nanmax(part, axis=1) == np.nanmin(part, axis=1)).all())


def _estimate(
    table: Table, fitted: Fit, comparison: Comparison, removed: Mapping[int, effects.Guard]
) -> Estimate | None:
    if comparison.estimand in ("shared", "missing"):
        return None
    involved = {int(i) for i in np.flatnonzero(comparison.weights)}
    if any(table.count(i, "diverged") for i in involved):
        why = "a run diverged, so its cell is not in the shared variance"
    elif involved & set(removed):
        why = "its noise differs from the other cells'"
    elif fitted.df < 1:
        why = "no second seed to estimate the noise from"
    else:
        why = "its cells have no common seeds with the others"
    return effects.estimate(
        table.values, comparison.weights, fitted, pairs=comparison.pairs, why_not=why
    )


class _Family:
    """Adjusted p-values and critical values over all contrasts that are really compared.

    Contrasts with the shared variance form one Dunnett group; each other contrast is a group of
    its own. Groups share alpha in proportion to their size (Bonferroni between groups).
    """

    def __init__(
        self,
        comparisons: Sequence[Comparison],
        estimates: Sequence[Estimate | None],
        fitted: Fit,
        adjustment: str,
        is_sequential: bool,
        alpha: float,
    ) -> None:
        self.alpha = alpha
        self.adjustment = adjustment
        self.is_sequential = is_sequential
        questions: dict[bytes, FloatArray] = {}
        pooled: dict[bytes, FloatArray] = {}
        raw: dict[bytes, float] = {}
        for comparison, found in zip(comparisons, estimates, strict=True):
            if comparison.estimand in ("shared", "missing"):
                continue
            key = comparison.weights.tobytes()
            questions[key] = comparison.weights
            if found is None or found.df < 1:
                continue
            raw[key] = _p(found, is_sequential)
            if not found.why_not_pooled:
                pooled[key] = comparison.weights
        self.size = 1 if adjustment == "none" else max(1, len(questions))
        self.pooled = list(pooled)
        self.correlation = np.eye(1)
        if pooled:
            w = list(pooled.values())
            covariance = np.array([[fitted.spread(a, b) for b in w] for a in w])
            sd = np.sqrt(np.diag(covariance))
            # Rounded so that equal layouts share the cached quantiles.
            self.correlation = np.round(covariance / np.outer(sd, sd), 10)
        keys = list(raw)
        self._holm = dict(zip(keys, holm([raw[k] for k in keys], total=self.size), strict=True))

    @property
    def split(self) -> float:
        """Factor on p-values when only a part of ALPHA may be spent at this look."""
        return ALPHA / self.alpha

    def adjust(self, comparison: Comparison, found: Estimate) -> float:
        """Familywise p-value, to be compared with ALPHA."""
        p = _p(found, self.is_sequential)
        key = comparison.weights.tobytes()
        if self.adjustment == "holm":
            return min(1.0, self._holm[key] * self.split)
        if self.adjustment == "dunnett" and not self.is_sequential and key in self.pooled:
            group = len(self.pooled)
            p = dunnett_p(_t(found), self.correlation, found.df)
            return min(1.0, p * self.size / group * self.split)
        return min(1.0, p * self.size * self.split)

    def half_width(self, comparison: Comparison, found: Estimate) -> float:
        """Of the simultaneous interval (Bonferroni's for Holm, which has none of its own)."""
        if self.is_sequential:
            return _anytime(found, self.alpha / self.size)
        group = len(self.pooled)
        if self.adjustment == "dunnett" and comparison.weights.tobytes() in self.pooled:
            alpha = self.alpha * group / self.size
            return dunnett_quantile(alpha, self.correlation, found.df) * found.standard_error
        return power.t_quantile(self.alpha / (2 * self.size), found.df) * found.standard_error


def _t(found: Estimate) -> float:
    if found.standard_error > 0:
        return found.delta / found.standard_error
    return math.copysign(math.inf, found.delta) if found.delta else 0.0


def _p(found: Estimate, is_sequential: bool) -> float:
    if is_sequential:
        return anytime.anytime_p(_t(found), found.df, found.information)
    return effects.two_sided_p(_t(found), found.df)


def _anytime(found: Estimate, alpha: float) -> float:
    return anytime.anytime_half_width(
        found.standard_error, found.df, found.information, alpha=alpha
    )


def _around(center: float, half_width: float) -> Interval | None:
    return (center - half_width, center + half_width) if math.isfinite(half_width) else None


def _contrast(
    table: Table,
    comparison: Comparison,
    found: Estimate | None,
    fitted: Fit,
    objective: Objective,
    family: _Family,
    *,
    seeds_inert: bool,
    aliases: tuple[str, ...],
    say: sentences.Scale,
) -> Contrast:
    divergence = _divergence(table, comparison, objective)
    outcomes = _outcomes(table, comparison.level_rows)
    contrast = Contrast(
        factor=comparison.factor,
        level=comparison.level,
        reference=comparison.reference,
        estimand=comparison.estimand,
        n=found.n if found else 0,
        delta=found.delta if found else None,
        ci=None,
        ci_adjusted=None,
        ci_equivalence=None,
        standard_error=None,
        df=found.df if found else 0,
        method=found.method if found else "no data",
        why_not_pooled=found.why_not_pooled if found else "",
        p=None,
        p_adjusted=None,
        p_equivalence=None,
        p_sign_flip=None,
        wins=_wins(found, objective),
        rho=_rho(table, comparison),
        verdict=verdict.INCONCLUSIVE,
        direction=None,
        basis="none",
        needs_seeds=verdict.LEAST_SEEDS,
        divergence=divergence,
        outcomes=outcomes,
        aliases=aliases,
        warnings=(),
        sentence="",
    )
    if comparison.estimand == "shared":
        runs = sum(int((~np.isnan(table.values[row])).sum()) for row in comparison.level_rows)
        contrast = replace(
            contrast, n=runs, delta=0.0, ci=(0.0, 0.0), ci_adjusted=(0.0, 0.0),
            ci_equivalence=(0.0, 0.0), method="same runs", verdict=verdict.EQUIVALENT,
            needs_seeds=0,
        )  # fmt: skip
    elif found is not None and found.df >= 1:
        contrast = _with_interval(contrast, comparison, found, objective, family)
        if seeds_inert:
            contrast = replace(
                contrast, ci=None, ci_adjusted=None, ci_equivalence=None, p=None, p_adjusted=None,
                p_equivalence=None, verdict=verdict.INCONCLUSIVE, direction=None, basis="none",
                needs_seeds=None,
            )  # fmt: skip
        elif contrast.verdict == verdict.INCONCLUSIVE:
            contrast = replace(
                contrast, needs_seeds=_needs(found, comparison, fitted, objective, family)
            )
    elif found is not None:
        contrast = replace(contrast, needs_seeds=max(1, verdict.LEAST_SEEDS - found.n))
    if divergence.any and comparison.estimand != "shared":
        contrast = _with_divergence(contrast, divergence, table, comparison, objective, family)
    return replace(contrast, sentence=sentences.contrast(contrast, objective, say, seeds_inert))


def _with_interval(
    contrast: Contrast,
    comparison: Comparison,
    found: Estimate,
    objective: Objective,
    family: _Family,
) -> Contrast:
    """Interval, tests and verdict of a contrast that has an estimate of its noise."""
    delta, se = found.delta, found.standard_error
    margin = objective.margin
    if family.is_sequential:
        single = _anytime(found, family.alpha)
        narrow = _anytime(found, 2 * family.alpha)
    else:
        single = power.t_quantile(family.alpha / 2, found.df) * se
        narrow = power.t_quantile(family.alpha, found.df) * se
    p_adjusted = family.adjust(comparison, found)
    different = p_adjusted <= ALPHA
    inside = bool(margin) and abs(delta) + narrow < (margin or 0.0)
    p_equivalence = None
    if margin and not family.is_sequential:
        nearer = margin - abs(delta)
        p_equivalence = (
            float(special.stdtr(found.df, -nearer / se)) if se > 0 else float(nearer <= 0)
        )
        p_equivalence = min(1.0, p_equivalence * family.split)
    word = verdict.judge(delta, different=different, inside=inside, margin=margin)
    warnings = list(contrast.warnings)
    differences = found.differences
    if len(differences) >= 8 and np.ptp(differences) > 0:
        skew = float(stats.skew(differences))
        if abs(skew) > 1:
            warnings.append(
                f"differences are skewed ({skew:+.1f}): the interval may be too narrow; "
                "see the sign-flip p"
            )
    noisier = _own_noise(found)
    if noisier is not None:
        warnings.append(noisier)
    if se == 0:
        warnings.append("the difference is the same in every seed: the interval has no width")
    direction = None
    if different:
        direction = "better" if objective.gain(delta) > 0 else "worse"
    return replace(
        contrast,
        ci=_around(delta, single),
        ci_adjusted=_around(delta, family.half_width(comparison, found)),
        ci_equivalence=_around(delta, narrow),
        standard_error=se,
        method="confidence sequence" if family.is_sequential else found.method,
        p=_p(found, family.is_sequential),
        p_adjusted=p_adjusted,
        p_equivalence=p_equivalence,
        p_sign_flip=sign_flip_p(differences) if len(differences) >= 2 else None,
        verdict=word,
        direction=direction,
        basis="none" if word == verdict.INCONCLUSIVE else "difference",
        needs_seeds=None if word == verdict.INCONCLUSIVE else 0,
        warnings=tuple(warnings),
    )


def _own_noise(found: Estimate) -> str | None:
    """A warning when a contrast's differences vary more than the shared variance says."""
    n = len(found.differences)
    if found.why_not_pooled or n < 3 or found.df <= n - 1 or found.standard_error == 0:
        return None
    own = float(found.differences.std(ddof=1)) / math.sqrt(n)
    ratio = (own / found.standard_error) ** 2
    if stats.f.sf(ratio, n - 1, found.df) >= 0.05:
        return None
    p = effects.two_sided_p(found.delta / own, n - 1)
    return (
        f"its differences vary {math.sqrt(ratio):.1f} times as much as the shared noise says; "
        f"by themselves they give p = {p:.2g}"
    )


def _with_divergence(
    contrast: Contrast,
    divergence: Divergence,
    table: Table,
    comparison: Comparison,
    objective: Objective,
    family: _Family,
) -> Contrast:
    """Let runs that diverged count: the survivors alone may neither praise nor equate a level.

    A difference is shown by the divergence rates (or the composite score), or by survivors that
    are worse in the arm that also diverges at least as often. Two tests, so p is doubled.
    """
    (k1, n1), (k0, n0) = divergence.level, divergence.reference
    rate1, rate0 = k1 / max(n1, 1), k0 / max(n0, 1)
    p_runs = divergence.pooled_p if divergence.pooled_p is not None else divergence.composite_p
    runs_better = divergence.composite_better if divergence.pooled_p is None else rate1 < rate0
    tests = 2 * family.size * family.split
    if family.is_sequential:
        # Exact tests have no anytime form here: look k may spend alpha / (k (k + 1)).
        look = max(1, max(n1, n0) - 2)
        tests *= look * (look + 1)
    p_runs_adjusted = 1.0 if p_runs is None else min(1.0, p_runs * tests)
    p_alive_adjusted = 1.0
    alive_gain = 0.0 if contrast.delta is None else objective.gain(contrast.delta)
    if contrast.p_adjusted is not None:
        p_alive_adjusted = min(1.0, 2 * contrast.p_adjusted)
    agree = alive_gain * (rate0 - rate1) > 0 or (rate0 == rate1 and alive_gain != 0)
    by_runs = p_runs_adjusted <= ALPHA and runs_better is not None
    big = contrast.delta is not None and abs(contrast.delta) >= (objective.margin or 0.0)
    by_alive = agree and big and p_alive_adjusted <= ALPHA
    if by_runs or by_alive:
        is_better = runs_better if by_runs else alive_gain > 0
        basis = "both" if by_runs and by_alive else "divergence" if by_runs else "difference"
        return replace(
            contrast, verdict=verdict.MATTERS, direction="better" if is_better else "worse",
            basis=basis, needs_seeds=0, p_adjusted=min(p_runs_adjusted, p_alive_adjusted),
        )  # fmt: skip
    needs = verdict.more_seeds_for_divergence(
        divergence.level,
        divergence.reference,
        stable_runs=_stable_runs(table, comparison),
        tests=tests,
        alpha=ALPHA,
    )
    return replace(
        contrast, verdict=verdict.INCONCLUSIVE, direction=None, basis="none", needs_seeds=needs,
        p_adjusted=min(p_runs_adjusted, p_alive_adjusted if agree else 1.0),
    )  # fmt: skip


def _needs(
    found: Estimate, comparison: Comparison, fitted: Fit, objective: Objective, family: _Family
) -> int | None:
    """More seeds for a contrast with an interval; sigma per paired difference."""
    sigma = found.standard_error * math.sqrt(found.n)
    cells = None
    if not found.why_not_pooled and len(fitted.rows) > 2:
        cells = len(fitted.rows)
        # A contrast that averages over cells has the variance of more seeds of two cells.
        sigma = found.standard_error * math.sqrt(found.n / 2)
    return verdict.more_seeds(
        found.delta,
        found.n,
        sigma=sigma,
        margin=objective.margin,
        contrasts=family.size,
        cells=cells,
        alpha=ALPHA,
    )


def _divergence(table: Table, comparison: Comparison, objective: Objective) -> Divergence:
    return compare_divergence(
        _runs(table, comparison.level_rows),
        _runs(table, comparison.reference_rows),
        stable_runs=_stable_runs(table, comparison),
        chance=objective.chance,
        maximize=objective.direction == "maximize",
    )


def _runs(table: Table, rows: Sequence[int]) -> FloatArray:
    """Values of all completed (finite) and diverged (NaN) runs of the cells."""
    outcomes = table.outcomes[list(rows)]
    runs: FloatArray = table.values[list(rows)][
        (outcomes == "completed") | (outcomes == "diverged")
    ]
    return runs


def _stable_runs(table: Table, comparison: Comparison) -> int:
    own = set(comparison.level_rows) | set(comparison.reference_rows)
    return sum(
        table.count(row, "completed")
        for row in range(len(table.cells))
        if row not in own and not table.count(row, "diverged")
    )


def _outcomes(table: Table, rows: Sequence[int]) -> dict[str, int]:
    found = [str(o) for o in table.outcomes[list(rows)].ravel() if o] if rows else []
    return {name: found.count(name) for name in dict.fromkeys(found)}


def _wins(found: Estimate | None, objective: Objective) -> float | None:
    if found is None or found.n == 0:
        return None
    gains = np.array([objective.gain(float(d)) for d in found.differences])
    return float(((gains > 0) + 0.5 * (gains == 0)).mean())


def _rho(table: Table, comparison: Comparison) -> float | None:
    """Correlation over seeds of the two arms of a simple contrast."""
    if comparison.estimand != "simple" or not comparison.pairs:
        return None
    up, down = comparison.pairs[0]
    both = ~np.isnan(table.values[up]) & ~np.isnan(table.values[down])
    one, two = table.values[up][both], table.values[down][both]
    if len(one) < 3 or np.ptp(one) == 0 or np.ptp(two) == 0:
        return None
    return float(np.corrcoef(one, two)[0, 1])


def sign_flip_p(differences: FloatArray) -> float:
    """Exact two-sided sign-flip p of mean 0 (simulated beyond 14 differences)."""
    n = len(differences)
    observed = abs(float(differences.sum()))
    slack = 1e-12 * (1 + float(np.abs(differences).sum()))
    if n <= 14:
        signs = 1 - 2 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
        return float((np.abs(signs @ differences) >= observed - slack).mean())
    signs = np.random.default_rng(20).choice([-1.0, 1.0], size=(20_000, n))
    extreme = np.abs(signs @ differences) >= observed - slack
    return float((extreme.sum() + 1) / (len(signs) + 1))


def _interactions(
    table: Table,
    reference: Cell,
    fitted: Fit,
    objective: Objective,
    say: sentences.Scale,
    *,
    estimand: str,
    is_sequential: bool,
) -> tuple[Interaction, ...]:
    """All two-factor interactions whose four corners were run, or that a fraction separates."""
    model = effects.CellModel(table, order=2) if estimand == "additive" else None
    found: list[tuple[tuple[str, str], tuple[str, str], Estimate]] = []
    for (i, f), (j, g) in combinations(enumerate(table.factors), 2):
        for level_f in table.levels(f):
            for level_g in table.levels(g):
                if level_f == reference[i] or level_g == reference[j]:
                    continue
                if model is None:
                    weights = effects.cross(table, reference, (f, level_f), (g, level_g))
                else:
                    weights = effects.cross_by_model(
                        model, (i, level_f, reference[i]), (j, level_g, reference[j])
                    )
                if weights is None or not np.any(weights):
                    continue
                estimate = effects.estimate(table.values, weights, fitted)
                if estimate is not None:
                    found.append(((f, g), (level_f, level_g), estimate))
    tested = [e for *_, e in found if e.df >= 1]
    adjusted = iter(benjamini_hochberg([_p(e, is_sequential) for e in tested]))
    interactions = []
    for names, levels, e in found:
        ci, p, p_adjusted, inside = None, None, None, False
        if e.df >= 1:
            p, p_adjusted = _p(e, is_sequential), next(adjusted)
            if is_sequential:
                half, narrow = _anytime(e, ALPHA), _anytime(e, 2 * ALPHA)
            else:
                half = power.t_quantile(ALPHA / 2, e.df) * e.standard_error
                narrow = power.t_quantile(ALPHA, e.df) * e.standard_error
            ci = _around(e.delta, half)
            inside = bool(objective.margin) and abs(e.delta) + narrow < (objective.margin or 0.0)
        different = p_adjusted is not None and p_adjusted <= ALPHA
        word = verdict.judge(e.delta, different=different, inside=inside, margin=objective.margin)
        interaction = Interaction(names, levels, e.delta, ci, p, p_adjusted, word, "")
        interactions.append(replace(interaction, sentence=sentences.interaction(interaction, say)))
    return tuple(interactions)


def _summarize(factor: str, contrasts: Sequence[Contrast], say: sentences.Scale) -> FactorSummary:
    words = {c.verdict for c in contrasts}
    order = (verdict.MATTERS, verdict.INCONCLUSIVE, verdict.NEGLIGIBLE, verdict.EQUIVALENT)
    word = next(w for w in order if w in words)
    return FactorSummary(factor, word, sentences.factor(factor, contrasts, say))


def _cells(table: Table, reference: Cell) -> tuple[CellSummary, ...]:
    summaries = []
    for cell, home in table.shared.items():
        row = table.cells.index(home)
        values = table.values[row][~np.isnan(table.values[row])]
        levels = dict(zip(table.factors, cell, strict=True))
        summaries.append(
            CellSummary(
                levels=levels,
                changes={
                    f: name
                    for (f, name), base in zip(levels.items(), reference, strict=True)
                    if name != base
                },
                n=len(values),
                mean=float(values.mean()) if len(values) else None,
                sd=float(values.std(ddof=1)) if len(values) >= 2 else None,
                runs=tuple(
                    (seed, str(outcome), None if np.isnan(value) else float(value))
                    for seed, outcome, value in zip(
                        table.seeds, table.outcomes[row], table.values[row], strict=True
                    )
                    if outcome
                ),
            )
        )
    return tuple(summaries)


def _best(cells: Sequence[CellSummary], objective: Objective) -> Mapping[str, str] | None:
    calm = [
        cell
        for cell in cells
        if cell.mean is not None and all(outcome != "diverged" for _, outcome, _ in cell.runs)
    ]
    if not calm:
        return None
    # A cell with fewer seeds than others may lead by luck: complete cells first.
    most = max(cell.n for cell in calm)
    full = [cell for cell in calm if cell.n == most]
    return max(full, key=lambda cell: objective.gain(cell.mean or 0.0)).levels


def _noise(table: Table, fitted: Fit) -> Noise:
    if not fitted.rows:
        return Noise(None, None, None, None, 0, None)
    y = table.values[list(fitted.rows)]
    counts = (~np.isnan(y)).sum(axis=1)
    freedom = int((counts[counts > 0] - 1).sum())
    if freedom < 1:
        return Noise(None, None, None, None, 0, None)
    means = np.nanmean(y, axis=1, keepdims=True)
    within = float(np.nansum((y - means) ** 2)) / freedom
    cells, blocks = len(fitted.rows), len(fitted.seeds)
    if cells == 1 or fitted.df < 1:
        return Noise(math.sqrt(within), _sd_interval(within, freedom), None, None, freedom, None)
    # Runs of one seed are correlated over cells, so `within` has fewer degrees of freedom than it
    # counts: Satterthwaite over its block and its residual part.
    block = max(within - fitted.mse, 0.0) + fitted.mse / cells
    parts = block**2 / (blocks - 1) + ((1 - 1 / cells) * fitted.mse) ** 2 / fitted.df
    df = within**2 / parts if parts > 0 else float(freedom)
    rho = (within - fitted.mse) / within if within > 0 else None
    return Noise(
        sigma_seed=math.sqrt(within),
        sigma_seed_ci=_sd_interval(within, max(df, 1.0)),
        sigma_residual=math.sqrt(fitted.mse),
        sigma_residual_ci=_sd_interval(fitted.mse, fitted.df),
        df=fitted.df,
        rho=rho,
    )


def _sd_interval(variance: float, df: float) -> Interval:
    low, high = stats.chi2.isf(0.025, df), stats.chi2.isf(0.975, df)
    return math.sqrt(variance * df / low), math.sqrt(variance * df / high)


def _not_estimable(
    table: Table,
    interactions: Sequence[Interaction],
    contrasts: Sequence[Contrast],
    aliases: Mapping[str, Sequence[str]] | None,
) -> tuple[str, ...]:
    notes = []
    seen = {frozenset(i.factors) for i in interactions}
    varied = [f for f in table.factors if len(table.levels(f)) > 1]
    unseen = [pair for pair in combinations(varied, 2) if frozenset(pair) not in seen]
    if unseen and len(unseen) == math.comb(len(varied), 2):
        notes.append(
            "No interaction can be judged: no two factors were changed together in a way that "
            "separates them."
        )
    elif unseen:
        listed = ", ".join(f"{f} x {g}" for f, g in unseen)
        notes.append(f"These interactions cannot be judged by this design: {listed}.")
    for factor, words in (aliases or {}).items():
        if words:
            notes.append(f"{factor} cannot be told from {', '.join(words)}.")
    for contrast in contrasts:
        if contrast.estimand == "missing":
            notes.append(
                f"{contrast.factor}={contrast.level} has no run that differs from the baseline "
                "in this factor alone."
            )
    return tuple(notes)


def _warnings(
    table: Table,
    reference: Cell,
    fitted: Fit,
    comparisons: Sequence[Comparison],
    seeds_inert: bool,
) -> tuple[str, ...]:
    notes = []
    if any(comparison.estimand == "additive" for comparison in comparisons):
        p = effects.lack_of_fit_p(table, fitted)
        if p is not None and p < 0.05:
            notes.append(
                f"The cells do not fit a model without interactions (p = {p:.2g}): single effects "
                "are averages that may hold for no cell."
            )
    if seeds_inert:
        notes.append(
            "Every run of a cell has the same value whatever its seed: the seeds do not reach the "
            "training, or the metric is too coarse. Nothing can be said about noise."
        )
    row = table.index(reference)
    if row is None:
        notes.append("The baseline cell has no run.")
    else:
        k = table.count(row, "diverged")
        n = k + table.count(row, "completed")
        if k:
            low, high = clopper_pearson(k, n)
            notes.append(
                f"The baseline diverged in {k} of {n} runs ({low:.0%} to {high:.0%}): "
                "differences to it rest on its survivors."
            )
    if len(fitted.residuals) >= 20 and fitted.mse > 0:
        skew = float(stats.skew(fitted.residuals))
        if abs(skew) > 1:
            notes.append(
                f"Residuals are skewed ({skew:+.1f}): intervals may be too narrow; compare the "
                "sign-flip p."
            )
    return tuple(notes)
