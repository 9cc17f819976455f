"""The marker of samples that all go to one prototype, or whose projections are one point."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

from ablate.markers.event import Context, Event, Row, event
from ablate.markers.marker import Marker
from ablate.markers.series import Streak


@dataclass
class PrototypeCollapse(Marker):
    """A batch of which every sample is nearest to the same prototype, or whose projections of
    norm 1 lie within ``spread`` of their mean (a mean cosine above 1 - spread^2), for ``hold``
    rows, is COLLAPSED: the loss may fall to 0 meanwhile, or rest where it says nothing.

    Sound runs of a tiny model kept a spread of 0.59 to 0.82 and used 17 to 24 of 30 prototypes;
    without balance one was used and the spread fell to 0.05, with uniform assignments to 0.10.
    """

    name: ClassVar[str] = "prototype_collapse"
    reads: ClassVar[tuple[str, ...]] = ("prototypes_used", "projection_spread")

    spread: float = 0.15
    hold: int = 100

    single: Streak = field(default_factory=Streak, init=False)
    narrow: Streak = field(default_factory=Streak, init=False)

    def start(self, context: Context) -> None:
        self._hold = context.hold(self.hold, share=0.2, least=20)

    def update(self, row: Row) -> Iterable[Event]:
        found = []
        used, spread = row.finite("prototypes_used"), row.finite("projection_spread")
        if used is not None and self.single.extend(used <= 1, row.step) == self._hold:
            words = "every sample goes to the same prototype"
            found.append(self._tell("single", "prototypes_used", self.single, row, used, words))
        if spread is not None and self.narrow.extend(spread < self.spread, row.step) == self._hold:
            words = f"projections lie within {spread:.3g} of their mean"
            found.append(self._tell("narrow", "projection_spread", self.narrow, row, spread, words))
        return found

    def _tell(
        self, kind: str, quantity: str, streak: Streak, row: Row, value: float, words: str
    ) -> Event:
        return event(
            self.name,
            kind=kind,
            quantity=quantity,
            first_step=streak.first_step,
            last_step=row.step,
            detected_at=row.step,
            verdict="COLLAPSED",
            flag="PROTOTYPE_COLLAPSE",
            message=f"{words}, for {self._hold} rows",
            value=value,
        )
