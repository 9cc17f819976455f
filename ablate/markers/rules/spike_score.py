"""The marker of many single outliers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

from ablate.markers.event import Context, Event, Row, event
from ablate.markers.marker import Marker
from ablate.markers.series import Window


@dataclass
class SpikeScore(Marker):
    """The share of recent steps on which the loss or the gradient norm is an outlier.

    An outlier lies more than ``sigma`` deviations above the mean of the last ``window`` rows;
    the share is taken over ``horizon`` rows (OLMo-core, train/callbacks/stability_monitor.py,
    which loses its sight for a whole window after one NaN; here NaN is never taken in).

    A share is told from ``least_outliers`` on, over ``least_rows`` rows at least, and the
    window never shrinks with the run, so runs shorter than it have none. Two outliers are no
    rate: 2 % of healthy runs of 276 rows have them in a window of 32 (loss and norm with
    Student t noise, 4 degrees of freedom), 12 % of 552 rows; four in the full window have
    none of 300.
    """

    name: ClassVar[str] = "spike_score"
    reads: ClassVar[tuple[str, ...]] = ("loss", "grad_norm")

    window: int = 128
    sigma: float = 6.0
    horizon: int = 10_000
    least_rows: int = 1000
    least_outliers: int = 4
    warn: float = 0.001
    spiky: float = 0.01

    seen: int = field(default=0, init=False)
    loss: Window = field(default_factory=lambda: Window(1), init=False)
    grad_norm: Window = field(default_factory=lambda: Window(1), init=False)
    outliers: list[int] = field(default_factory=list, init=False)
    """Row numbers of outliers within the horizon."""
    since: int = field(default=0, init=False)
    """First step of the present excursion of the score; 0 while there is none."""
    told: int = field(default=0, init=False)
    """0, 1 (warned) or 2 (spiky): the worst that the excursion was told as."""

    def start(self, context: Context) -> None:
        self.loss, self.grad_norm = Window(self.window), Window(self.window)

    def update(self, row: Row) -> Iterable[Event]:
        self.seen += 1
        out = False
        for window, name in ((self.loss, "loss"), (self.grad_norm, "grad_norm")):
            value = row.finite(name)
            if value is None:
                continue
            mean, std = window.mean_std()
            above = window.full and std > 0.0 and value > mean + self.sigma * std
            window.push(mean + self.sigma * std if above else value)
            out = out or above
        if out:
            self.outliers.append(self.seen)
        while self.outliers and self.outliers[0] <= self.seen - self.horizon:
            self.outliers.pop(0)
        if not self.outliers and not self.told:
            return ()
        return self._judge(row.step)

    def _judge(self, step: int) -> Iterable[Event]:
        rows = min(self.horizon, max(self.seen, self.least_rows))
        score = len(self.outliers) / rows
        level = 2 if score > self.spiky else 1 if score > self.warn else 0
        if len(self.outliers) < self.least_outliers:
            level = 0
        if score < self.warn / 2:
            self.told, self.since = 0, 0
        if level <= self.told:
            return ()
        self.told = level
        self.since = self.since or step
        return [
            event(
                self.name,
                kind="rate",
                quantity="loss, grad_norm",
                first_step=self.since,
                last_step=step,
                detected_at=step,
                verdict="SPIKY" if level == 2 else "STABLE",
                severity="warning",
                flag="SPIKE_SCORE",
                message=f"{score:.2%} of {rows} steps have an outlier of the loss or the "
                f"gradient norm",
                score=score,
                outliers=len(self.outliers),
                rows=rows,
            )
        ]
