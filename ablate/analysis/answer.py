"""What an analysis says: plain frozen records for the report, the command line and JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np

from ablate.analysis import verdict
from ablate.analysis.divergence import Divergence
from ablate.analysis.importance import Importance
from ablate.analysis.results import Objective
from ablate.analysis.screening import Screen
from ablate.errors import AnalysisError

Interval = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Measured:
    """A factor's level against its reference level. `delta` is level minus reference."""

    factor: str
    level: str
    reference: str
    estimand: str
    """simple | main | additive | shared | missing: see effects.Comparison."""
    n: int
    """Seeds with a difference: both runs completed."""
    delta: float | None
    """Completed runs only; with diverged runs this is the survivors' difference."""
    confidence: float
    """Of its intervals: .95, and .975 where half of the error was spent at a first look."""
    ci: Interval | None
    """Interval of this contrast by itself."""
    ci_adjusted: Interval | None
    """Simultaneous interval over the family; the verdict MATTERS reads this one."""
    ci_equivalence: Interval | None
    """Interval that leaves out twice as much; inside +-margin = equivalence shown (two one-sided
    tests)."""
    standard_error: float | None
    df: float
    method: str
    """two-way, cells' own noise | paired t | confidence sequence | one seed | same runs |
    no data"""
    why_not_pooled: str
    p: float | None
    p_adjusted: float | None
    p_equivalence: float | None
    p_sign_flip: float | None
    """Exact companion of p without the normal assumption; it cannot go below 2/2^n."""
    wins: float | None
    """Share of seeds in which the level was better (ties count half)."""
    rho: float | None
    """Correlation of the two arms over seeds, from 3 seeds on: what pairing by seed gains."""


@dataclass(frozen=True, slots=True)
class Contrast(Measured):
    """What was measured of a level, judged."""

    verdict: str
    direction: str | None
    """better | worse, for the level, when a difference is shown."""
    basis: str
    """What the verdict rests on: difference | divergence | both | none."""
    identical: bool
    """Both sides gave the very same value in every seed."""
    needs_seeds: int | None
    """0 when decided; how many more decide it with probability .8 when not; None when that would
    be more than verdict.MOST_SEEDS."""
    shows: float | None
    """Smallest true difference that as many seeds show with probability .8."""
    divergence: Divergence | None
    outcomes: Mapping[str, int]
    """Outcome -> runs of the level."""
    aliases: tuple[str, ...]
    """Effects this design cannot tell from this one."""
    warnings: tuple[str, ...]
    sentence: str

    @property
    def diverged(self) -> tuple[int, int]:
        """(diverged, completed + diverged) runs of the level."""
        return self.divergence.level if self.divergence else (0, 0)


@dataclass(frozen=True, slots=True)
class FactorSummary:
    """The answer to one factor, in words."""

    factor: str
    verdict: str
    """The strongest verdict of its levels: MATTERS, else INCONCLUSIVE, else the others."""
    sentence: str


@dataclass(frozen=True, slots=True)
class Interaction:
    """Difference of differences: does the effect of one factor depend on the other?"""

    factors: tuple[str, str]
    levels: tuple[str, str]
    delta: float
    ci: Interval | None
    p: float | None
    p_adjusted: float | None
    """Benjamini-Hochberg over the interactions."""
    verdict: str
    sentence: str


@dataclass(frozen=True, slots=True)
class SimpleEffect:
    """A level against its reference where another factor stands at one level."""

    factor: str
    level: str
    reference: str
    given: tuple[str, str]
    """(other factor, its level)."""
    delta: float
    ci: Interval
    """Simultaneous 95 % interval over the two levels of the other factor."""
    verdict: str


@dataclass(frozen=True, slots=True)
class Noise:
    """What the seed alone changes."""

    sigma_seed: float | None
    """Standard deviation of one cell's runs over seeds."""
    sigma_seed_ci: Interval | None
    sigma_residual: float | None
    """The same after the part that is common to all cells of a seed is taken out."""
    sigma_residual_ci: Interval | None
    df: int
    rho: float | None
    """Share of the seed variance that is common to all cells: what pairing takes out."""


@dataclass(frozen=True, slots=True)
class CellSummary:
    """One cell's runs; `changes` are its differences from the baseline."""

    levels: Mapping[str, str]
    changes: Mapping[str, str]
    n: int
    mean: float | None
    sd: float | None
    runs: tuple[tuple[int, str, float | None], ...]
    """(seed, outcome, value) of each run."""


@dataclass(frozen=True, slots=True)
class Basis:
    """What was asked, and of which runs."""

    objective: Objective
    baseline: Mapping[str, str]
    alpha: float
    adjustment: str
    is_sequential: bool
    is_exploratory: bool
    num_runs: int
    seeds: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Analysis(Basis):
    """All that a report says about a study's results."""

    headline: str
    unlearnt: str
    """Why nothing can be said to be equivalent: the runs learnt nothing. Empty if they did."""
    factors: tuple[FactorSummary, ...]
    contrasts: tuple[Contrast, ...]
    interactions: tuple[Interaction, ...]
    simple: tuple[SimpleEffect, ...]
    """Of factors that are shown to depend on each other, each at both levels of the other."""
    not_estimable: tuple[str, ...]
    """What this design cannot answer, in sentences."""
    importances: tuple[Importance, ...]
    screen: Screen | None
    """Effects that stand out from the others, for a two-level screen with one seed."""
    noise: Noise
    cells: tuple[CellSummary, ...]
    best: Mapping[str, str] | None
    """Levels of the cell with the best mean among those without a diverged run."""
    guards: tuple[str, ...]
    """Which cell looks noisier than the others."""
    warnings: tuple[str, ...]

    def contrast(self, factor: str, level: str) -> Contrast:
        for contrast in self.contrasts:
            if (contrast.factor, contrast.level) == (factor, level):
                return contrast
        known = ", ".join(f"{c.factor}={c.level}" for c in self.contrasts)
        raise AnalysisError(f"no contrast {factor}={level}; there are {known}")

    def undecided(self) -> tuple[tuple[str, str], ...]:
        """(factor, level) of the contrasts that more seeds could still decide."""
        return tuple(
            (c.factor, c.level)
            for c in self.contrasts
            if c.verdict == verdict.INCONCLUSIVE and c.estimand not in ("shared", "missing")
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, dicts, strings and finite numbers; what is not known is None."""
        found = plain(self)
        assert isinstance(found, dict)
        return found


def plain(value: Any) -> Any:
    """Lists, dicts, strings and finite numbers of an answer or a part of it."""
    if is_dataclass(value) and not isinstance(value, type):
        found = {f.name: plain(getattr(value, f.name)) for f in fields(value)}
        if isinstance(value, Contrast):
            found["diverged"] = list(value.diverged)
        return found
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, np.integer):
        return int(value)
    return value
