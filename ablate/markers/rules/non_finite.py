"""The marker of numbers that are none."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ablate.markers.event import Event, Row, event
from ablate.markers.marker import Marker
from ablate.markers.series import Streak


@dataclass
class NonFinite(Marker):
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
