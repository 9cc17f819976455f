"""What was expected before the runs, held against what they show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ablate.analysis import verdict
from ablate.analysis.answer import Contrast
from ablate.analysis.contrasts import ALPHA
from ablate.analysis.multiplicity import holm
from ablate.analysis.results import Objective

CONFIRMED, CONTRADICTED, OPEN = "confirmed", "contradicted", "open"


@dataclass(frozen=True, slots=True)
class Expectation:
    """One line of a study's `hypothesis`."""

    factor: str
    level: str | None
    """None: every level of the factor."""
    expected: str
    """better | worse | equivalent, than the baseline's level."""

    @property
    def name(self) -> str:
        return self.factor if self.level is None else f"{self.factor}={self.level}"


@dataclass(frozen=True, slots=True)
class Finding:
    """An expectation of one level, and what came of it."""

    expected: str
    """In words: "beta2=0.98 better"."""
    found: str
    """confirmed | contradicted | open"""
    p: float | None
    """One-sided, of "better" and "worse", adjusted over all of them (Holm)."""
    sentence: str


def hold_against(
    expectations: Sequence[Expectation],
    contrasts: Sequence[Contrast],
    objective: Objective,
    *,
    is_sequential: bool,
) -> tuple[Finding, ...]:
    """A direction that was named beforehand is tested on its own side alone, with 5 % error over
    all such lines together; equivalence, and whatever diverged, is read from the verdict."""
    lines = [
        (wanted, c)
        for wanted in expectations
        for c in contrasts
        if c.factor == wanted.factor and wanted.level in (None, c.level)
    ]
    sided = [_one_sided(wanted, c, objective, is_sequential) for wanted, c in lines]
    adjusted = iter(holm([p for p in sided if p is not None]))
    found = []
    for (wanted, c), p in zip(lines, sided, strict=True):
        shown = next(adjusted) if p is not None else None
        word = _held(wanted.expected, c, shown)
        name = replace(wanted, level=c.level).name
        side = f", one-sided p = {shown:.2g}" if shown is not None else ""
        found.append(
            Finding(
                f"{name} {wanted.expected}", word, shown,
                f"Expected {name} to be {_than(wanted.expected, c)}: {word}{side}. {c.sentence}",
            )
        )  # fmt: skip
    return tuple(found)


def _one_sided(
    wanted: Expectation, c: Contrast, objective: Objective, is_sequential: bool
) -> float | None:
    """None where there is no side, or the contrast has no test by its difference alone."""
    if wanted.expected == "equivalent" or c.p is None or c.delta is None:
        return None
    if c.divergence is not None and c.divergence.any:
        return None
    if is_sequential:
        return c.p  # valid at every look as it stands; half of it is not
    gain = objective.gain(c.delta) * (1 if wanted.expected == "better" else -1)
    return c.p / 2 if gain > 0 else 1 - c.p / 2


def _held(expected: str, c: Contrast, p: float | None) -> str:
    if expected == "equivalent":
        if c.verdict in (verdict.EQUIVALENT, verdict.NEGLIGIBLE):
            return CONFIRMED
        return OPEN if c.verdict == verdict.INCONCLUSIVE else CONTRADICTED
    if c.verdict in (verdict.EQUIVALENT, verdict.NEGLIGIBLE, verdict.DEPENDS):
        return CONTRADICTED if c.direction != expected else CONFIRMED
    if c.direction is not None:
        return CONFIRMED if c.direction == expected else CONTRADICTED
    return CONFIRMED if p is not None and p <= ALPHA else OPEN


def _than(expected: str, c: Contrast) -> str:
    return (
        f"{expected} to {c.reference}"
        if expected == "equivalent"
        else (f"{expected} than {c.reference}")
    )
