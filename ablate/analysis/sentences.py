"""The analysis in plain words. Never "no effect": an undecided contrast says what would decide it.

Level and factor names come from the user and are not escaped here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ablate.analysis import verdict
from ablate.analysis.effects import LONE, UNPAIRED
from ablate.analysis.results import Cell, Objective, Table
from ablate.words import counted

if TYPE_CHECKING:
    from ablate.analysis.answer import Contrast, Interaction, SimpleEffect

Interval = tuple[float, float]
MOST_DECIMALS = 8


@dataclass(frozen=True, slots=True)
class Scale:
    """How numbers of this study are written: unit and decimals, the same everywhere."""

    is_percent: bool
    decimals: int

    @classmethod
    def of(cls, objective: Objective, deltas: Sequence[float], sigma: float | None) -> Scale:
        """Two digits of the noise (or of the margin, or of the largest difference)."""
        sizes = [sigma or 0.0, objective.margin or 0.0, max(map(abs, deltas), default=0.0)]
        size = next((s for s in sizes if s > 0), 1.0) * (100 if objective.percent else 1)
        return cls(objective.percent, min(MOST_DECIMALS, max(0, 1 - math.floor(math.log10(size)))))

    def amount(self, x: float) -> str:
        """A size with its unit: "1.30 points" or "0.0130"."""
        return f"{self._number(x)} points" if self.is_percent else self._number(x)

    def margin(self, x: float) -> str:
        """A size that was given, which is not rounded to the digits of the noise."""
        shown = x * (100 if self.is_percent else 1)
        text = self._number(x)
        text = text if math.isclose(float(text), shown, rel_tol=0.01) else f"{shown:.3g}"
        return f"{text} points" if self.is_percent else text

    def signed(self, x: float) -> str:
        text = self.amount(x)
        return text if x < 0 else f"+{text}"

    def interval(self, ci: Interval) -> str:
        return f"{self._number(ci[0])} to {self._number(ci[1])}"

    def _number(self, x: float) -> str:
        shown = x * (100 if self.is_percent else 1)
        text = f"{shown:.{self.decimals}f}"
        if float(text) != 0:
            return text
        # Numbers are tiny beside the margin, or the margin beside them.
        return f"{shown:.2g}" if shown and self.decimals in (0, MOST_DECIMALS) else text.lstrip("-")


def headline(
    contrasts: Sequence[Contrast], interactions: Sequence[Interaction], *, unlearnt: str = ""
) -> str:
    """How many factors got which answer, and which of them depend on each other."""
    if unlearnt and contrasts:
        return (
            f"Nothing was learnt: {unlearnt}. So nothing can be said about what changes it: train "
            "longer, or with more data, until a run is clearly better than chance. "
            + headline(contrasts, interactions)
        )
    if not contrasts:
        return "There is nothing to compare with the baseline yet."
    factors = list(dict.fromkeys(c.factor for c in contrasts))
    compared = [c for c in contrasts if not c.identical]
    words = {f: {c.verdict for c in compared if c.factor == f} for f in factors}
    matter = [f for f in factors if verdict.MATTERS in words[f]]
    standing = [f for f in factors if verdict.STANDS_OUT in words[f] and f not in matter]
    linked = [f for f in factors if verdict.DEPENDS in words[f] and f not in matter]
    # What is open for no other reason than divergence is told by itself, below.
    waiting = {
        c.factor for c in compared if c.verdict == verdict.INCONCLUSIVE and not _diverges_more(c)
    }
    same = [c for c in contrasts if c.identical]
    inert = list(
        dict.fromkeys(f"{c.factor}={c.level}" if words[c.factor] else c.factor for c in same)
    )
    told = {*matter, *standing, *linked}
    open_ = [f for f in factors if f not in told and f in waiting]
    settled = [
        f for f in factors if f not in told and words[f] and verdict.INCONCLUSIVE not in words[f]
    ]
    parts = []
    for names, one, many in (
        (matter, "matters", "matter"),
        (standing, "stands out, alone or through a pair of others", "stand out, alone or in pairs"),
        (settled, "changes nothing of interest", "change nothing of interest"),
        (open_, "is undecided", "are undecided"),
        (inert, "changed no run: is it applied?", "changed no run: are they applied?"),
    ):
        if names:
            parts.append(f"{', '.join(names)} {one if len(names) == 1 else many}")
    for f, g in dict.fromkeys(i.factors for i in interactions if i.verdict == verdict.MATTERS):
        parts.append(f"the effects of {f} and {g} depend on each other")
    text = "; ".join(parts)
    text += "." if text and not text.endswith("?") else ""
    gone = [c for c in contrasts if _diverges_more(c)]
    if gone:
        listed = "; ".join(_diverged_in(c) for c in gone[:4])
        more = f"; {len(gone) - 4} more levels diverged" if len(gone) > 4 else ""
        text = f"{text} {listed}{more}; how much worse that is, is not a matter of points."
    return text.strip()


def _diverges_more(c: Contrast) -> bool:
    """Its runs diverged at a higher rate than the reference's."""
    if c.divergence is None or c.estimand == "shared":
        return False
    (k1, n1), (k0, n0) = c.divergence.level, c.divergence.reference
    return k1 * max(n0, 1) > k0 * max(n1, 1)


def _diverged_in(c: Contrast) -> str:
    assert c.divergence is not None
    (k1, n1), (k0, n0) = c.divergence.level, c.divergence.reference
    return f"{c.factor}={c.level} diverged in {k1} of {n1} runs ({c.reference}: {k0} of {n0})"


def factor(name: str, contrasts: Sequence[Contrast], say: Scale) -> str:
    """One sentence for a factor: its answer, then a clause for each level."""
    words = [c.verdict for c in contrasts if not c.identical]
    if not words:
        lead = "changed no run"
    elif verdict.MATTERS in words:
        lead = "matters"
    elif verdict.DEPENDS in words:
        lead = "depends on another factor"
    elif verdict.STANDS_OUT in words:
        lead = "stands out, alone or through a pair of others"
    elif verdict.INCONCLUSIVE in words:
        lead = "is undecided" if len(set(words)) == 1 else "is partly undecided"
    elif verdict.NEGLIGIBLE in words:
        lead = "makes a difference smaller than the margin"
    else:
        lead = "can be set either way within the margin"
    clauses = "; ".join(c.sentence.rstrip(".") for c in contrasts)
    if set(words) == {verdict.INCONCLUSIVE}:
        clauses = clauses.replace(" is undecided: ", ": ")
    return f"{name} {lead}: {clauses}."


def contrast(c: Contrast, objective: Objective, say: Scale, seeds_inert: bool) -> str:
    """One sentence for one level against its reference."""
    text = _contrast(c, objective, say, seeds_inert)
    if c.aliases:
        text = f"{text.rstrip('.')} (or it is {' or '.join(c.aliases)}: this design cannot tell)."
    return text


def _contrast(c: Contrast, objective: Objective, say: Scale, seeds_inert: bool) -> str:
    pair = f"{c.level} against {c.reference}"
    if c.estimand == "shared":
        return f"{c.level} and {c.reference} are the same experiment and share their runs."
    if c.divergence is not None and c.divergence.any and c.basis != "difference":
        if c.verdict == verdict.INCONCLUSIVE and diverges_alike(c):
            return _diverged_alike(c, objective, say)
        return _diverged(c, say)
    if c.delta is None:
        return _without_difference(c, pair)
    if c.identical:
        return (
            f"{c.level} and {c.reference} gave identical results in all {counted(c.n, 'seed')}: "
            f"this level changed nothing in the run; is it applied?"
        )
    if seeds_inert:
        return (
            f"{pair} differs by {say.signed(c.delta)}, but the seeds change nothing in any run, so "
            "how sure that is cannot be said: undecided."
        )
    if c.ci is None and c.verdict == verdict.INCONCLUSIVE:
        why = f"{counted(c.n, 'seed')} only, " if c.n < 2 else ""
        return (
            f"{pair} is undecided: {why}difference {say.signed(c.delta)} without an interval; "
            f"{_wanted(c, say)}."
        )
    evidence = _evidence(c, say)
    margin = say.margin(objective.margin or 0.0)
    if c.verdict == verdict.MATTERS:
        text = f"{c.level} is {c.direction} than {c.reference}: {say.signed(c.delta)}"
        also = _beyond(c, objective, margin)
        if c.divergence is not None and c.divergence.any:
            also += f"; and {_rates(c)}"
        return f"{text} ({evidence}{also})."
    if c.verdict == verdict.NEGLIGIBLE:
        return (
            f"{c.level} is {c.direction} than {c.reference}, but by less than the margin of "
            f"{margin}: {say.signed(c.delta)} ({evidence})."
        )
    if c.verdict == verdict.EQUIVALENT:
        wide = f"{100 * (2 * c.confidence - 1):g} % interval"
        inner = f"{wide} {say.interval(c.ci_equivalence)}, " if c.ci_equivalence else ""
        return (
            f"{c.level} and {c.reference} are equivalent within the margin of {margin}: "
            f"{say.signed(c.delta)} ({inner}{counted(c.n, 'seed')})."
        )
    reason = ""
    if c.p_adjusted is not None and c.p is not None and c.p_adjusted > 0.05 >= c.p:
        reason = "; it would count as a difference if it were the only question asked"
    elif c.direction is not None:
        reason = f"; it is {c.direction}, but whether by more than {margin} is open"
    return f"{pair} is undecided: {say.signed(c.delta)} ({evidence}){reason}; {_wanted(c, say)}."


def _evidence(c: Contrast, say: Scale) -> str:
    """Interval and seeds; no interval where an earlier look decided."""
    seeds = counted(c.n, "seed") if c.method != LONE else "a single run against several"
    if c.ci is None:
        return f"{seeds}, without an interval"
    text = f"{100 * c.confidence:g} % interval {say.interval(c.ci)}, {seeds}"
    if c.method == UNPAIRED:
        text += " a side that do not pair, so by Welch's test"
    return text


def _beyond(c: Contrast, objective: Objective, margin: str) -> str:
    """Whether the difference is shown to exceed the margin, or only to be one."""
    if not objective.margin or c.ci_adjusted is None:
        return ""
    low, high = c.ci_adjusted
    if low > objective.margin or high < -objective.margin:
        return f"; more than the margin of {margin} is shown"
    return f"; that it exceeds the margin of {margin} is not shown"


def _diverged(c: Contrast, say: Scale) -> str:
    alive = ""
    if c.delta is not None:
        alive = f" (survivors only: {say.signed(c.delta)}, {counted(c.n, 'seed')})"
    if c.verdict == verdict.MATTERS:
        return f"{c.level} is {c.direction} than {c.reference}: {_rates(c)}{alive}."
    return f"{c.level} against {c.reference} is undecided: {_rates(c)}{alive}; {_wanted(c, say)}."


def depends(
    c: Contrast, interactions: Sequence[Interaction], simple: Sequence[SimpleEffect], say: Scale
) -> str:
    """What the level does at each level of its partners; its average answers nothing."""
    partners = [
        next(f for f in i.factors if f != c.factor)
        for i in interactions
        if i.verdict == verdict.MATTERS
        and (c.factor, c.level) in zip(i.factors, i.levels, strict=True)
    ]
    listed = "; ".join(
        f"with {s.given[0]}={s.given[1]} {say.signed(s.delta)} (95 % interval {say.interval(s.ci)})"
        for s in simple
    )
    average = f"; on average {say.signed(c.delta)}" if c.delta is not None else ""
    names = " and ".join(dict.fromkeys(partners))
    return f"{c.level} against {c.reference} depends on {names}: {listed}{average}."


def unlearnt(c: Contrast, why: str, say: Scale) -> str:
    """A difference between runs that learnt nothing."""
    size = f"{say.signed(c.delta)}, but " if c.delta is not None else ""
    return f"{c.level} against {c.reference} is undecided: {size}{why}: equal scores mean nothing."


def tuned(c: Contrast, lost: float, seeds: int, objective: Objective, say: Scale) -> str:
    """A difference that the choice of the settings may explain."""
    assert c.delta is not None
    better, worse = (c.level, c.reference)
    if objective.gain(c.delta) < 0:
        better, worse = worse, better
    size = f"as much as {say.amount(lost)}" if math.isfinite(lost) else "any amount"
    return (
        f"{c.level} against {c.reference} is undecided: at the settings chosen for them {better} "
        f"is better by {say.amount(abs(c.delta))}, but the choice of those of {worse}, on "
        f"{counted(seeds, 'tuning seed')}, may have cost {size}: tune on more seeds."
    )


def diverges_alike(c: Contrast) -> bool:
    """Runs diverged, on both sides at the same rate: that tells nothing of the level."""
    if c.divergence is None or not c.divergence.any:
        return False
    (k1, n1), (k0, n0) = c.divergence.level, c.divergence.reference
    return n1 > 0 and n0 > 0 and k1 * n0 == k0 * n1


def was_seen(c: Contrast) -> bool:
    """Whether any run tells of it: on both sides of one seed, or by its divergence."""
    return c.n > 0 or (c.divergence is not None and c.divergence.any)


def _diverged_alike(c: Contrast, objective: Objective, say: Scale) -> str:
    assert c.divergence is not None
    (k1, n1), (k0, n0) = c.divergence.level, c.divergence.reference
    text = (
        f"{c.level} against {c.reference} is undecided: both diverge alike, in {k1} of {n1} and "
        f"{k0} of {n0} runs"
    )
    if c.delta is None:
        return f"{text}, and no seed is left to compare; compare them where runs survive."
    alive = f"the survivors differ by {say.signed(c.delta)} ({counted(c.n, 'seed')}"
    margin = objective.margin
    if c.ci_equivalence is not None and margin and max(map(abs, c.ci_equivalence)) < margin:
        alive += f", within the margin of {say.margin(margin)}"
    return f"{text}; {alive}), which equates no runs that diverge: mend the divergence first."


def _rates(c: Contrast) -> str:
    assert c.divergence is not None
    (k1, n1), (k0, n0) = c.divergence.level, c.divergence.reference
    low, high = c.divergence.level_rate_ci
    sure = c.divergence.higher
    side = f"higher one with probability {sure:.0%}"
    if sure < 0.5:
        side = f"lower one with probability {1 - sure:.0%}"
    return (
        f"{c.level} diverged in {k1} of {n1} runs (rate {low:.0%} to {high:.0%}), "
        f"{c.reference} in {k0} of {n0} (Fisher p = {c.divergence.fisher_p:.2g}; the rate of "
        f"{c.level} is the {side})"
    )


def _without_difference(c: Contrast, pair: str) -> str:
    """Why there is none."""
    lost = ", ".join(
        f"{k} of its runs {name}" for name, k in c.outcomes.items() if name != "completed"
    )
    if not lost and c.outcomes:
        return f"{pair} cannot be judged: {c.reference} has no result to be compared with."
    if c.estimand == "missing" and "completed" in c.outcomes:
        return (
            f"{pair} cannot be judged: the cells in which runs completed do not separate "
            f"{c.factor} from the other factors."
        )
    return f"{pair} has no seed in which both have a result{f' ({lost})' if lost else ''}."


def _wanted(c: Contrast, say: Scale) -> str:
    """What more seeds would bring; never a number beyond MOST_SEEDS."""
    if c.needs_seeds is None or c.needs_seeds > verdict.MOST_SEEDS:
        text = f"more than {verdict.MOST_SEEDS} more seeds would be needed"
        if c.divergence is not None and c.divergence.any:
            return f"{text} to tell the rates apart"
        if c.shows is not None:
            text += f"; {counted(c.n, 'seed')} show differences from {say.amount(c.shows)} on"
        return text
    seeds = counted(c.needs_seeds, "more seed")
    if c.ci is None and not (c.divergence and c.divergence.any):
        return f"run at least {seeds}"
    if c.divergence is not None and c.divergence.any:
        return f"{seeds} would decide it if the rates stay"
    return f"{seeds} would decide it with a probability of 80 %"


def interaction(i: Interaction, say: Scale) -> str:
    """One sentence for one interaction."""
    (f, g), (one, two) = i.factors, i.levels
    text = f"{f}={one} with {g}={two}: together {say.signed(i.delta)} beyond the sum of both"
    if i.ci is None:
        return f"{text}, without an interval."
    text = f"{text} (95 % interval {say.interval(i.ci)})"
    return {
        verdict.MATTERS: f"{text}: the effect of one depends on the "
        "other, and what is said of each alone is an average.",
        verdict.NEGLIGIBLE: f"{text}: real, but smaller than the margin.",
        verdict.EQUIVALENT: f"{text}: additive within the margin.",
        verdict.INCONCLUSIVE: f"{text}: undecided.",
    }[i.verdict]


def cell(table: Table, reference: Cell, row: int) -> str:
    """A cell by its differences from the baseline."""
    changes = [
        f"{f}={name}"
        for f, name, base in zip(table.factors, table.cells[row], reference, strict=True)
        if name != base
    ]
    return ", ".join(changes) or "the baseline"


def noisier(
    table: Table, reference: Cell, row: int, ratio: float, p: float, *, is_apart: bool
) -> str:
    """That a cell looks noisier than the others, and what its noise counts in."""
    counted = "counts in no other setting's interval" if is_apart else "is in every comparison"
    return (
        f"The runs of {cell(table, reference, row)} look noisier than the others' ({ratio:.1f} "
        f"times their standard deviation, p = {p:.2g}; one outlying run can do that): the "
        f"intervals of its comparisons are wider for it, and its noise {counted}."
    )
