"""The marker of output logits that grow for nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

from ablate.markers.event import Context, Event, Row, event
from ablate.markers.marker import Marker
from ablate.markers.series import Ema, Streak


@dataclass
class LogitDrift(Marker):
    """Output logits that keep growing although the loss does not fall.

    ``logits_lse``, the mean logsumexp over the rows of the logits, grows in every healthy CLIP
    run with the temperature and with the similarity of true pairs. So it is divided by
    ``logit_scale`` where that is measured, and its rise counts only while nothing is learnt:
    on ``hold`` rows in a row its mean over ``fast`` rows is above that over ``slow`` rows by
    more than ``sigmas`` times its noise, and over these rows the slow mean of the loss did
    not fall by a tenth of the loss's noise, nor by ``still`` of itself (a loss that has come
    to rest has next to no noise, and its slow mean creeps on for long). The undivided mean
    must rise too: logits that say nothing have the logarithm of their number, of which a
    falling temperature makes a larger quotient although no logit grows. (Language models
    bound the logsumexp by a penalty, the z-loss of PaLM; CLIP's temperature is clamped, see
    logit_scale.)
    """

    name: ClassVar[str] = "logit_drift"
    reads: ClassVar[tuple[str, ...]] = ("logits_lse", "loss")

    fast: int = 100
    slow: int = 1000
    sigmas: float = 3.0
    hold: int = 1000
    still: float = 1e-3

    lse_fast: Ema = field(default_factory=lambda: Ema(1), init=False)
    lse_slow: Ema = field(default_factory=lambda: Ema(1), init=False)
    loss_slow: Ema = field(default_factory=lambda: Ema(1), init=False)
    whole_fast: Ema = field(default_factory=lambda: Ema(1), init=False)
    """Of the logsumexp as it is, as lse_fast and lse_slow are of that over the temperature."""
    whole_slow: Ema = field(default_factory=lambda: Ema(1), init=False)
    lse_rough: Ema = field(default_factory=lambda: Ema(1), init=False)
    """Mean square of the difference between neighbouring rows, twice the noise's variance."""
    loss_rough: Ema = field(default_factory=lambda: Ema(1), init=False)
    before: list[float] = field(default_factory=list, init=False)
    """The last row's logsumexp (over the temperature) and loss."""
    streak: Streak = field(default_factory=Streak, init=False)
    loss_then: float = field(default=0.0, init=False)
    """Slow mean of the loss at the streak's start."""

    def start(self, context: Context) -> None:
        fast = context.rows(self.fast, share=0.05, least=10)
        slow = context.rows(self.slow, share=0.2, least=50)
        self.lse_fast, self.lse_slow = Ema(fast), Ema(slow)
        self.whole_fast, self.whole_slow = Ema(fast), Ema(slow)
        self.loss_slow = Ema(slow)
        self.lse_rough, self.loss_rough = Ema(slow), Ema(slow)
        self._hold = context.rows(self.hold, share=0.2, least=50)

    def update(self, row: Row) -> Iterable[Event]:
        lse, loss = row.finite("logits_lse"), row.finite("loss")
        if lse is None or loss is None:
            return ()
        grows = self.whole_fast.push(lse) > self.whole_slow.push(lse)
        scale = row.finite("logit_scale")
        if scale is not None and scale > 0.0:
            lse /= scale
        lse_before, loss_before = self.before or (lse, loss)
        self.before = [lse, loss]
        noise = math.sqrt(self.lse_rough.push((lse - lse_before) ** 2) / 2.0)
        loss_noise = math.sqrt(self.loss_rough.push((loss - loss_before) ** 2) / 2.0)
        rise = self.lse_fast.push(lse) - self.lse_slow.push(lse)
        loss_now = self.loss_slow.push(loss)
        length = self.streak.extend(grows and 0.0 < self.sigmas * noise < rise, row.step)
        if length == 1:
            self.loss_then = loss_now
        if length != self._hold:
            return ()
        if self.loss_then - loss_now > max(0.1 * loss_noise, self.still * self.loss_then):
            self.streak.extend(False, row.step)  # it learns: begin anew
            return ()
        return [
            event(
                self.name,
                kind="drift",
                quantity="logits_lse",
                first_step=self.streak.first_step,
                last_step=row.step,
                detected_at=row.step,
                severity="warning",
                flag="LOGIT_DRIFT",
                message=f"output logits grow ({rise:+.2g} to {self.lse_fast.mean:.3g} "
                f"times the temperature) while the loss does not fall",
                rise=rise,
                noise=noise,
                rows=self._hold,
            )
        ]
