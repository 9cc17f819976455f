"""One judged contrast for every level of every factor: interval, verdict, divergence, sentence."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import scipy

from ablate.analysis import anytime, effects, power, sentences, verdict
from ablate.analysis.answer import Contrast, Interval
from ablate.analysis.divergence import Divergence, compare_divergence, exploding
from ablate.analysis.effects import Comparison, Estimate
from ablate.analysis.fit import Fit, pool, rounding
from ablate.analysis.multiplicity import MOST_DUNNETT, dunnett_p, dunnett_quantile, holm
from ablate.analysis.results import Cell, FloatArray, Objective, Table

ROUNDING = 1e-12
"""Differences that are no larger are those of rounding: they have no shape."""

ALPHA = 0.05
"""Familywise error of "matters", and error of each "equivalent"; all intervals follow from it."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What is asked of every contrast alike."""

    objective: Objective
    adjustment: str
    estimand: str
    aliases: Mapping[str, Sequence[str]]


@dataclass(frozen=True, slots=True)
class Judged:
    """The contrasts at one look, and what they were made from."""

    contrasts: tuple[Contrast, ...]
    comparisons: list[Comparison]
    fitted: Fit
    say: sentences.Scale
    seeds_inert: bool
    adjustment: str
    """What was taken in the end."""


def judge(
    table: Table, reference: Cell, ask: Asked, *, alpha: float, is_sequential: bool
) -> Judged:
    out = exploding(table, reference)
    comparisons = [
        _compare(table, reference, factor, level, ask.estimand, out)
        for i, factor in enumerate(table.factors)
        for level in table.levels(factor)
        if level != reference[i]
    ]
    alone = any(c.estimand == "simple" for c in comparisons)
    fitted = pool(
        table, keep=table.index(reference), is_hub=alone, least=ask.objective.least_variance,
        looks=True,
    )  # fmt: skip
    estimates = [_estimate(table, fitted, c) for c in comparisons]
    seeds_inert = _seeds_do_nothing(table)
    family = Family(comparisons, estimates, fitted, ask.adjustment, is_sequential, alpha)
    deltas = [found.delta for found in estimates if found]
    say = sentences.Scale.of(ask.objective, deltas, _sigma(fitted.typical))
    contrasts = tuple(
        _contrast(
            table, comparison, found, fitted, ask, family, seeds_inert=seeds_inert, say=say
        )  # fmt: skip
        for comparison, found in zip(comparisons, estimates, strict=True)
    )
    return Judged(contrasts, comparisons, fitted, say, seeds_inert, family.adjustment)


def _compare(
    table: Table,
    reference: Cell,
    factor: str,
    level: str,
    estimand: str,
    out: Collection[tuple[int, str]],
) -> Comparison:
    """The comparison where no level of another factor explodes, if that leaves one.

    Runs that another factor's level ends, on both sides alike, say nothing about this factor.
    """
    place = table.factors.index(factor)
    whole = effects.compare(table, reference, factor, level, estimand=estimand)
    others = {(i, name) for i, name in out if i != place}
    rows = (*whole.level_rows, *whole.reference_rows)
    if not any(table.cells[row][i] == name for row in rows for i, name in others):
        return whole
    part = table.without(others)
    if level not in part.levels(factor):
        return whole
    found = effects.compare(part, reference, factor, level, estimand=estimand)
    if found.estimand in ("missing", "shared"):
        return whole
    place_of = [table.cells.index(cell) for cell in part.cells]
    weights = np.zeros(len(table.cells))
    weights[place_of] = found.weights
    left = sorted(f"{table.factors[i]}={name}" for i, name in others)
    return replace(
        found,
        weights=weights,
        level_rows=tuple(place_of[row] for row in found.level_rows),
        reference_rows=tuple(place_of[row] for row in found.reference_rows),
        pairs=tuple((place_of[up], place_of[down]) for up, down in found.pairs),
        without=tuple(left),
    )


def _sigma(fitted: Fit) -> float | None:
    return math.sqrt(fitted.mse) if fitted.df and fitted.mse > 0 else None


def _seeds_do_nothing(table: Table) -> bool:
    """Every cell has the same value in all its seeds, and at least one has two."""
    counts = (~np.isnan(table.values)).sum(axis=1)
    if not (counts >= 2).any():
        return False
    part = table.values[counts >= 2]
    return bool((np.nanmax(part, axis=1) == np.nanmin(part, axis=1)).all())


def _estimate(table: Table, fitted: Fit, comparison: Comparison) -> Estimate | None:
    if comparison.estimand in ("shared", "missing"):
        return None
    involved = {int(i) for i in np.flatnonzero(comparison.weights)}
    if any(table.count(i, "diverged") for i in involved):
        why = "a run diverged, so its cell is not in the shared fit"
    elif any(np.isnan(table.values[i]).all() for i in involved):
        why = "one of its cells has no completed run"
    elif fitted.df < 1:
        why = "no second seed to estimate the noise from"
    else:
        why = "its cells have no common seeds with the others"
    return effects.estimate(
        table.values, comparison.weights, fitted, pairs=comparison.pairs, why_not=why
    )


def scaled(adjustment: str, size: int) -> str:
    """The adjustment that so many contrasts take: Dunnett's, which is simulated in as many
    dimensions, gives way to Holm's beyond MOST_DUNNETT."""
    return "holm" if adjustment == "dunnett" and size > MOST_DUNNETT else adjustment


class Family:
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
        self.is_sequential = is_sequential
        questions: dict[bytes, FloatArray] = {}
        pooled: dict[bytes, FloatArray] = {}
        raw: dict[bytes, float] = {}
        for comparison, found in zip(comparisons, estimates, strict=True):
            if comparison.estimand == "shared" or not comparison.level_rows:
                continue
            key = comparison.weights.tobytes()
            if comparison.estimand == "missing":  # asked of the divergence alone
                key = f"{comparison.factor}={comparison.level}".encode()
            questions[key] = comparison.weights
            if found is None or found.df < 1:
                continue
            raw[key] = p_of(found, is_sequential)
            if not found.why_not_pooled:
                pooled[key] = comparison.weights
        self.size = 1 if adjustment == "none" else max(1, len(questions))
        self.adjustment = scaled(adjustment, self.size)
        self.pooled = list(pooled)
        self.correlation = np.eye(1)
        if pooled and self.adjustment == "dunnett":
            covariance = fitted.covariance(np.array(list(pooled.values())))
            sd = np.sqrt(np.diag(covariance))
            # Rounded so that equal layouts share the cached quantiles.
            self.correlation = np.round(covariance / np.outer(sd, sd), 10)
        self.spread = _spread_of([found for found in estimates if found is not None])
        keys = list(raw)
        self._holm = dict(zip(keys, holm([raw[k] for k in keys], total=self.size), strict=True))

    @property
    def split(self) -> float:
        """Factor on p-values when only a part of ALPHA may be spent at this look."""
        return ALPHA / self.alpha

    def adjust(self, comparison: Comparison, found: Estimate) -> float:
        """Familywise p-value, to be compared with ALPHA."""
        p = p_of(found, self.is_sequential)
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
            return anytime_half(found, self.alpha / self.size)
        group = len(self.pooled)
        key = comparison.weights.tobytes()
        if self.adjustment == "dunnett" and key in self.pooled:
            alpha = self.alpha * group / self.size
            return dunnett_quantile(alpha, self.correlation, found.df) * found.standard_error
        return power.t_quantile(self.alpha / (2 * self.size), found.df) * found.standard_error


def _spread_of(estimates: Sequence[Estimate]) -> float | None:
    """Standard deviation of the true differences, by moments; None with fewer than three."""
    known = [e for e in estimates if e.df >= 1 and e.standard_error > 0]
    if len(known) < 3:
        return None
    return math.sqrt(max(0.0, float(np.mean([e.delta**2 - e.standard_error**2 for e in known]))))


def _identical(table: Table, found: Estimate | None, comparison: Comparison) -> bool:
    if found is None or comparison.estimand not in ("simple", "main"):
        return False
    arithmetic = rounding(table.values[~np.isnan(table.values)])
    return len(found.differences) >= 1 and bool((np.abs(found.differences) <= arithmetic).all())


def _t(found: Estimate) -> float:
    if found.standard_error > 0:
        return found.delta / found.standard_error
    return math.copysign(math.inf, found.delta) if found.delta else 0.0


def p_of(found: Estimate, is_sequential: bool) -> float:
    if is_sequential:
        return anytime.anytime_p(_t(found), found.df, found.information)
    return effects.two_sided_p(_t(found), found.df)


def anytime_half(found: Estimate, alpha: float) -> float:
    return anytime.anytime_half_width(
        found.standard_error, found.df, found.information, alpha=alpha
    )


def around(center: float, half_width: float) -> Interval | None:
    return (center - half_width, center + half_width) if math.isfinite(half_width) else None


def _contrast(
    table: Table,
    comparison: Comparison,
    found: Estimate | None,
    fitted: Fit,
    ask: Asked,
    family: Family,
    *,
    seeds_inert: bool,
    say: sentences.Scale,
) -> Contrast:
    """A comparison, judged and told."""
    objective = ask.objective
    contrast = _open(table, comparison, found, ask, confidence=1 - family.alpha)
    if comparison.estimand == "shared":
        runs = sum(int((~np.isnan(table.values[row])).sum()) for row in comparison.level_rows)
        contrast = replace(
            contrast, n=runs, delta=0.0, ci=(0.0, 0.0), ci_adjusted=(0.0, 0.0),
            ci_equivalence=(0.0, 0.0), method="same runs", verdict=verdict.EQUIVALENT,
            needs_seeds=0,
        )  # fmt: skip
    elif found is not None and found.df >= 1:
        contrast = _with_interval(contrast, comparison, found, objective, family)
        if seeds_inert or contrast.identical:
            contrast = replace(
                contrast, delta=0.0 if contrast.identical else contrast.delta, ci=None,
                ci_adjusted=None, ci_equivalence=None, p=None, p_adjusted=None, p_equivalence=None,
                verdict=verdict.INCONCLUSIVE, direction=None, basis="none", needs_seeds=None,
                warnings=_conditions(comparison),
            )  # fmt: skip
        elif contrast.verdict == verdict.INCONCLUSIVE:
            more, shows = _needs(found, comparison, fitted, objective, family)
            contrast = replace(contrast, needs_seeds=more, shows=shows)
    elif found is not None:
        contrast = replace(contrast, needs_seeds=max(1, verdict.LEAST_SEEDS - found.n))
    divergence = contrast.divergence
    if divergence is not None and divergence.any and comparison.estimand != "shared":
        contrast = _with_divergence(contrast, divergence, table, comparison, objective, family)
    return replace(contrast, sentence=sentences.contrast(contrast, objective, say, seeds_inert))


def _open(
    table: Table,
    comparison: Comparison,
    found: Estimate | None,
    ask: Asked,
    *,
    confidence: float,
) -> Contrast:
    """A contrast of which nothing is decided yet."""
    return Contrast(
        factor=comparison.factor,
        level=comparison.level,
        reference=comparison.reference,
        estimand=comparison.estimand,
        n=found.n if found else 0,
        delta=found.delta if found else None,
        confidence=confidence,
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
        wins=_wins(found, ask.objective),
        rho=_rho(table, comparison),
        verdict=verdict.INCONCLUSIVE,
        direction=None,
        basis="none",
        identical=_identical(table, found, comparison),
        needs_seeds=None if comparison.estimand == "missing" else verdict.LEAST_SEEDS,
        shows=None,
        divergence=_divergence(table, comparison, ask.objective),
        outcomes=_outcomes(table, comparison.level_rows),
        aliases=tuple(ask.aliases.get(comparison.factor, ())),
        warnings=_conditions(comparison),
        sentence="",
    )


def _conditions(comparison: Comparison) -> tuple[str, ...]:
    notes = []
    if comparison.without:
        names = " and ".join(comparison.without)
        notes.append(
            f"judged without {names}, with which most runs diverge whatever {comparison.factor} is"
        )
    if comparison.empty:
        used = len(comparison.pairs)
        notes.append(
            f"averaged over {used} of {used + comparison.empty} settings of the other factors: "
            "in the rest a cell has no completed run"
        )
    return tuple(notes)


def _with_interval(
    contrast: Contrast,
    comparison: Comparison,
    found: Estimate,
    objective: Objective,
    family: Family,
) -> Contrast:
    """Interval, tests and verdict of a contrast that has an estimate of its noise."""
    delta, se = found.delta, found.standard_error
    margin = objective.margin
    if family.is_sequential:
        single = anytime_half(found, family.alpha)
        narrow = anytime_half(found, 2 * family.alpha)
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
            float(scipy.special.stdtr(found.df, -nearer / se)) if se > 0 else float(nearer <= 0)
        )
        p_equivalence = min(1.0, p_equivalence * family.split)
    word = verdict.judge(delta, different=different, inside=inside, margin=margin)
    differences = found.differences
    direction = None
    if different:
        direction = "better" if objective.gain(delta) > 0 else "worse"
    return replace(
        contrast,
        ci=around(delta, single),
        ci_adjusted=around(delta, family.half_width(comparison, found)),
        ci_equivalence=around(delta, narrow),
        standard_error=se,
        method="confidence sequence" if family.is_sequential else found.method,
        p=p_of(found, family.is_sequential),
        p_adjusted=p_adjusted,
        p_equivalence=p_equivalence,
        p_sign_flip=sign_flip_p(differences) if len(differences) >= 2 else None,
        verdict=word,
        direction=direction,
        basis="none" if word == verdict.INCONCLUSIVE else "difference",
        needs_seeds=None if word == verdict.INCONCLUSIVE else 0,
        warnings=(*contrast.warnings, *_doubts(found)),
    )


def _doubts(found: Estimate) -> list[str]:
    """Why the interval of an estimate may not be what it says."""
    doubts = []
    differences = found.differences
    if len(differences) >= 8 and np.ptp(differences) > ROUNDING:
        skew = float(scipy.stats.skew(differences))
        if abs(skew) > 1:
            doubts.append(
                f"differences are skewed ({skew:+.1f}): the interval may be too narrow; "
                "see the sign-flip p"
            )
    if found.step:
        doubts.append(
            f"the differences are equal, since the metric moves in steps of {_step(found.step)}: "
            "the noise is taken as that of rounding to a step"
        )
    if found.method == effects.UNPAIRED:
        doubts.append("no two seeds pair: judged by Welch's test, which is the less sure one")
    if found.method == effects.LONE:
        doubts.append("a single run: its noise is taken to be that of the side with several")
    return doubts


def _step(step: float) -> str:
    """1/12 where a step is a share of so many, as of images."""
    parts = round(1 / step) if step else 0
    if 2 <= parts <= 100_000 and abs(parts * step - 1) < 1e-6:
        return f"1/{parts}"
    return f"{step:.4g}"


def _with_divergence(
    contrast: Contrast,
    divergence: Divergence,
    table: Table,
    comparison: Comparison,
    objective: Objective,
    family: Family,
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
    found: Estimate, comparison: Comparison, fitted: Fit, objective: Objective, family: Family
) -> tuple[int | None, float | None]:
    """(more seeds that decide a contrast with an interval, the difference that these n show)."""
    n = found.n
    sigma = found.standard_error * math.sqrt(n)
    cells = len(fitted.rows) if not found.why_not_pooled and len(fitted.rows) > 2 else None

    def half_widths(total: int) -> tuple[float, float]:
        error = sigma / math.sqrt(total)
        df = power.degrees(total, cells)
        if family.is_sequential:
            grown = found.information * total / n
            return (
                anytime.anytime_half_width(error, df, grown, alpha=family.alpha / family.size),
                anytime.anytime_half_width(error, df, grown, alpha=2 * family.alpha),
            )
        apart = power.critical(total, contrasts=family.size, cells=cells, alpha=family.alpha)
        return apart * error, power.t_quantile(family.alpha, df) * error

    more = verdict.more_seeds(
        found.delta, n, sigma=sigma, margin=objective.margin, half_widths=half_widths,
        df=found.df, spread=family.spread,
    )  # fmt: skip
    if not sigma > 0 or n < 2:
        return more, None
    # `power` speaks of two cells' difference: sqrt(2) times the noise of one where it is pooled.
    scale = sigma / math.sqrt(2) if cells else sigma
    shows = power.mde(n, sigma=scale, contrasts=family.size, cells=cells, alpha=family.alpha)
    return more, max(shows, objective.margin or 0.0)


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
    others = ~(table.outcomes == "diverged").any(axis=1)
    others[[*comparison.level_rows, *comparison.reference_rows]] = False
    return int((table.outcomes[others] == "completed").sum())


def _outcomes(table: Table, rows: Sequence[int]) -> dict[str, int]:
    found = [str(o) for o in table.outcomes[list(rows)].ravel() if o] if rows else []
    return {name: found.count(name) for name in dict.fromkeys(found)}


def _wins(found: Estimate | None, objective: Objective) -> float | None:
    if found is None or not len(found.differences):
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
