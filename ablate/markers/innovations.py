"""What is new in each row of a noisy series: its innovation in units of its own noise, and how
large the largest of a long run may be expected to be."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Mapping
from typing import Any

import numpy as np

from ablate.markers.series import Window

_LEVEL_EVERY = 4  # rows after which the level is taken anew
_NOISE_EVERY = 32  # and the autocorrelation and scale of the noise
_QUARTILE_SIGMAS = 1.349  # interquartile range of normal noise, in deviations


class Innovations:
    """Whitened: r = x - median of the last ``level`` rows; e = r - phi r', phi the correlation of
    neighbours over the last ``span`` rows (winsorised at 3 deviations, their trend taken out: a
    loss that falls lags behind its median, which is no correlation of its noise); z = (e - median
    of e) / (its interquartile range / 1.349), from ``least`` values of e on. All from the past
    alone, so that a spike does not judge itself, and by ranks, so that one hides no other.
    """

    def __init__(self, level: int = 129, span: int = 1024, least: int = 256) -> None:
        self._least = least
        self._values = Window(level)
        self._residuals = Window(span + 1)
        self._fresh = Window(span)
        self._level = 0.0
        self._noise = [0.0, 0.0, 0.0]
        """phi, and median and deviation of what is new."""
        self._before = 0.0

    def push(self, value: float) -> float | None:
        """z of this row; None until there is enough to tell, or where nothing varies."""
        values, residuals, fresh = self._values, self._residuals, self._fresh
        z = None
        if values.full:
            if values.count % _LEVEL_EVERY == 0 or not residuals.count:
                self._level = float(np.median(values.held))
            residual = value - self._level
            if residuals.count >= self._least // 4:
                if fresh.count % _NOISE_EVERY == 0:
                    self._renew()
                new = residual - self._noise[0] * self._before
                if fresh.count >= self._least and self._noise[2] > 0.0:
                    z = (new - self._noise[1]) / self._noise[2]
                fresh.push(new)
            residuals.push(residual)
            self._before = residual
        values.push(value)
        return z

    def _renew(self) -> None:
        noise = _without_line(self._residuals.held)
        power = float(np.dot(noise[:-1], noise[:-1]))
        phi = float(np.dot(noise[1:], noise[:-1])) / power if power > 0.0 else 0.0
        centre = _median_and_deviation(self._fresh.held) if self._fresh.count else [0.0, 0.0]
        self._noise = [min(max(phi, 0.0), 0.98), *centre]

    def state(self) -> dict[str, Any]:
        return {
            "values": self._values.state(),
            "residuals": self._residuals.state(),
            "fresh": self._fresh.state(),
            "level": self._level,
            "noise": list(self._noise),
            "before": self._before,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._values.load_state(state["values"])
        self._residuals.load_state(state["residuals"])
        self._fresh.load_state(state["fresh"])
        self._level, self._noise = state["level"], list(state["noise"])
        self._before = state["before"]


class Tail:
    """The largest values so far, and from them what the largest of a whole run will be.

    Hill's estimator of the tail index over the largest 0.4 % (20 at least) and one standard
    error of it, extrapolated to a value that one row of ``rows`` exceeds with a chance of
    ``chance`` (Hill 1975, "A simple general approach to inference about the tail of a
    distribution"). Of fewer than ``least`` values nothing is said.
    """

    def __init__(self, keep: int = 400, least: int = 1000) -> None:
        self._least = least
        self._largest: list[float] = []
        self._count = 0
        self._keep = keep

    def push(self, value: float) -> None:
        """Take in a size, of either sign."""
        self._count += 1
        size = abs(value)
        if len(self._largest) <= self._keep:
            insort(self._largest, size)
        elif size > self._largest[0]:
            insort(self._largest, size)
            del self._largest[0]

    def bar(self, rows: int, chance: float) -> float:
        """Infinity while there is too little to go by."""
        k = min(self._keep, max(20, self._count // 250))
        if self._count < self._least:
            return float("inf")
        edge, largest = self._largest[-k - 1], self._largest[-k:]
        if edge <= 0.0:
            return float("inf")
        index = float(np.mean(np.log(np.array(largest) / edge))) * (1.0 + 1.0 / math.sqrt(k))
        # Sizes are of both signs, a spike of one: hence twice the chance.
        return float(edge * (k / self._count * rows / (2.0 * chance)) ** index)

    def share(self, size: float) -> float:
        """Of all values, beyond this size."""
        return (len(self._largest) - bisect_left(self._largest, size)) / max(1, self._count)

    def state(self) -> dict[str, Any]:
        return {"largest": list(self._largest), "count": self._count}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._largest, self._count = list(state["largest"]), state["count"]


def _without_line(values: np.ndarray[Any, np.dtype[np.float64]]) -> Any:
    """Values winsorised at 3 deviations about their median, less their least-squares line."""
    middle, deviation = _median_and_deviation(values)
    near = np.clip(values, middle - 3.0 * deviation, middle + 3.0 * deviation)
    near = near - near.mean()
    time = np.arange(len(near)) - (len(near) - 1) / 2.0
    return near - time * (np.dot(time, near) / np.dot(time, time))


def _median_and_deviation(values: np.ndarray[Any, np.dtype[np.float64]]) -> list[float]:
    size = len(values)
    places = (size // 4, size // 2, size - 1 - size // 4)
    low, middle, high = np.partition(values, places)[list(places)]
    return [float(middle), float(high - low) / _QUARTILE_SIGMAS]
