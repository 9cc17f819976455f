"""The marker of loss spikes: rows far above what the loss was."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from ablate.markers.event import Context, Event, Row, VerdictName, event
from ablate.markers.innovations import Innovations, Tail
from ablate.markers.marker import Marker
from ablate.markers.series import WANDER, Ema, Episode, Window, wandering

_TERMS, _CLIP = 8, 5.0  # innovations in the sum, and what each may count
_FAR, _CALM_SHARE = 4.0, 1e-3  # normal noise: 6e-5; Student t with 4 degrees of freedom: 1e-2
_BAR_EVERY = 500  # rows after which the bar for one row is taken anew
_NEAR = 8  # rows whose median is where a spike came from


@dataclass
class LossSpike(Marker):
    """A loss far above its recent mean, more than once within a few steps.

    A row hits when loss > mean + ``sigma`` * deviation of the last ``window`` rows; ``hits``
    within ``gap`` steps make a spike (Wortsman et al. 2023, "Stable and low-precision training
    for large-scale vision-language models"). It has recovered when a mean over ``smooth`` rows
    since its end is within one deviation of where it came from, ``recover`` rows after its
    start at most.

    Ordinary noise makes such rows, and the more of them the longer the run and the heavier its
    tails. So a spike is an annotation, and names the run (SPIKY, or DEGRADED if it did not
    recover) only where healthy runs of that length hardly ever have one:

    - up to ``short_rows`` rows: from ``short_sigma`` deviations on;
    - up to ``long_rows``: from ``name_sigma`` deviations with ``name_hits`` hits on;
    - in both, where it also rose from the median of the eight rows before it by ``name_jump``
      deviations of a loss that wanders (see ``wandering``): of noise that goes on as AR .9, the
      window holds so few independent values that their own deviation says little;
    - in longer runs: where innovations z (see ``Innovations``) are too large for the run's own
      noise: the sum of eight, each clipped at 5, over root 8 above ``name_sum`` (``calm_sum``
      where no more than one past row in a thousand was beyond 4, as in normal noise), or a
      single z above ``name_row`` and above what the tail of the run's own past lets one row of
      the run reach with a chance of ``name_chance`` (see ``Tail``). The sum finds what lasts,
      and is blind in strongly correlated noise; there a single row tells.

    A hit enters the window as mean + ``winsor`` * deviation at most, so that a spike neither
    hides the next one nor stays unlearnt for ever. Winsorising already at ``sigma`` would
    shrink the deviation of a heavy-tailed loss: its false alarms rise from 1.8 to 2.2 per
    10 000 steps (Student t with 4 degrees of freedom). The shorter window of a short run takes
    hits in lower, so that one raises the deviation no more than in the full window: in 32 rows
    a hit of 6 deviations would raise it by half, and hide the second hit of a real spike.
    """

    name: ClassVar[str] = "loss_spike"
    reads: ClassVar[tuple[str, ...]] = ("loss",)

    window: int = 128
    sigma: float = 3.2
    hits: int = 2
    gap: int = 10
    winsor: float = 6.0
    sparse_sigma: float = 6.0
    """Where rows lie so far apart that a spike shows in only one, one hit of this size counts."""
    sparse_name_sigma: float = 12.0
    """And one of this size names the run."""
    ignore_first: int = 1000
    """The warm-up is not judged, but no more than this many steps or a fifth of the run."""
    recover: int = 500
    smooth: int = 50
    short_rows: int = 300
    short_sigma: float = 4.5
    long_rows: int = 2000
    name_sigma: float = 5.0
    name_hits: int = 3
    name_jump: float = 5.0
    name_sum: float = 7.2
    calm_sum: float = 6.2
    name_row: float = 12.0
    name_chance: float = 0.02

    seen: int = field(default=0, init=False)
    history: Window = field(default_factory=lambda: Window(1), init=False)
    past: Window = field(default_factory=lambda: Window(WANDER), init=False)
    episode: Episode = field(default_factory=lambda: Episode(1, 1), init=False)
    undecided: list[dict[str, Any]] = field(default_factory=list, init=False)
    """Spikes of which it is not known yet whether they recover; the open one is the last."""
    innovations: Innovations = field(default_factory=Innovations, init=False)
    tail: Tail = field(default_factory=Tail, init=False)
    recent: list[float] = field(default_factory=list, init=False)
    """The last innovations, clipped."""
    bar: float | None = field(default=None, init=False)
    """What a single innovation must exceed; None while there is too little to go by."""
    calm: bool = field(default=False, init=False)
    """The tail of the innovations so far is light."""

    def start(self, context: Context) -> None:
        size = context.rows(self.window, share=0.1, least=32)
        self.history = Window(size)
        self._winsor = max(self.sigma, self.winsor * math.sqrt(size / self.window))
        gap = context.near(self.gap)
        self._sparse = gap <= self.hits
        self.episode = Episode(1 if self._sparse else self.hits, gap)
        self._sigma = max(self.sigma, self.sparse_sigma) if self._sparse else self.sigma
        self._recover = context.rows(self.recover, share=0.2, least=50)
        self._smooth = context.rows(self.smooth, share=0.1, least=10)
        first = min(self.ignore_first, context.warmup)
        total = context.steps_total
        self._first_step = first if total is None else min(first, total // 5)
        self._rows = context.rows_total
        self._chance = context.chance_loss
        self._long = self._rows is None or self._rows > self.long_rows

    def update(self, row: Row) -> Iterable[Event]:
        loss = row.finite("loss")
        self.seen += 1
        if loss is None:
            return ()
        mean, std = self.history.mean_std()
        judged = self.history.full and row.step >= self._first_step and std > 0.0
        loud = self._long and self._is_loud(loss) and judged
        hit = judged and (loud or loss > mean + self._sigma * std)
        known = min(loss, mean + self._winsor * std) if hit else loss
        self.history.push(known)
        self.past.push(known)
        if not hit and not self.undecided:
            return ()
        found: list[Event] = []
        if hit:
            found.extend(self._hit(row.step, loss, mean, std, loud=loud))
        if self.episode.ended(self.seen):
            found.append(self._close())
        found.extend(self._decide(loss))
        return found

    def finish(self, step: int) -> Iterable[Event]:
        return [self._close()] if self.episode.open else ()

    def _is_loud(self, loss: float) -> bool:
        """Whether what is new in this row is more than the noise of a long run makes."""
        z = self.innovations.push(loss)
        if z is None:
            return False
        self.recent = [*self.recent, min(max(z, -_CLIP), _CLIP)][-_TERMS:]
        limit = self.calm_sum if self.calm else self.name_sum
        loud = sum(self.recent) > limit * math.sqrt(_TERMS)
        loud = loud or (self.bar is not None and z > self.bar)
        if self.seen % _BAR_EVERY == 0:
            rows = self._rows or max(self.seen, 10 * self.long_rows)
            bar = self.tail.bar(rows, self.name_chance)
            known = math.isfinite(bar)
            self.bar = max(self.name_row, bar) if known else None
            self.calm = known and self.tail.share(_FAR) <= _CALM_SHARE
        # A spike is no part of the noise: it may not raise the bar for the next one.
        self.tail.push(z if self.bar is None else min(abs(z), self.bar))
        return loud

    def _hit(
        self, step: int, loss: float, mean: float, std: float, *, loud: bool
    ) -> Iterable[Event]:
        past = self.past.held[:-1]
        level, noise = float(np.median(past[-_NEAR:])), wandering(past)
        opened = self.episode.hit(self.seen, step, loss, mean, std, level, noise, alone=loud)
        if opened:
            self.undecided.append(
                {
                    "first_step": self.episode.first_step,
                    "detected_at": step,
                    "mean": self.episode.first[3],
                    "std": self.episode.first[4],
                    "level": self.episode.first[5],
                    "noise": self.episode.first[6],
                    "named": False,
                    "deadline": self.seen + self._recover,
                    "recovered": None,
                    "rows_after": 0,
                    "after": [0.0, 0.0],
                    **self._extent(),
                }
            )
        if not self.episode.open:
            return ()
        spike = self.undecided[-1]
        named = not spike["named"] and self._names(spike | self._extent(), loud=loud)
        if named:
            spike.update(self._extent(), named=True, detected_at=step)
        return [self._tell(spike)] if opened or named else ()

    def _names(self, spike: dict[str, Any], *, loud: bool) -> bool:
        """Whether healthy runs of this length hardly ever have such a spike."""
        sigmas = (spike["peak"] - spike["mean"]) / spike["std"]
        if self._sparse:
            return bool(sigmas > self.sparse_name_sigma)
        if self._long:
            return loud
        if spike["peak"] - spike["level"] < self.name_jump * spike["noise"]:
            return False
        if self._rows is not None and self._rows <= self.short_rows:
            return bool(sigmas >= self.short_sigma)
        return bool(sigmas >= self.name_sigma and spike["hits"] >= self.name_hits)

    def _close(self) -> Event:
        self.undecided[-1].update(self._extent())
        return self._tell(self.undecided[-1])

    def _extent(self) -> dict[str, Any]:
        """What of a spike still changes while its episode lasts."""
        return {
            "last_step": self.episode.last_step,
            "peak": self.episode.peak[2],
            "peak_step": self.episode.peak_step,
            "hits": self.episode.count,
        }

    def _decide(self, loss: float) -> Iterable[Event]:
        """Follow spikes that are not known to have recovered, and tell those that are decided."""
        for spike in list(self.undecided):
            if not (self.episode.open and spike is self.undecided[-1]):
                if spike["recovered"] is False:
                    self.undecided.remove(spike)
                    continue
                after = Ema(self._smooth)
                after.load_state(spike["after"])
                back = after.push(loss) <= spike["mean"] + spike["std"]
                spike["after"] = after.state()
                spike["rows_after"] += 1
                if back and spike["rows_after"] >= max(1, self._smooth // 2):
                    spike["recovered"] = True
                    self.undecided.remove(spike)
                    yield self._tell(spike)
                    continue
            if self.seen >= spike["deadline"] and spike["recovered"] is None:
                spike["recovered"] = False
                yield self._tell(spike)

    def _tell(self, spike: dict[str, Any]) -> Event:
        mean, std, peak = spike["mean"], spike["std"], spike["peak"]
        sigmas = (peak - mean) / std
        lost = spike["recovered"] is False
        verdict: VerdictName = "STABLE"
        if spike["named"]:
            verdict = "DEGRADED" if lost else "SPIKY"
        return event(
            self.name,
            kind="spike",
            quantity="loss",
            first_step=spike["first_step"],
            last_step=spike["last_step"],
            detected_at=spike["detected_at"],
            verdict=verdict,
            flag="UNRECOVERED_SPIKE" if lost and spike["named"] else "LOSS_SPIKE",
            message=f"loss spiked to {peak:.4g} at step {spike['peak_step']}, {sigmas:.3g} "
            f"deviations above its mean of {mean:.4g}" + (", and did not recover" if lost else ""),
            sigmas=sigmas,
            **{key: spike[key] for key in ("mean", "std", "peak", "peak_step", "hits")},
            recovered=spike["recovered"],
            chance=self._chance,
        )
