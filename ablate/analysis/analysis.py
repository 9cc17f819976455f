"""Results -> `Analysis`: every contrast with its interval and verdict, and one sentence a factor.

analysis = analyze_results(results, baseline={"warmup": "10000", ...},
                           objective=Objective("accuracy", "maximize", margin=0.005))
analysis.factors[0].sentence
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np
import scipy

from ablate.analysis import effects, sentences, verdict
from ablate.analysis.answer import (
    Analysis,
    Contrast,
    FactorSummary,
    Interaction,
)
from ablate.analysis.cells import best, noise_of, summarise
from ablate.analysis.contrasts import ALPHA, ROUNDING, Asked, Judged, judge
from ablate.analysis.divergence import clopper_pearson
from ablate.analysis.effects import Comparison
from ablate.analysis.fit import Fit
from ablate.analysis.importance import importances
from ablate.analysis.interactions import find_interactions
from ablate.analysis.results import Cell, Objective, Result, Table, tabulate
from ablate.analysis.screening import screen
from ablate.analysis.settle import at_chance, settle, sides_at_chance, simple_effects
from ablate.analysis.tuning import Tuned
from ablate.errors import AnalysisError
from ablate.words import counted

__all__ = ["ALPHA", "Analysis", "Contrast", "Interaction", "analyze_results"]


def analyze_results(
    results: Iterable[Result],
    *,
    baseline: Mapping[str, str],
    objective: Objective,
    adjustment: str = "dunnett",
    is_sequential: bool = False,
    first_look: int | None = None,
    is_running: bool = False,
    is_exploratory: bool = False,
    estimand: str = "auto",
    aliases: Mapping[str, Sequence[str]] | None = None,
    partial: Mapping[str, str] | None = None,
    unlearnt: str = "",
    tuned: Mapping[tuple[str, str], Tuned] | None = None,
) -> Analysis:
    """Judge every level of every factor against the baseline's level.

    `baseline` names the level of every factor in the cell all others are compared with (for
    leave-one-out: the best cell). `adjustment`: dunnett | holm | none. `is_sequential`: seeds were
    added by looking at the results; intervals and p-values are then valid at any time, and wider.
    `first_look`: how many seeds there were at the first look, if that was fixed beforehand: half
    of the error is spent there on ordinary, narrower intervals. What was decided at any look stays
    decided, however many seeds other contrasts still needed. `is_running`: only the first look
    counts as an earlier one (quicker; enough to know where to add seeds).
    `is_exploratory`: the cells were chosen by a search. `estimand`: auto | simple | additive, see
    effects.compare; fractions and searches are additive. `aliases`: factor -> effects confounded
    with it, from the design; `partial`: what it is confounded with in part, in words. `unlearnt`:
    why the runs are known to have learnt nothing, if they are. `tuned`: (factor, level) -> how both
    sides of its contrast were tuned, where they were. Raises AnalysisError for results
    that do not fit together.
    """
    if adjustment not in ("dunnett", "holm", "none"):
        raise AnalysisError(f"adjustment {adjustment!r}: use 'dunnett', 'holm' or 'none'")
    table = tabulate(results)
    reference = _reference_cell(table, baseline)
    ask = Asked(objective, adjustment, estimand, aliases or {})
    first = first_look if is_sequential and first_look is not None and first_look >= 2 else None
    alpha = ALPHA if first is None else ALPHA / 2
    again = is_sequential and first != len(table.seeds)  # where they are equal, it is the first
    judged = judge(table, reference, ask, alpha=alpha, is_sequential=again)
    contrasts = judged.contrasts
    if first is not None and again:
        looks = range(first, first + 1 if is_running else len(table.seeds))
        contrasts = _as_decided(judged, table, reference, ask, looks=looks, alpha=alpha)
    fitted, comparisons, say = judged.fitted, judged.comparisons, judged.say
    interactions = find_interactions(
        table, reference, fitted, objective, say, estimand=estimand, is_sequential=again
    )
    unlearnt = unlearnt or at_chance(table, objective)
    simple = simple_effects(table, reference, fitted, interactions, objective)
    taught_nothing = sides_at_chance(table, reference, contrasts, objective)
    if unlearnt:
        taught_nothing = {(c.factor, c.level): unlearnt for c in contrasts}
    contrasts = settle(
        contrasts, interactions, simple,
        aliases=aliases or {}, partial=partial or {}, unlearnt=taught_nothing, say=say,
        objective=objective, tuned=tuned or {}, sigma=math.sqrt(max(fitted.typical.mse, 0.0)),
    )  # fmt: skip
    cells = summarise(table, reference)
    return Analysis(
        objective=objective,
        baseline=dict(zip(table.factors, reference, strict=True)),
        alpha=ALPHA,
        adjustment=judged.adjustment,
        is_sequential=is_sequential,
        is_exploratory=is_exploratory,
        num_runs=int((table.outcomes != "").sum()),
        seeds=table.seeds,
        headline=sentences.headline(contrasts, interactions, unlearnt=unlearnt),
        unlearnt=unlearnt,
        factors=_summaries(table, contrasts, say),
        contrasts=contrasts,
        interactions=interactions,
        simple=simple,
        not_estimable=_not_estimable(table, interactions, contrasts, aliases),
        importances=importances(table, comparisons, fitted, exploratory=is_exploratory),
        screen=screen(table, reference) if fitted.df < 1 else None,
        noise=noise_of(table, fitted.typical),
        cells=cells,
        best=best(cells, objective),
        guards=_noisier(table, reference, fitted),
        warnings=(
            *_warnings(table, reference, fitted, comparisons, judged.seeds_inert),
            *_switched(adjustment, judged),
        ),
    )


# ---- parts -----------------------------------------------------------------------------------


def _as_decided(
    judged: Judged,
    table: Table,
    reference: Cell,
    ask: Asked,
    *,
    looks: range,
    alpha: float,
) -> tuple[Contrast, ...]:
    """The contrasts, each as the first look that decided it did; the first is not sequential."""

    def tell(contrast: Contrast) -> str:
        return sentences.contrast(contrast, ask.objective, judged.say, judged.seeds_inert)

    contrasts: Sequence[Contrast] = judged.contrasts
    decided: set[tuple[str, str]] = set()
    for look in looks:
        before = judge(
            table.of_seeds(table.seeds[:look]), reference, ask, alpha=alpha,
            is_sequential=look > looks.start,
        )  # fmt: skip
        contrasts = [
            c if (c.factor, c.level) in decided else _earlier(c, before.contrasts, tell)
            for c in contrasts
        ]
        decided |= {
            (c.factor, c.level) for c in before.contrasts if c.verdict != verdict.INCONCLUSIVE
        }
    return tuple(contrasts)


def _earlier(
    contrast: Contrast, early: Sequence[Contrast], tell: Callable[[Contrast], str]
) -> Contrast:
    """The contrast as an earlier look decided it, if it did."""
    for before in early:
        same = (before.factor, before.level) == (contrast.factor, contrast.level)
        if same and before.verdict != verdict.INCONCLUSIVE:
            seeds = before.n
            if before.divergence is not None and before.basis != "difference":
                seeds = max(before.divergence.level[1], before.divergence.reference[1])
            note = f"decided at {counted(seeds, 'seed')}; the estimate is of all seeds"
            found = replace(
                contrast, verdict=before.verdict, direction=before.direction, basis=before.basis,
                needs_seeds=0, p_adjusted=before.p_adjusted, warnings=(*contrast.warnings, note),
            )  # fmt: skip
            # A confidence sequence of few seeds has no end, and what decided is told then.
            return replace(found, sentence=tell(found) if found.ci else before.sentence)
    return contrast


def _reference_cell(table: Table, baseline: Mapping[str, str]) -> Cell:
    missing = [factor for factor in table.factors if factor not in baseline]
    if missing:
        raise AnalysisError(
            f"the baseline gives no level to {', '.join(missing)}: name one for each factor"
        )
    return tuple(baseline[factor] for factor in table.factors)


def _summaries(
    table: Table, contrasts: Sequence[Contrast], say: sentences.Scale
) -> tuple[FactorSummary, ...]:
    return tuple(
        _summarize(factor, own, say)
        for factor in table.factors
        if (own := [c for c in contrasts if c.factor == factor])
    )


def _summarize(factor: str, contrasts: Sequence[Contrast], say: sentences.Scale) -> FactorSummary:
    words = {c.verdict for c in contrasts if not c.identical} or {verdict.INCONCLUSIVE}
    order = (
        verdict.MATTERS, verdict.DEPENDS, verdict.STANDS_OUT, verdict.INCONCLUSIVE,
        verdict.NEGLIGIBLE, verdict.EQUIVALENT,
    )  # fmt: skip
    word = next(w for w in order if w in words)
    return FactorSummary(factor, word, sentences.factor(factor, contrasts, say))


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


def _noisier(table: Table, reference: Cell, fitted: Fit) -> tuple[str, ...]:
    """A sentence for each cell that is noisier than those that are left."""
    if fitted.noisiest is None:
        return ()
    row, ratio, p = fitted.noisiest
    said = sentences.noisier(table, reference, row, ratio, p, is_apart=fitted.rest is not None)
    return (said, *(_noisier(table, reference, fitted.rest) if fitted.rest else ()))


def _switched(asked: str, judged: Judged) -> tuple[str, ...]:
    if judged.adjustment == asked:
        return ()
    return (
        f"{len(judged.contrasts)} comparisons are more than {asked.capitalize()}'s adjustment is "
        f"made for: {judged.adjustment.capitalize()}'s is taken.",
    )


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
        if (table.outcomes[row] != "").any() and set(table.outcomes[row]) <= {
            "", "failed", "infeasible", "lost", "pruned",
        }:  # fmt: skip
            notes.append("No run of the baseline completed: nothing can be compared with it.")
        k = table.count(row, "diverged")
        n = k + table.count(row, "completed")
        if k:
            low, high = clopper_pearson(k, n)
            rest = "differences to it rest on its survivors" if k < n else "it has no survivors"
            notes.append(
                f"The setting that is compared with diverged in {k} of {n} runs ({low:.0%} to "
                f"{high:.0%}): {rest}."
            )
    if len(fitted.residuals) >= 20 and np.ptp(fitted.residuals) > ROUNDING:
        skew = float(scipy.stats.skew(fitted.residuals))
        if abs(skew) > 1:
            notes.append(
                f"Residuals are skewed ({skew:+.1f}): intervals may be too narrow; compare the "
                "sign-flip p."
            )
    return tuple(notes)
