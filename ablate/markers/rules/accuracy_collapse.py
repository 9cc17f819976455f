"""The marker of accuracy that was there and is gone."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ablate.markers.event import ACCURACY, Context, Event, Row, event
from ablate.markers.marker import Marker
from ablate.markers.series import Streak


@dataclass
class AccuracyCollapse(Marker):
    """Accuracy that fell to less than half of the best, by more than its noise.

    Noise: ``sigmas`` * sqrt(2 p (1 - p) / images), p the mean of both accuracies. DEGRADED,
    or merely SPIKY once the accuracy is back at ``regained`` of what it was; ``repeats``
    evaluations in a row below ``at_chance`` times chance are DIVERGED, and end a run of at least
    ``live_rows`` rows: a shorter one costs less than a wrong verdict.
    """

    name: ClassVar[str] = "accuracy_collapse"
    reads: ClassVar[tuple[str, ...]] = (ACCURACY,)
    needs: ClassVar[tuple[str, ...]] = ("accuracy", "chance_top1")

    share: float = 0.5
    sigmas: float = 3.0
    regained: float = 0.9
    repeats: int = 2
    at_chance: float = 2.0
    live_rows: int = 300
    stop: bool = True

    best: float = field(default=0.0, init=False)
    best_step: int = field(default=0, init=False)
    low: Streak = field(default_factory=Streak, init=False)
    lost: Streak = field(default_factory=Streak, init=False)
    worst: float = field(default=1.0, init=False)
    decided_at: int = field(default=0, init=False)
    """Evaluation at which the repeats were complete."""
    fallen: dict[str, Any] = field(default_factory=dict, init=False)
    """The last event, until the accuracy is back."""

    def start(self, context: Context) -> None:
        self._accuracy = context.accuracy or ACCURACY
        self._chance = context.chance_top1
        self._images = context.eval_images
        rows = context.rows_total
        self._stops = self.stop and (rows is None or rows >= self.live_rows)

    def evaluate(self, row: Row) -> Iterable[Event]:
        top1 = row.finite(ACCURACY)
        if top1 is None:
            return ()
        images = row.finite("eval_images") or self._images
        mean = (top1 + self.best) / 2.0
        noise = math.sqrt(2.0 * mean * (1.0 - mean) / images) if images else 0.0
        fell = top1 < self.share * self.best and self.best - top1 > self.sigmas * noise
        near_chance = self._chance is not None and top1 < self.at_chance * self._chance
        length = self.low.extend(fell, row.step)
        lost = self.lost.extend(fell and near_chance, row.step)
        if top1 > self.best:
            self.best, self.best_step = top1, row.step
        if not length:
            return self._recovery(row.step, top1)
        self.worst = top1 if length == 1 else min(self.worst, top1)
        over = lost >= self.repeats
        if lost == self.repeats:
            self.decided_at = row.step
        told = event(
            self.name,
            kind="drop",
            quantity=self._accuracy,
            first_step=self.low.first_step,
            last_step=row.step,
            detected_at=self.decided_at if over else self.low.first_step,
            verdict="DIVERGED" if over else "DEGRADED",
            flag="ACCURACY_COLLAPSE",
            stop=over and lost == self.repeats and self._stops,
            message=f"accuracy fell from {self.best:.2%} (step {self.best_step}) to "
            f"{self.worst:.2%}" + (", chance level, and stayed there" if over else ""),
            best=self.best,
            best_step=self.best_step,
            worst=self.worst,
            evaluations=length,
            chance=self._chance,
        )
        self.fallen = told.to_dict()
        return [told]

    def _recovery(self, step: int, top1: float) -> Iterable[Event]:
        if not self.fallen or top1 < self.regained * self.fallen["evidence"]["best"]:
            return ()
        told = Event.from_dict(self.fallen)
        self.fallen = {}
        if told.verdict != "DEGRADED":
            return ()
        message = f"{told.message}, and was back at step {step}"
        return [
            told.revised(
                verdict="SPIKY",
                severity="warning",
                message=message,
                evidence={"recovered_at": step},
            )
        ]
