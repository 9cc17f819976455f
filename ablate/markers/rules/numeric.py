"""Markers of broken arithmetic: non-finite numbers, and an fp16 scaler that gives up."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ablate.markers.event import Context, Event, Row, event
from ablate.markers.rule import Rule
from ablate.markers.series import Streak, Window


@dataclass
class NonFinite(Rule):
    """A loss, gradient norm or parameter that is NaN or infinite.

    One non-finite row is an event, ``fatal_after`` in a row are NUMERIC_FAIL, and so is a
    trace that ends on one, or a single non-finite parameter: it cannot heal. An infinite
    gradient that the fp16 scaler skipped is the scaler's business (scaler_skips).
    """

    name: ClassVar[str] = "non_finite"
    reads: ClassVar[tuple[str, ...]] = ("loss", "grad_norm", "params_non_finite")

    fatal_after: int = 3
    """Consecutive rows with a non-finite loss or gradient norm that end the trial."""
    stop: bool = True

    streak: Streak = field(default_factory=Streak, init=False)
    quantity: str = field(default="", init=False)
    """What was non-finite at the start of the streak."""
    skipped: float | None = field(default=None, init=False)
    scale: float | None = field(default=None, init=False)
    params_bad: bool = field(default=False, init=False)

    def update(self, row: Row) -> Iterable[Event]:
        found = self._parameters(row)
        handled = self._scaler_skipped(row)
        bad = [
            name
            for name in ("loss", "grad_norm")
            if (value := row.get(name)) is not None
            and not math.isfinite(value)
            and not (name == "grad_norm" and handled)
        ]
        if not bad:
            self.streak.extend(False, row.step)
            return found
        length = self.streak.extend(True, row.step)
        if length == 1:
            self.quantity = bad[0]
        if length == 1 or length == self.fatal_after:
            found.append(self._tell(row.step, row.step, fatal=length >= self.fatal_after, row=row))
        return found

    def evaluate(self, row: Row) -> Iterable[Event]:
        return self._parameters(row)

    def finish(self, step: int) -> Iterable[Event]:
        if 0 < self.streak.length < self.fatal_after:
            return [self._tell(step, step, fatal=True)]
        return ()

    def _tell(self, last: int, at: int, *, fatal: bool, row: Row | None = None) -> Event:
        first, length = self.streak.first_step, self.streak.length
        value = row.get(self.quantity) if row is not None else None
        where = f"from step {first}" if length > 1 else f"at step {first}"
        evidence: dict[str, Any] = {} if value is None else {"value": value}
        return event(
            self.name,
            kind="row",
            quantity=self.quantity,
            first_step=first,
            last_step=last,
            detected_at=at,
            verdict="NUMERIC_FAIL" if fatal else "SPIKY",
            flag="NON_FINITE",
            stop=fatal and self.stop and row is not None,
            message=f"{self.quantity} is not finite {where} ({length} rows in a row)",
            rows=length,
            **evidence,
        )

    def _parameters(self, row: Row) -> list[Event]:
        count = row.get("params_non_finite")
        if not count or self.params_bad:
            return []
        self.params_bad = True
        return [
            event(
                self.name,
                kind="parameters",
                quantity="params_non_finite",
                first_step=row.step,
                last_step=row.step,
                detected_at=row.step,
                verdict="NUMERIC_FAIL",
                flag="NON_FINITE",
                stop=self.stop,
                message=f"{count:.0f} parameter values are not finite at step {row.step}",
                count=count,
            )
        ]

    def _scaler_skipped(self, row: Row) -> bool:
        """Whether the scaler saw the infinite gradient of this row and skipped the step."""
        skipped, scale = row.get("skipped_steps"), row.get("scaler_scale")
        handled = (skipped is not None and skipped > (self.skipped or 0.0)) or (
            scale is not None and self.scale is not None and scale < self.scale
        )
        self.skipped, self.scale = skipped, scale
        return handled


@dataclass
class ScalerSkips(Rule):
    """An fp16 gradient scaler that skips too many optimizer steps.

    PyTorch's scaler doubles its scale after 2000 clean steps and halves it on an infinite
    gradient, so a healthy run skips about one step in 2000. Every skip is a step in which
    the schedule moved on and the weights did not.
    """

    name: ClassVar[str] = "scaler_skips"
    reads: ClassVar[tuple[str, ...]] = ("skipped_steps", "scaler_scale")

    window: int = 1000
    """Rows over which the rate of skips is taken (also the denominator of shorter runs)."""
    rate: float = 0.01
    fatal_streak: int = 20
    """Consecutive skips after which the scaler has nothing left to give."""
    fatal_scale: float = 1.0
    """A scale below this no longer lifts small gradients into fp16's range."""
    stop: bool = True

    history: Window = field(default_factory=lambda: Window(1), init=False)
    skipped: float | None = field(default=None, init=False)
    scale: float | None = field(default=None, init=False)
    streak: Streak = field(default_factory=Streak, init=False)
    high: bool = field(default=False, init=False)
    low_scale: bool = field(default=False, init=False)

    def start(self, context: Context) -> None:
        self.history = Window(self.window)

    def update(self, row: Row) -> Iterable[Event]:
        skipped, scale = row.get("skipped_steps"), row.get("scaler_scale")
        if skipped is None and scale is None:
            return ()
        skips = self._new_skips(skipped, scale)
        self.skipped, self.scale = skipped, scale
        self.history.push(skips)
        found = []
        if self.streak.extend(skips > 0, row.step) == self.fatal_streak:
            found.append(self._fatal(row, f"{self.fatal_streak} steps skipped in a row", "streak"))
        if scale is not None and scale < self.fatal_scale and not self.low_scale:
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
