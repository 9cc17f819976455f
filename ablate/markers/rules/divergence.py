"""The marker of runs that are lost: a loss that rose and stayed, or rests at chance level."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import fmean, median
from typing import Any, ClassVar

from ablate.markers.event import UNIFORM, Context, Event, Row, event
from ablate.markers.marker import Marker
from ablate.markers.series import Ema, Episode, Streak, Wander


@dataclass
class Divergence(Marker):
    """A run that is lost: its loss went up and stayed, or says nothing any more.

    ``rise``: the smoothed loss stays above its lowest value so far by more than
    max(``rise`` nat, ``rise_sigmas`` * noise) for ``hold`` rows. Noise is the deviation of
    successive differences (over root 2) at the time of that lowest value (of a value in the first
    ``smooth`` rows, the largest of these): in a steep descent the deviation of a window would be
    mostly the descent, and hide a rise of several nat. Where neighbours are alike, differences
    show little of the noise: the deviation of the last rows counts if it is larger (``wandering``).

    ``chance``: the smoothed loss stays within ``chance_band`` of ln(global batch), which is
    the loss of uniform logits, after ``Context.settled``, and does not fall from the first half of
    these rows to their second by more than noise explains. Holding matters: every healthy run
    crosses that value once, on its way down. ``hold`` rows are enough for a run that was better
    once, or whose loss moves by less than ``silent`` nat from row to row, since it says the same of
    everything (a fifth of them where features have collapsed); one that searches has
    ``chance_hold``.

    A second, faster mean must agree each time, so that rows after a recovery do not count.
    In shorter runs ``hold`` shrinks to a fifth of the run, but not below ``least_hold``, and
    ``chance_hold`` to a half.

    A run of fewer than ``live_rows`` rows is never stopped, one that searches not below
    ``patient_rows``: it is judged once, at its end, by the same limits on its last fifth
    (``last_rows`` at least); a loss that is below chance by more than three standard errors has
    left it. Small transformers leave chance level at steps 60 to 110 on pictures, at 130 to 300 on
    clips of motion, and learn as well as any from there; a short run that goes on for nothing costs
    less than a wrong verdict.

    ``overshoot`` is a label only: in the first rows, before any window is filled, the loss
    climbs max(``overshoot`` nat, ``overshoot_sigmas`` * noise) above where it began. Nats are those
    of a cross entropy; of another loss they stand for shares of where it began
    (``Context.in_nats``).
    """

    name: ClassVar[str] = "divergence"
    reads: ClassVar[tuple[str, ...]] = ("loss",)
    needs: ClassVar[tuple[str, ...]] = ("global_batch",)

    smooth: int = 100
    rise: float = 0.5
    rise_sigmas: float = 5.0
    hold: int = 500
    chance_band: float = 0.05
    chance_hold: int = 2000
    silent: float = 0.01
    least_hold: int = 200
    live_rows: int = 300
    patient_rows: int = 1000
    last_rows: int = 20
    overshoot: float = 0.5
    overshoot_sigmas: float = 7.0
    stop: bool = True

    seen: int = field(default=0, init=False)
    slow: Ema = field(default_factory=lambda: Ema(1), init=False)
    fast: Ema = field(default_factory=lambda: Ema(1), init=False)
    roughness: Ema = field(default_factory=lambda: Ema(1), init=False)
    """Mean square of the difference between neighbouring rows."""
    before: float | None = field(default=None, init=False)
    first: float | None = field(default=None, init=False)
    nat: float = field(default=1.0, init=False)
    """What a nat is in the unit of this loss."""
    best: float | None = field(default=None, init=False)
    """Lowest value of the slow mean."""
    best_step: int = field(default=0, init=False)
    best_noise: float = field(default=0.0, init=False)
    wander: Wander = field(default_factory=Wander, init=False)
    risen: Streak = field(default_factory=Streak, init=False)
    at_chance: Streak = field(default_factory=Streak, init=False)
    held: list[float] = field(default_factory=list, init=False)
    """Losses of the rows of ``at_chance``."""
    told_chance: bool = field(default=False, init=False)
    collapsed: list[str] = field(default_factory=list, init=False)
    """Features that another marker found collapsed, and not yet recovered."""
    first_norm: float | None = field(default=None, init=False)
    last_norm: float | None = field(default=None, init=False)
    last: list[list[float]] = field(default_factory=list, init=False)
    """[step, loss] of the last fifth of a run of which something is judged at its end."""
    climb: Climb = field(default_factory=lambda: Climb(), init=False)

    def start(self, context: Context) -> None:
        self._span = span = context.rows(self.smooth, share=0.1, least=20)
        self.slow, self.fast = Ema(span), Ema(max(3, span // 5))
        self.roughness = Ema(span)
        rows = context.rows_total
        is_short = rows is not None and rows < self.patient_rows
        self._num_last = max(self.last_rows, rows // 5) if rows is not None and is_short else 0
        self._is_live = rows is None or rows >= self.live_rows
        self._hold = self.hold if rows is None else min(self.hold, max(self.least_hold, rows // 5))
        self._chance_hold = self.chance_hold if rows is None else min(self.chance_hold, rows // 2)
        self._chance = context.chance_loss
        self._named = "ln(batch) = " if context.uniform_loss is None else ""
        self._settled = context.settled
        self._in_nats = context.in_nats
        self._early_rows = context.rows(128, share=0.1, least=32)

    def update(self, row: Row) -> Iterable[Event]:
        loss = row.finite("loss")
        self.seen += 1
        if loss is None:
            return ()
        slow, fast = self.slow.push(loss), self.fast.push(loss)
        apart = 0.0 if self.before is None else loss - self.before
        self.before = loss
        self.wander.push(loss)
        noise = (self.roughness.push(apart * apart) / 2.0) ** 0.5
        if self.first is None:
            self.first, self.first_norm = loss, row.finite("grad_norm")
            self.nat = 1.0 if self._in_nats else abs(loss) / UNIFORM
        if self.best is None or slow < self.best:
            self.best, self.best_step, self.best_noise = slow, row.step, noise
        elif self.seen <= self._span:  # a mean of few rows, and a noise of fewer
            self.best_noise = max(self.best_noise, noise)
        self.last_norm = row.finite("grad_norm")
        if self.seen <= self._early_rows:
            self.climb.push(self.seen, row.step, loss, limit=self.first + self.overshoot * self.nat)
        found = list(self.climb.told(self.overshoot_sigmas)) if self.climb.ended(self.seen) else []
        if self._num_last:
            self.last = [*self.last, [row.step, loss]][-self._num_last :]
        if not self._is_live:
            return found
        found.extend(self._rise(row, slow, fast))
        found.extend(self._at_chance(row, loss, slow, fast))
        return found

    def finish(self, step: int) -> Iterable[Event]:
        found = list(self.climb.told(self.overshoot_sigmas)) if self.climb.open else []
        self.wander.renew()
        if self._num_last and len(self.last) == self._num_last:
            found.extend(self._judge_last(step))
        return found

    def hear(self, told: Sequence[Event], row: Row) -> Iterable[Event]:
        """Features that collapse make chance level certain before its time."""
        for item in told:
            if item.marker == "feature_collapse":
                quantity = str(item.evidence["quantity"])
                self.collapsed = [name for name in self.collapsed if name != quantity]
                if item.verdict == "COLLAPSED":
                    self.collapsed.append(quantity)
        return ()

    def _rise(self, row: Row, slow: float, fast: float) -> Iterable[Event]:
        limit = self._limit
        if self.risen.extend(slow > limit and fast > limit, row.step) != self._hold:
            return ()
        return [self._tell_rise(self.risen.first_step, row.step, slow, self._hold)]

    def _at_chance(self, row: Row, loss: float, slow: float, fast: float) -> Iterable[Event]:
        if self._chance is None:
            return ()
        band = self.chance_band
        holds = (
            row.step > self._settled
            and abs(slow - self._chance) < band
            and abs(fast - self._chance) < 2.0 * band
        )
        length = self.at_chance.extend(holds, row.step)
        if not length:
            self.told_chance = False
            return ()
        if self.told_chance or length > self._chance_hold:
            return ()
        self.held = [*self.held, loss] if length > 1 else [loss]
        first = self.at_chance.first_step
        if self.collapsed and length >= max(10, self._hold // 5):
            because = "; its features have collapsed"
            return [_tell_chance(self, first, row.step, slow, length, because=because)]
        if length not in (self._hold, self._chance_hold):
            return ()
        half = length // 2
        if self._learns(fmean(self.held[:half]) - fmean(self.held[half:]), length):
            self.at_chance.extend(False, row.step)  # if slowly: begin anew
            return ()
        if self._searches and (length < self._chance_hold or self._num_last):
            return ()
        return [_tell_chance(self, first, row.step, slow, length)]

    @property
    def _searches(self) -> bool:
        """Never better than chance so far, and the loss of the rows held at it still moves."""
        assert self.best is not None and self._chance is not None
        apart = fmean((b - a) ** 2 for a, b in pairwise(self.held)) / 2.0
        was_better = self.best < self._chance - 2.0 * self.chance_band
        return not was_better and math.sqrt(apart) >= self.silent * self.nat

    def _learns(self, fell: float, rows: int) -> bool:
        """Whether the loss fell by more than noise between the halves of so many rows."""
        return fell > max(0.2 * self.chance_band, 3.0 * self._noise * math.sqrt(4.0 / rows))

    @property
    def _noise(self) -> float:
        """Deviation of one row's loss, by the differences of neighbouring rows."""
        return math.sqrt(self.roughness.mean / 2.0)

    def _judge_last(self, step: int) -> Iterable[Event]:
        """A short run, by its last fifth."""
        first, losses = int(self.last[0][0]), [loss for _, loss in self.last]
        mean, half = fmean(losses), len(losses) // 2
        if not self._is_live and min(mean, self.fast.mean) > self._limit:
            yield self._tell_rise(first, step, mean, len(losses))
        if self._chance is None or first <= self._settled or self.told_chance:
            return
        fell = fmean(losses[:half]) - fmean(losses[half:])
        apart = self._chance - mean
        if abs(apart) < self.chance_band and not (
            self._learns(fell, len(losses)) or apart > 3.0 * self._noise / len(losses) ** 0.5
        ):
            yield _tell_chance(self, first, step, mean, len(losses), stops=False)

    @property
    def _limit(self) -> float:
        """Where a rise begins."""
        assert self.best is not None
        noise = max(self.best_noise, self.wander.deviation)
        return self.best + max(self.rise * self.nat, self.rise_sigmas * noise)

    def _tell_rise(self, first: int, last: int, level: float, rows: int) -> Event:
        return event(
            self.name,
            kind="rise",
            quantity="loss",
            first_step=first,
            last_step=last,
            detected_at=last,
            verdict="DIVERGED",
            flag="LOSS_ROSE",
            stop=self.stop and self._is_live,
            message=f"loss rose from {self.best:.4g} (step {self.best_step}) to {level:.4g} "
            f"and stayed there for {rows} rows",
            smoothed=level,
            lowest=self.best,
            lowest_step=self.best_step,
            limit=self._limit,
            rows=rows,
        )


class Climb:
    """The rows with which a run begins, and how far the loss climbs there above its first."""

    def __init__(self) -> None:
        self._losses: list[float] = []
        self._high = Episode(2, 10)

    @property
    def open(self) -> bool:
        return self._high.open

    def push(self, row: int, step: int, loss: float, *, limit: float) -> None:
        """Take in the next row that has a loss; it is high above `limit`."""
        self._losses.append(loss)
        if loss > limit:
            self._high.hit(row, step, loss)

    def ended(self, row: int) -> bool:
        return self._high.ended(row)

    def told(self, sigmas: float) -> Iterable[Event]:
        """Of a climb that is over, unless noise explains it, which is known by now."""
        began, peak = self._losses[0], self._high.peak[2]
        if peak - began <= sigmas * _noise_of(self._losses):
            return
        yield event(
            Divergence.name,
            kind="overshoot",
            quantity="loss",
            first_step=self._high.first_step,
            last_step=self._high.last_step,
            detected_at=self._high.last_step,
            verdict="SPIKY",
            flag="OVERSHOOT",
            message=f"loss began at {began:.4g} and first climbed to {peak:.4g} "
            f"(step {self._high.peak_step})",
            began=began,
            peak=peak,
            peak_step=self._high.peak_step,
        )

    def state(self) -> dict[str, Any]:
        return {"losses": list(self._losses), "high": self._high.state()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._losses = list(state["losses"])
        self._high.load_state(state["high"])


def _noise_of(losses: Sequence[float]) -> float:
    """Deviation of one loss about its course, by medians of differences, which a climb of some rows
    does not move: of neighbours (for noise that goes on as AR .9, of which they show 0.32), or
    eight rows apart (of which a steep course would be most), whichever is less."""
    near, far = (
        median(abs(b - a) for a, b in zip(losses, losses[lag:], strict=False)) / (0.6745 * 2**0.5)
        if len(losses) > lag
        else math.inf
        for lag in (1, 8)
    )
    return min(near / math.sqrt(1 - 0.9), far)


def _tell_chance(
    marker: Divergence,
    first: int,
    last: int,
    level: float,
    rows: int,
    because: str = "",
    stops: bool = True,
) -> Event:
    assert marker._chance is not None
    marker.told_chance = True
    return event(
        Divergence.name,
        kind="chance",
        quantity="loss",
        first_step=first,
        last_step=last,
        detected_at=last,
        verdict="DIVERGED",
        flag="CHANCE_LEVEL",
        stop=marker.stop and stops,
        message=f"loss stays at {level:.4g}, chance level is {marker._named}"
        f"{marker._chance:.4g}: the model tells nothing apart" + because,
        smoothed=level,
        chance=marker._chance,
        lowest=marker.best,
        rows=rows,
        grad_norm=marker.last_norm,
        grad_norm_first=marker.first_norm,
    )
