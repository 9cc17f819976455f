"""Markers that speak at evaluations and of data: BatchNorm, zero-shot accuracy, bad samples."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ablate.markers.event import Context, Event, Row, event
from ablate.markers.rule import Rule
from ablate.markers.series import Streak


@dataclass
class BatchNorm(Rule):
    """BatchNorm statistics that are broken or no longer describe the activations.

    A non-finite running statistic is NUMERIC_FAIL: a NaN forward pass poisons it even when
    the optimizer step was skipped. Running variances that differ from fresh ones, or a model
    that is worse in eval mode than in train mode on the same probe, are BN_DRIFT. Where a
    recalibrated accuracy was measured (statistics reset and averaged anew) it says whether
    the statistics or the weights are at fault.
    """

    name: ClassVar[str] = "batch_norm"
    reads: ClassVar[tuple[str, ...]] = (
        "bn_non_finite",
        "bn_drift_median",
        "bn_drift_max",
        "bn_gap",
    )

    drift_median: float = 0.2
    """Of |ln(running variance / fresh variance)| over the layers."""
    drift_max: float = 1.0
    gap: float = 0.10
    """Loss in eval mode over loss in train mode, minus 1."""
    regained: float = 1.5
    """Recalibration that multiplies the accuracy by this blames the statistics."""
    stop: bool = True

    broken: bool = field(default=False, init=False)
    streak: Streak = field(default_factory=Streak, init=False)

    def update(self, row: Row) -> Iterable[Event]:
        return self._poisoned(row)

    def evaluate(self, row: Row) -> Iterable[Event]:
        poisoned = self._poisoned(row)
        return poisoned if self.broken else self._drift(row)  # NaN is no drift

    def _poisoned(self, row: Row) -> list[Event]:
        count = row.get("bn_non_finite")
        if not count or self.broken:
            return []
        self.broken = True
        return [
            event(
                self.name,
                kind="non_finite",
                quantity="bn_non_finite",
                first_step=row.step,
                last_step=row.step,
                detected_at=row.step,
                verdict="NUMERIC_FAIL",
                flag="BN_NON_FINITE",
                stop=self.stop,
                message=f"{count:.0f} BatchNorm statistics are not finite at step {row.step}",
                count=count,
            )
        ]

    def _drift(self, row: Row) -> list[Event]:
        limits = {
            "bn_drift_median": self.drift_median,
            "bn_drift_max": self.drift_max,
            "bn_gap": self.gap,
        }
        measured = {name: row.get(name) for name in limits}
        if all(value is None for value in measured.values()):
            return []
        over = {
            name: value
            for name, value in measured.items()
            if value is not None and not value <= limits[name]  # a NaN gap is over, too
        }
        length = self.streak.extend(bool(over), row.step)
        if not length:
            return []
        known: dict[str, Any] = {n: v for n, v in measured.items() if v is not None}
        worst = ", ".join(f"{name} {value:.3g} > {limits[name]:g}" for name, value in over.items())
        return [
            event(
                self.name,
                kind="drift",
                quantity="batch_norm",
                first_step=self.streak.first_step,
                last_step=row.step,
                detected_at=self.streak.first_step,
                severity="warning",
                flag="BN_DRIFT",
                message=f"BatchNorm statistics do not fit the activations: {worst}",
                evaluations=length,
                fault=self._fault(row),
                **known,
            )
        ]

    def _fault(self, row: Row) -> str | None:
        plain, again = row.finite("imagenet_top1"), row.finite("recalibrated_top1")
        if plain is None or again is None:
            return None
        return "statistics" if again > self.regained * plain else "weights"


@dataclass
class AccuracyCollapse(Rule):
    """Zero-shot accuracy that fell to less than half of the best, by more than its noise.

    Noise: ``sigmas`` * sqrt(2 p (1 - p) / images), p the mean of both accuracies. DEGRADED,
    or merely SPIKY once the accuracy is back at ``regained`` of what it was; ``repeats``
    evaluations in a row below ``at_chance`` times chance are DIVERGED.
    """

    name: ClassVar[str] = "accuracy_collapse"
    reads: ClassVar[tuple[str, ...]] = ("imagenet_top1",)
    needs: ClassVar[tuple[str, ...]] = ("chance_top1",)

    share: float = 0.5
    sigmas: float = 3.0
    regained: float = 0.9
    repeats: int = 2
    at_chance: float = 2.0
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
        self._chance = context.chance_top1
        self._images = context.eval_images

    def evaluate(self, row: Row) -> Iterable[Event]:
        top1 = row.finite("imagenet_top1")
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
            quantity="imagenet_top1",
            first_step=self.low.first_step,
            last_step=row.step,
            detected_at=self.decided_at if over else self.low.first_step,
            verdict="DIVERGED" if over else "DEGRADED",
            flag="ACCURACY_COLLAPSE",
            stop=over and lost == self.repeats and self.stop,
            message=f"zero-shot top-1 fell from {self.best:.2%} (step {self.best_step}) to "
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


@dataclass
class DataFaults(Rule):
    """Samples that could not be read and were replaced: open_clip logs and forgets them."""

    name: ClassVar[str] = "data_faults"
    reads: ClassVar[tuple[str, ...]] = ("data_faults",)

    rate: float = 0.005
    least: int = 10
    """Fewer bad samples than this are no rate."""

    told: bool = field(default=False, init=False)

    def update(self, row: Row) -> Iterable[Event]:
        faults, samples = row.finite("data_faults"), row.finite("samples")
        if self.told or not faults or not samples or faults < self.least:
            return ()
        rate = faults / samples
        if rate <= self.rate:
            return ()
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
                message=f"{rate:.2%} of the samples so far could not be read ({faults:.0f})",
                rate=rate,
                faults=faults,
                samples=samples,
            )
        ]
