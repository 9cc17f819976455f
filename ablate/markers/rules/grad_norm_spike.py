"""The marker of the gradient's norm."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import median
from typing import Any, ClassVar

from ablate.markers.event import Context, Event, Row, event
from ablate.markers.marker import Marker
from ablate.markers.series import Episode

_NAMED = 20  # names listed in one event; the rest is counted


@dataclass
class GradNormSpike(Marker):
    """A gradient norm far above its running mean, on ``hits`` rows within ``gap`` steps.

    z = (norm - mean) / deviation, both exponential with factor ``keep``, begun with the median
    and its absolute deviation over the first ``begin`` rows (ZClip, arXiv 2504.02507, begins
    with mean and variance: a first step ten times too large would blind it for long, and a
    NaN among them for ever). Values enter as mean + ``clip_sigma`` deviations at most. Where
    grouped norms are measured, the evidence names the groups that grew most over their own
    median (the per-tensor ratio of AdaGC, arXiv 2502.11034). A single row above ``row_sigma`` is
    noted, once a run with a count: one heavy batch in a thousand is usual.
    """

    name: ClassVar[str] = "grad_norm_spike"
    reads: ClassVar[tuple[str, ...]] = ("grad_norm",)

    keep: float = 0.97
    begin: int = 25
    clip_sigma: float = 2.5
    sigma: float = 6.0
    row_sigma: float = 12.0
    hits: int = 2
    gap: int = 10
    memory: int = 16
    """Rows of grouped norms kept for comparison."""

    seen: int = field(default=0, init=False)
    early: list[float] = field(default_factory=list, init=False)
    mean: float | None = field(default=None, init=False)
    variance: float = field(default=0.0, init=False)
    clipped: int = field(default=0, init=False)
    """Rows so far on which clipping at ``clip_sigma`` would have acted."""
    episode: Episode = field(default_factory=lambda: Episode(1, 1), init=False)
    detected_at: int = field(default=0, init=False)
    groups: list[Any] = field(default_factory=list, init=False)
    grown: list[Any] = field(default_factory=list, init=False)
    lonely: list[float] = field(default_factory=list, init=False)
    """Row, step and norm of a single row far out, until it is known to stay alone."""
    rows: list[float] = field(default_factory=list, init=False)
    """First and last step of single rows far out, the highest norm, its step, their count."""

    def start(self, context: Context) -> None:
        gap = context.near(self.gap)
        self.episode = Episode(1 if gap <= self.hits else self.hits, gap)

    def update(self, row: Row) -> Iterable[Event]:
        norm = row.finite("grad_norm")
        self.seen += 1
        if norm is None:
            return ()
        found: list[Event] = []
        if self.mean is None:
            self._begin(norm)
        elif self._outlier(row, norm):
            self.detected_at = row.step
            self.grown = self._localise(row)
            found.append(self._tell())
        if self.lonely and self.seen - self.lonely[0] > self.episode.gap:
            found.extend(self._note(int(self.lonely[1]), self.lonely[2]))
            self.lonely = []
        groups = row.group("grad_norm")
        if groups:
            self.groups = [*self.groups, groups][-self.memory :]
        if self.episode.ended(self.seen):
            found.append(self._tell())
        return found

    def finish(self, step: int) -> Iterable[Event]:
        found = [self._tell()] if self.episode.open else []
        if self.lonely:
            found.extend(self._note(int(self.lonely[1]), self.lonely[2]))
        return [*found, self._tell_rows()] if self.rows and self.rows[4] > 1 else found

    def _begin(self, norm: float) -> None:
        self.early.append(norm)
        if len(self.early) < self.begin:
            return
        self.mean = median(self.early)
        deviation = 1.4826 * median(abs(value - self.mean) for value in self.early)
        self.variance = deviation * deviation
        self.early = []

    def _outlier(self, row: Row, norm: float) -> bool:
        """Take the norm in; true when it opens an episode."""
        assert self.mean is not None
        mean, deviation = self.mean, math.sqrt(self.variance)
        z = (norm - mean) / (deviation + 1e-6)
        if z > self.clip_sigma:
            self.clipped += 1
            norm_in = mean + self.clip_sigma * deviation
        else:
            norm_in = norm
        apart = norm_in - mean
        self.mean = mean + (1.0 - self.keep) * apart
        self.variance = self.keep * (self.variance + (1.0 - self.keep) * apart * apart)
        opened = z > self.sigma and self.episode.hit(self.seen, row.step, norm, mean, deviation)
        if self.episode.open:
            self.lonely = []
        elif z > self.row_sigma:
            self.lonely = [self.seen, row.step, norm]
        return opened

    def _note(self, step: int, norm: float) -> Iterable[Event]:
        """Count a single row; the first is told at once, the count at the end."""
        if not self.rows:
            self.rows = [step, step, norm, step, 1]
            return [self._tell_rows()]
        first, _, peak, peak_step, count = self.rows
        self.rows = [first, step, *max((peak, peak_step), (norm, step)), count + 1]
        return ()

    def _tell_rows(self) -> Event:
        first, last, peak, peak_step, count = self.rows
        return event(
            self.name,
            kind="row",
            quantity="grad_norm",
            first_step=int(first),
            last_step=int(last),
            detected_at=int(first),
            severity="info",
            message=f"the gradient norm was far out on {count:.0f} single rows, at most "
            f"{peak:.4g} (step {peak_step:.0f})",
            rows=int(count),
            peak=peak,
            peak_step=int(peak_step),
        )

    def _localise(self, row: Row) -> list[Any]:
        """The three groups that grew most, as [group, norm over its recent median]."""
        past: dict[str, list[float]] = {}
        for groups in self.groups:
            for part, value in groups:
                past.setdefault(part, []).append(value)
        ratios: list[list[Any]] = [
            [part, value / usual]
            for part, value in row.group("grad_norm")
            if part in past and (usual := median(past[part])) > 0.0
        ]
        return sorted(ratios, key=lambda item: -item[1])[:3]

    def _tell(self) -> Event:
        mean, deviation = self.episode.first[3:5]
        peak = self.episode.peak[2]
        return event(
            self.name,
            kind="spike",
            quantity="grad_norm",
            first_step=self.episode.first_step,
            last_step=self.episode.last_step,
            detected_at=self.detected_at,
            severity="warning",
            flag="GRAD_NORM_SPIKE",
            message=f"gradient norm rose to {peak:.4g} at step {self.episode.peak_step}, "
            f"from {mean:.4g}",
            mean=mean,
            std=deviation,
            peak=peak,
            peak_step=self.episode.peak_step,
            ratio=peak / mean if mean > 0.0 else None,
            hits=self.episode.count,
            clip_rate=self.clipped / self.seen,
            groups=self.grown,
        )
