"""The marker of samples that could not be read."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

from ablate.markers.event import Event, Row, event
from ablate.markers.marker import Marker


@dataclass
class DataFaults(Marker):
    """Samples that could not be read and were replaced: most trainers log and forget them.

    Told when their share of all samples so far is above ``rate``, or that of the last ``window``
    rows by more than ``errors`` standard errors: what begins late is little of the whole.
    """

    name: ClassVar[str] = "data_faults"
    reads: ClassVar[tuple[str, ...]] = ("data_faults",)

    rate: float = 0.005
    least: int = 10
    """Fewer bad samples than this are no rate."""
    window: int = 100
    errors: float = 5.0

    past: list[list[float]] = field(default_factory=list, init=False)
    """Bad and all samples of the last rows."""
    told: bool = field(default=False, init=False)

    def update(self, row: Row) -> Iterable[Event]:
        faults, samples = row.finite("data_faults"), row.finite("samples")
        if self.told or faults is None or not samples:
            return ()
        before = self.past[0] if len(self.past) == self.window else [0.0, 0.0]
        self.past = [*self.past, [faults, samples]][-self.window :]
        rate, late, seen = faults / samples, faults - before[0], samples - before[1]
        if max(faults, late) < self.least or seen <= 0.0:
            return ()
        error = math.sqrt(self.rate / seen)
        if rate <= self.rate and late / seen <= self.rate + self.errors * error:
            return ()
        what = f"{rate:.2%} of the samples so far could not be read ({faults:.0f})"
        if rate <= self.rate:
            rate = late / seen
            what = f"{rate:.2%} of the last {seen:.0f} samples could not be read ({late:.0f})"
        self.told = True
        return [
            event(
                self.name,
                kind="rate",
                quantity="data_faults",
                first_step=row.step,
                last_step=row.step,
                detected_at=row.step,
                severity="warning",
                flag="DATA_FAULTS",
                message=what,
                rate=rate,
                faults=faults,
                samples=samples,
            )
        ]
