"""The analysis in plain words. Never "no effect": an undecided contrast says what would decide it.

Level and factor names come from the user and are not escaped here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ablate.analysis import verdict
from ablate.analysis.effects import Guard
from ablate.analysis.results import Cell, Objective, Table
from ablate.wording import counted

if TYPE_CHECKING:
    from ablate.analysis.answer import Contrast, Interaction

Interval = tuple[float, float]


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
        return cls(objective.percent, min(8, max(0, 1 - math.floor(math.log10(size)))))

    def amount(self, x: float) -> str:
        """A size with its unit: "1.30 points" or "0.0130"."""
        return f"{self._number(x)} points" if self.is_percent else self._number(x)

    def signed(self, x: float) -> str:
        text = self.amount(x)
        return text if x < 0 else f"+{text}"

    def interval(self, ci: Interval) -> str:
        return f"{self._number(ci[0])} to {self._number(ci[1])}"

    def _number(self, x: float) -> str:
        text = f"{x * (100 if self.is_percent else 1):.{self.decimals}f}"
        return text.lstrip("-") if float(text) == 0 else text


def headline(contrasts: Sequence[Contrast], interactions: Sequence[Interaction]) -> str:
    """How many factors got which answer, and which of them depend on each other."""
    if not contrasts:
        return "There is nothing to compare with the baseline yet."
    factors = list(dict.fromkeys(c.factor for c in contrasts))
    words = {f: {c.verdict for c in contrasts if c.factor == f} for f in factors}
    matter = [f for f in factors if verdict.MATTERS in words[f]]
    open_ = [f for f in factors if f not in matter and verdict.INCONCLUSIVE in words[f]]
    settled = [f for f in factors if f not in matter and f not in open_]
    parts = []
    for names, one, many in (
        (matter, "matters", "matter"),
        (settled, "changes nothing of interest", "change nothing of interest"),
        (open_, "is undecided", "are undecided"),
    ):
        if names:
            parts.append(f"{', '.join(names)} {one if len(names) == 1 else many}")
    for f, g in dict.fromkeys(i.factors for i in interactions if i.verdict == verdict.MATTERS):
        parts.append(f"the effects of {f} and {g} depend on each other")
    return "; ".join(parts) + "."


def factor(name: str, contrasts: Sequence[Contrast], say: Scale) -> str:
    """One sentence for a factor: its answer, then a clause for each level."""
    words = [c.verdict for c in contrasts]
    if verdict.MATTERS in words:
        lead = "matters"
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
        return _diverged(c, say)
    if c.delta is None:
        lost = ", ".join(f"{k} of its runs {name}" for name, k in c.outcomes.items())
        return f"{pair} has no seed in which both have a result{f' ({lost})' if lost else ''}."
    if seeds_inert:
        return (
            f"{pair} differs by {say.signed(c.delta)}, but the seeds change nothing in any run, so "
            "how sure that is cannot be said: undecided."
        )
    if c.ci is None:
        why = f"{counted(c.n, 'seed')} only, " if c.n < 2 else ""
        return (
            f"{pair} is undecided: {why}difference {say.signed(c.delta)} without an interval; "
            f"{_wanted(c)}."
        )
    evidence = f"95 % interval {say.interval(c.ci)}, {counted(c.n, 'seed')}"
    margin = say.amount(objective.margin or 0.0)
    if c.verdict == verdict.MATTERS:
        text = f"{c.level} is {c.direction} than {c.reference}: {say.signed(c.delta)}"
        also = ""
        if c.divergence is not None and c.divergence.any:
            also = f"; and {_rates(c)}"
        return f"{text} ({evidence}{also})."
    if c.verdict == verdict.NEGLIGIBLE:
        return (
            f"{c.level} is {c.direction} than {c.reference}, but by less than the margin of "
            f"{margin}: {say.signed(c.delta)} ({evidence})."
        )
    if c.verdict == verdict.EQUIVALENT:
        inner = f"90 % interval {say.interval(c.ci_equivalence)}, " if c.ci_equivalence else ""
        return (
            f"{c.level} and {c.reference} are equivalent within the margin of {margin}: "
            f"{say.signed(c.delta)} ({inner}{counted(c.n, 'seed')})."
        )
    reason = ""
    if c.p_adjusted is not None and c.p is not None and c.p_adjusted > 0.05 >= c.p:
        reason = "; it would count as a difference if it were the only question asked"
    elif c.direction is not None:
        reason = f"; it is {c.direction}, but whether by more than {margin} is open"
    return f"{pair} is undecided: {say.signed(c.delta)} ({evidence}){reason}; {_wanted(c)}."


def _diverged(c: Contrast, say: Scale) -> str:
    alive = ""
    if c.delta is not None:
        alive = f" (survivors only: {say.signed(c.delta)}, {counted(c.n, 'seed')})"
    if c.verdict == verdict.MATTERS:
        return f"{c.level} is {c.direction} than {c.reference}: {_rates(c)}{alive}."
    return f"{c.level} against {c.reference} is undecided: {_rates(c)}{alive}; {_wanted(c)}."


def _rates(c: Contrast) -> str:
    assert c.divergence is not None
    (k1, n1), (k0, n0) = c.divergence.level, c.divergence.reference
    low, high = c.divergence.level_rate_ci
    return (
        f"{c.level} diverged in {k1} of {n1} runs (rate {low:.0%} to {high:.0%}), "
        f"{c.reference} in {k0} of {n0}"
    )


def _wanted(c: Contrast) -> str:
    if c.needs_seeds is None:
        return "no affordable number of seeds would decide it"
    if c.ci is None and not (c.divergence and c.divergence.any):
        return f"run at least {counted(c.needs_seeds, 'more seed')}"
    return f"about {counted(c.needs_seeds, 'more seed')} would decide it"


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


def guard(table: Table, reference: Cell, found: Guard) -> str:
    """Why a cell left the shared variance."""
    return (
        f"The runs of {cell(table, reference, found.row)} are noisier than the others' "
        f"({found.share:.0%} of the sum of all cells' variances, Cochran p = {found.share_p:.3f}, "
        f"Brown-Forsythe p = {found.brown_forsythe_p:.3f}): its contrasts use only their own "
        "differences."
    )
