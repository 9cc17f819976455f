"""The factors of a sweep as axes: where a level lies, and where a factor counts at all."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ablate.analysis.results import Cell, FloatArray

_NODES = 17
"""Places of a range over which its mean is taken; the response is smooth between them."""


@dataclass(frozen=True, slots=True)
class Axis:
    """One factor: a range, levels in an order, or names without one."""

    name: str
    levels: tuple[str, ...] = ()
    """In order if `is_ordered`; empty for a range."""
    twins: tuple[tuple[str, str], ...] = ()
    """(level, the one among `levels` that is the same experiment)."""
    low: float = 0.0
    high: float = 1.0
    is_log: bool = False
    is_whole: bool = False
    is_ordered: bool = False
    only_if: tuple[tuple[str, frozenset[str]], ...] = ()
    """(other factor, its levels at which this one changes anything); empty: always."""

    @property
    def is_smooth(self) -> bool:
        """Neighbours on it are alike; names are as far apart from each other as can be."""
        return not self.levels or self.is_ordered

    @property
    def nodes(self) -> FloatArray:
        """Positions that stand for the whole axis, each with the same weight."""
        if not self.levels:
            return np.linspace(0.0, 1.0, _NODES)
        return np.array([self.position(level) for level in self.levels])

    def position(self, level: str) -> float:
        """0 to 1 along a range or an order, the place among names; NaN for an unknown level.

        A baseline may lie outside the range that is searched, and so outside 0 to 1.
        """
        if self.levels:
            level = dict(self.twins).get(level, level)
            if level not in self.levels:
                return math.nan
            place = float(self.levels.index(level))
            return place / max(len(self.levels) - 1, 1) if self.is_ordered else place
        try:
            value = float(level)
        except ValueError:
            return math.nan
        low, high = self.low, self.high
        if self.is_log:
            if value <= 0:
                return -0.5
            value, low, high = math.log(value), math.log(low), math.log(high)
        return min(max((value - low) / (high - low), -0.5), 1.5)

    def level(self, position: float) -> str:
        """The level at a position; of a range its value with four digits."""
        if self.levels:
            scale = max(len(self.levels) - 1, 1) if self.is_ordered else 1
            return self.levels[min(max(round(position * scale), 0), len(self.levels) - 1)]
        value = self.value(position)
        return str(round(value)) if self.is_whole else repr(float(f"{value:.4g}"))

    def value(self, position: float) -> float:
        """The number at a position of a range."""
        if self.is_log:
            return self.low * math.exp(position * math.log(self.high / self.low))
        return self.low + position * (self.high - self.low)


def positions(axes: Sequence[Axis], cells: Sequence[Cell]) -> FloatArray:
    """[cell, axis]; NaN where a factor does not count, so that its setting says nothing."""
    names = [axis.name for axis in axes]
    found = np.full((len(cells), len(axes)), np.nan)
    for row, cell in enumerate(cells):
        levels = dict(zip(names, cell, strict=True))
        for column, axis in enumerate(axes):
            if counts(axis, levels):
                found[row, column] = axis.position(levels[axis.name])
    return found


def counts(axis: Axis, levels: Mapping[str, str]) -> bool:
    """Whether the factor changes anything in a cell with these levels."""
    return all(levels.get(name) in wanted for name, wanted in axis.only_if)
