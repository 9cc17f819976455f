"""The marker of an fp16 scaler that gives up."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

from ablate.markers.event import Context, Event, Row, event
from ablate.markers.marker import Marker
from ablate.markers.series import Streak, Window


@dataclass
class ScalerSkips(Marker):
    """An fp16 gradient scaler that skips too many optimizer steps.

    PyTorch's scaler doubles its scale after 2000 clean steps and halves it on an infinite
    gradient, so a healthy run skips about one step in 2000. Every skip is a step in which
    the schedule moved on and the weights did not.

    The scale begins far too high on purpose and finds its place by skipping: before the first
    clean step only a scale below ``first_floor`` condemns, and no skip counts. (Working runs of
    DeepSpeed and SwAV skipped 6 of their first 10 steps.)
    """

    name: ClassVar[str] = "scaler_skips"
    reads: ClassVar[tuple[str, ...]] = ("skipped_steps", "scaler_scale")

    window: int = 1000
    """Rows over which the rate of skips is taken (also the denominator of shorter runs)."""
    rate: float = 0.01
    fatal_streak: int = 20
    """Consecutive skips after which the scaler has nothing left to give."""
    first_floor: float = 2.0**-14
    """A scale below this before the first clean step: the loss itself overflows."""
    fatal_scale: float = 2.0**-5
    """And below this after it: gradients that overflow so are lost."""
    stop: bool = True

    history: Window = field(default_factory=lambda: Window(1), init=False)
    skipped: float | None = field(default=None, init=False)
    scale: float | None = field(default=None, init=False)
    streak: Streak = field(default_factory=Streak, init=False)
    high: bool = field(default=False, init=False)
    low_scale: bool = field(default=False, init=False)
    began: bool = field(default=False, init=False)
    """There was a clean step."""

    def start(self, context: Context) -> None:
        self.history = Window(self.window)

    def update(self, row: Row) -> Iterable[Event]:
        skipped, scale = row.get("skipped_steps"), row.get("scaler_scale")
        if skipped is None and scale is None:
            return ()
        skips = self._new_skips(skipped, scale)
        known = self.skipped is not None or self.scale is not None
        self.skipped, self.scale = skipped, scale
        self.began = self.began or (known and skips == 0)  # nobody saw the first step's scale
        floor = self.fatal_scale if self.began else self.first_floor
        self.history.push(skips if self.began else 0.0)
        found = []
        if self.streak.extend(self.began and skips > 0, row.step) == self.fatal_streak:
            found.append(self._fatal(row, f"{self.fatal_streak} steps skipped in a row", "streak"))
        if scale is not None and scale < floor and not self.low_scale:
            self.low_scale = True
            found.append(self._fatal(row, f"the loss scale fell to {scale:g}", "scale"))
        rate = self.history.sum() / self.window
        if rate > self.rate and not self.high:
            self.high = True
            found.append(
                event(
                    self.name,
                    kind="rate",
                    quantity="skipped_steps",
                    first_step=row.step,
                    last_step=row.step,
                    detected_at=row.step,
                    severity="warning",
                    flag="SCALER_SKIPS",
                    message=f"the scaler skipped {self.history.sum():.0f} of the last "
                    f"{min(self.history.count, self.window)} steps",
                    rate=rate,
                    window=self.window,
                )
            )
        elif rate < self.rate / 2:
            self.high = False
        return found

    def _new_skips(self, skipped: float | None, scale: float | None) -> float:
        if skipped is not None:
            return max(0.0, skipped - (self.skipped or 0.0))
        return float(self.scale is not None and scale is not None and scale < self.scale)

    def _fatal(self, row: Row, what: str, kind: str) -> Event:
        first = self.streak.first_step if kind == "streak" else row.step
        return event(
            self.name,
            kind=kind,
            quantity="skipped_steps" if kind == "streak" else "scaler_scale",
            first_step=first,
            last_step=row.step,
            detected_at=row.step,
            verdict="NUMERIC_FAIL",
            flag="SCALER_SKIPS",
            stop=self.stop,
            message=f"fp16 overflow that does not end: {what} (step {row.step})",
            streak=self.streak.length,
            scale=self.scale,
        )
