"""The marker of the temperature."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ablate.markers.event import Context, Event, Row, event
from ablate.markers.marker import Marker
from ablate.markers.series import Window


@dataclass
class LogitScale(Marker):
    """The temperature at its limit, fallen, or jumping.

    ``logit_scale`` is exp of the parameter, which open_clip clamps to [1, 100] after every
    step. At the upper limit for ``saturated_share`` of ``window`` rows, comparisons of
    anything that acts through the temperature mean little; it is where most long runs end, and
    no fault. Beyond the limit nothing clamps it. Below ``fallen`` after the warm-up the logits
    can no longer tell pairs apart; below ``fallen_share`` of its own highest value since, it is
    on its way there. A jump of ``jump`` in its logarithm within
    ``jump_steps`` is faster than Adam moves it at common learning rates.
    """

    name: ClassVar[str] = "logit_scale"
    reads: ClassVar[tuple[str, ...]] = ("logit_scale",)

    limit: float = 100.0
    window: int = 500
    saturated_share: float = 0.9
    fallen: float = 3.0
    fallen_share: float = 0.5
    jump: float = 0.3
    jump_steps: int = 100

    seen: int = field(default=0, init=False)
    at_limit: Window = field(default_factory=lambda: Window(1), init=False)
    past: Window = field(default_factory=lambda: Window(1), init=False)
    """Logarithms of the last ``jump_steps`` steps."""
    saturated: bool = field(default=False, init=False)
    low: bool = field(default=False, init=False)
    highest: float = field(default=0.0, init=False)
    """Since the warm-up."""
    unbounded: bool = field(default=False, init=False)
    jumped_at: int = field(default=-1, init=False)
    """Row of the last jump told: until it has left the window it is not told again."""

    def start(self, context: Context) -> None:
        self.at_limit = Window(context.rows(self.window, share=0.2, least=50))
        self._lookback = context.near(self.jump_steps)
        self.past = Window(self._lookback)
        self._warmup = context.warmup

    def update(self, row: Row) -> Iterable[Event]:
        scale = row.finite("logit_scale")
        self.seen += 1
        if scale is None or scale <= 0.0:
            return ()
        log_scale = math.log(scale)
        moved = log_scale - self.past.oldest if self.past.count else 0.0
        self.past.push(log_scale)
        return [
            *self._saturated(row.step, scale),
            *self._unbounded(row.step, scale),
            *self._fallen(row.step, scale),
            *self._jumped(row.step, scale, moved),
        ]

    def _saturated(self, step: int, scale: float) -> Iterable[Event]:
        self.at_limit.push(float(scale >= self.limit * math.exp(-1e-3)))
        share = self.at_limit.mean() if self.at_limit.full else 0.0
        if share > self.saturated_share and not self.saturated:
            self.saturated = True
            message = f"the temperature is at its limit of {self.limit:g}"
            yield self._tell(step, "saturated", "info", "SATURATED", message, scale, share=share)
        elif share < self.saturated_share / 2.0:
            self.saturated = False

    def _unbounded(self, step: int, scale: float) -> Iterable[Event]:
        if scale > self.limit * math.exp(1e-2) and not self.unbounded:
            self.unbounded = True
            message = (
                f"the temperature is {scale:.4g}, beyond its limit of {self.limit:g}: nothing "
                "clamps it"
            )
            yield self._tell(step, "unbounded", "warning", "SCALE_UNBOUNDED", message, scale)

    def _fallen(self, step: int, scale: float) -> Iterable[Event]:
        if step > self._warmup:
            self.highest = max(self.highest, scale)
        floor = max(self.fallen, self.fallen_share * self.highest)
        if step > self._warmup and scale < floor and not self.low:
            self.low = True
            whence = f", from {self.highest:.3g}" if self.highest > scale else " during the warm-up"
            message = f"the temperature fell to {scale:.3g}{whence}" + (
                ": logits are nearly uniform" if scale < self.fallen else ""
            )
            yield self._tell(step, "fallen", "warning", "SCALE_FALLEN", message, scale)
        elif scale > 1.5 * floor:
            self.low = False

    def _jumped(self, step: int, scale: float, moved: float) -> Iterable[Event]:
        if abs(moved) <= self.jump:
            return
        if self.jumped_at < 0 or self.seen - self.jumped_at > self._lookback:
            message = (
                f"the temperature moved by {moved:+.2f} (log) to {scale:.3g} within "
                f"{self.jump_steps} steps"
            )
            yield self._tell(step, "jump", "info", "SCALE_JUMP", message, scale, moved=moved)
        self.jumped_at = self.seen

    def _tell(
        self,
        step: int,
        kind: str,
        severity: Any,
        flag: str,
        message: str,
        scale: float,
        **evidence: Any,
    ) -> Event:
        return event(
            self.name,
            kind=kind,
            quantity="logit_scale",
            first_step=step,
            last_step=step,
            detected_at=step,
            severity=severity,
            flag=flag,
            message=message,
            value=scale,
            **evidence,
        )
