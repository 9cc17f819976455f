"""Running statistics that can be written down and continued: window, mean, episode.

None of them may ever be fed a non-finite number: one NaN in a window makes its mean NaN for
as long as it stays there, which is how two published detectors go blind (see tests).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

WANDER = 128
"""Values that `wandering` is taken over."""
_WANDER_EVERY = 32


class Window:
    """The last ``size`` values and their mean and deviation, recomputed without drift."""

    def __init__(self, size: int) -> None:
        self._values = np.zeros(size)
        self._count = 0

    @property
    def full(self) -> bool:
        return self._count >= len(self._values)

    def push(self, value: float) -> None:
        self._values[self._count % len(self._values)] = value
        self._count += 1

    def mean_std(self) -> tuple[float, float]:
        """Mean and deviation of the values held; a deviation that is only rounding is 0."""
        held = self._values if self.full else self._values[: self._count]
        if not len(held):
            return 0.0, 0.0
        mean = float(np.add.reduce(held)) / len(held)
        apart = held - mean
        std = math.sqrt(float(np.add.reduce(apart * apart)) / len(held))
        return mean, std if std > 1e-10 and std > 1e-9 * abs(mean) else 0.0

    def sum(self) -> float:
        held = self._values if self.full else self._values[: self._count]
        return float(np.add.reduce(held))

    def mean(self) -> float:
        return self.sum() / max(1, min(self._count, len(self._values)))

    @property
    def held(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """The values, oldest first; to be read only."""
        if not self.full:
            return self._values[: self._count]
        return np.roll(self._values, -(self._count % len(self._values)))

    @property
    def count(self) -> int:
        """Values pushed so far, also those no longer held."""
        return self._count

    @property
    def oldest(self) -> float:
        """The value that has been held longest."""
        return float(self._values[self._count % len(self._values) if self.full else 0])

    def state(self) -> dict[str, Any]:
        held = self._values if self.full else self._values[: self._count]
        return {"values": held.tolist(), "count": self._count}

    def load_state(self, state: Mapping[str, Any]) -> None:
        values = state["values"]
        self._values[: len(values)] = values
        self._count = int(state["count"])


class Ema:
    """Exponential mean over about ``span`` values, free of the start's bias."""

    def __init__(self, span: float) -> None:
        self._keep = 1.0 - 2.0 / (span + 1.0)
        self._sum = 0.0
        self._weight = 0.0

    def push(self, value: float) -> float:
        """Take a value in and return the mean."""
        self._sum = self._keep * self._sum + (1.0 - self._keep) * value
        self._weight = self._keep * self._weight + (1.0 - self._keep)
        return self._sum / self._weight

    @property
    def mean(self) -> float:
        return self._sum / self._weight if self._weight else 0.0

    def state(self) -> list[float]:
        return [self._sum, self._weight]

    def load_state(self, state: list[float]) -> None:
        self._sum, self._weight = state


@dataclass
class Episode:
    """Groups hits: ``hits`` of them within ``gap`` rows open it, ``gap`` rows without end it."""

    hits: int
    gap: int
    recent: list[list[float]] = field(default_factory=list, init=False)
    """While closed: hits that may still open it, as [row, step, value, *extra]."""
    open: bool = field(default=False, init=False)
    first: list[float] = field(default_factory=list, init=False)
    """The first hit, as in ``recent``; its extra is what stood before the episode."""
    last: list[float] = field(default_factory=list, init=False)
    peak: list[float] = field(default_factory=list, init=False)
    count: int = field(default=0, init=False)

    def hit(self, row: int, step: int, value: float, *extra: float, alone: bool = False) -> bool:
        """Take a hit in; true when it opens the episode, which it may do ``alone``."""
        entry = [row, step, value, *extra]
        if self.open:
            self.last = entry
            self.count += 1
            if value > self.peak[2]:
                self.peak = entry
            return False
        self.recent = [old for old in self.recent if row - old[0] < self.gap] + [entry]
        if len(self.recent) < self.hits and not alone:
            return False
        self.open = True
        self.first, self.last = self.recent[0], entry
        self.peak = max(self.recent, key=lambda old: old[2])
        self.count = len(self.recent)
        self.recent = []
        return True

    def ended(self, row: int) -> bool:
        """Close it when it has been quiet for ``gap`` rows; true when that happens now."""
        if not self.open or row - self.last[0] <= self.gap:
            return False
        self.open = False
        return True

    @property
    def first_step(self) -> int:
        return int(self.first[1])

    @property
    def last_step(self) -> int:
        return int(self.last[1])

    @property
    def peak_step(self) -> int:
        return int(self.peak[1])

    def state(self) -> dict[str, Any]:
        return {
            "recent": [list(entry) for entry in self.recent],
            "open": self.open,
            "first": list(self.first),
            "last": list(self.last),
            "peak": list(self.peak),
            "count": self.count,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.recent = [list(entry) for entry in state["recent"]]
        self.open = state["open"]
        self.first, self.last = list(state["first"]), list(state["last"])
        self.peak = list(state["peak"])
        self.count = state["count"]


@dataclass
class Streak:
    """Rows in a row on which something holds."""

    length: int = field(default=0, init=False)
    first_step: int = field(default=0, init=False)

    def extend(self, holds: bool, step: int) -> int:
        """Its length after this row."""
        if not holds:
            self.length = 0
            return 0
        if self.length == 0:
            self.first_step = step
        self.length += 1
        return self.length

    def state(self) -> list[int]:
        return [self.length, self.first_step]

    def load_state(self, state: list[int]) -> None:
        self.length, self.first_step = state


class Wander:
    """`wandering` of the last values, taken anew after every 32 of them."""

    def __init__(self) -> None:
        self._values = Window(WANDER)
        self.deviation = 0.0

    def push(self, value: float) -> None:
        self._values.push(value)
        if self._values.count % _WANDER_EVERY == 0:
            self.renew()

    def renew(self) -> None:
        self.deviation = wandering(self._values.held)

    def state(self) -> dict[str, Any]:
        return {"values": self._values.state(), "deviation": self.deviation}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._values.load_state(state["values"])
        self.deviation = state["deviation"]


def wandering(values: np.ndarray[Any, np.dtype[np.float64]]) -> float:
    """Deviation of a series about its course where neighbours are alike: by the median of how far a
    value is from the middle of those 16 rows before and after it (an eighth of fewer than 128),
    which neither a descent nor a step moves. Neighbours' differences show a third of noise that
    goes on as AR .9, and a window of 32 rows holds two or three independent values of it. 0 of
    fewer than 32 values."""
    lag = min(16, len(values) // 8)
    if lag < 4:
        return 0.0
    bent = values[lag:-lag] - (values[: -2 * lag] + values[2 * lag :]) / 2.0
    return float(np.median(np.abs(bent))) / (0.6745 * math.sqrt(1.5))
