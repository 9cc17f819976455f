"""How numbers of a study are written, the same in every format; and the scale they live on."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ablate.analysis.results import Objective
from ablate.study import Study

if TYPE_CHECKING:
    from ablate.analysis.analysis import Analysis
    from ablate.study.table import StudyTable

NONE = "\N{EN DASH}"
"""Stands where there is no number."""


@dataclass(frozen=True, slots=True)
class Scale:
    """How values of the objective are written."""

    percent: bool
    decimals: int

    @property
    def factor(self) -> float:
        return 100.0 if self.percent else 1.0

    @property
    def unit(self) -> str:
        """Of differences."""
        return "points" if self.percent else ""

    def value(self, number: float | None) -> str:
        if number is None:
            return NONE
        text = f"{number * self.factor:.{self.decimals}f}"
        return f"{text} %" if self.percent else text

    def delta(self, number: float | None) -> str:
        if number is None:
            return NONE
        text = f"{abs(number) * self.factor:.{self.decimals}f}"
        if float(text) == 0:
            return text
        return ("+" if number > 0 else "\N{MINUS SIGN}") + text

    def interval(self, interval: tuple[float, float] | None) -> str:
        if interval is None or not all(map(math.isfinite, interval)):
            return NONE
        return f"{self.delta(interval[0])} to {self.delta(interval[1])}"

    def difference(self, number: float | None, interval: tuple[float, float] | None) -> str:
        """With its interval, where there is one: ``+1.5 (+0.9 to +2.1)``."""
        text = self.interval(interval)
        return self.delta(number) if text == NONE else f"{self.delta(number)} ({text})"


def scale_of(study: Study, analyses: Iterable[Analysis]) -> Scale:
    """Two digits of the noise, or else of the margin."""
    percent = study.is_share(study.objective.metric)
    sizes = [a.noise.sigma_residual for a in analyses if a.noise.sigma_residual]
    size = min([*sizes, study.objective.margin]) * (100 if percent else 1)
    return Scale(percent, min(6, max(1, 1 - math.floor(math.log10(size)))))


def probability(p: float | None) -> str:
    if p is None:
        return NONE
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def plain_number(number: float | None, digits: int = 3) -> str:
    return NONE if number is None else f"{number:.{digits}g}"


def objective_of(table: StudyTable) -> Objective:
    """The study's objective as the statistics read it."""
    goal = table.study.objective
    percent = table.study.is_share(goal.metric)
    return Objective(
        metric=goal.metric,
        direction=goal.direction,
        margin=goal.margin,
        chance=table.chance,
        images=table.images if percent else None,
        percent=percent,
    )
