"""The marker of BatchNorm's running statistics."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ablate.markers.event import ACCURACY, Context, Event, Row, event
from ablate.markers.marker import Marker
from ablate.markers.series import Streak


@dataclass
class BatchNorm(Marker):
    """BatchNorm statistics that are broken or no longer describe the activations.

    A non-finite running statistic is NUMERIC_FAIL: a NaN forward pass poisons it even when
    the optimizer step was skipped. Running variances that differ from fresh ones, or a model
    that is worse in eval mode than in train mode on the same probe, are BN_DRIFT, a label: where
    a recalibrated accuracy was measured (statistics reset and averaged anew) it says whether
    the statistics or the weights are at fault. Statistics that cost accuracy at the last
    evaluation, a factor of ``regained`` and ``sigmas`` standard errors, make the run DEGRADED.

    Running statistics begin with 0 and 1, of which (1 - momentum)^batches is left. While that
    (``bn_initial_share``) is above ``initial``, evaluation mode is worse in every healthy run,
    and only the drift is judged, from which the initial value has been taken out.
    """

    name: ClassVar[str] = "batch_norm"
    reads: ClassVar[tuple[str, ...]] = (
        "bn_non_finite",
        "bn_drift_median",
        "bn_drift_max",
        "bn_gap",
    )
    """And ``bn_initial_share``, ``recalibrated_top1`` where they were measured."""

    drift_median: float = 0.2
    """Of |ln(running variance / fresh variance)| over the layers."""
    drift_max: float = 1.0
    gap: float = 0.10
    """Loss in eval mode over loss in train mode, minus 1."""
    regained: float = 1.5
    """Recalibration that multiplies the accuracy by this blames the statistics."""
    sigmas: float = 3.0
    initial: float = 0.01
    stop: bool = True

    broken: bool = field(default=False, init=False)
    streak: Streak = field(default_factory=Streak, init=False)
    told: dict[str, Any] = field(default_factory=dict, init=False)
    """The present event, while it names the run."""

    def start(self, context: Context) -> None:
        self._images = context.eval_images

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
        young = (row.finite("bn_initial_share") or 0.0) > self.initial
        measured = {name: None if young and name == "bn_gap" else row.get(name) for name in limits}
        if all(value is None for value in measured.values()):
            return []
        over = {
            name: value
            for name, value in measured.items()
            if value is not None and not value <= limits[name]  # a NaN gap is over, too
        }
        length = self.streak.extend(bool(over), row.step)
        if not length:
            return self._over()
        known: dict[str, Any] = {n: v for n, v in measured.items() if v is not None}
        worst = ", ".join(f"{name} {value:.3g} > {limits[name]:g}" for name, value in over.items())
        fault, costs = self._fault(row)
        costs = costs and not young
        told = event(
            self.name,
            kind="drift",
            quantity="batch_norm",
            first_step=self.streak.first_step,
            last_step=row.step,
            detected_at=self.streak.first_step,
            verdict="DEGRADED" if costs else "STABLE",
            severity="severe" if costs else "warning",
            flag="BN_DRIFT",
            message=f"BatchNorm statistics do not fit the activations: {worst}"
            + (f"; averaged anew they give {fault[1]}" if costs and fault else ""),
            evaluations=length,
            fault=fault[0] if fault else None,
            **known,
        )
        self.told = told.to_dict() if costs else {}
        return [told]

    def _over(self) -> list[Event]:
        """The statistics fit again: what was told of them no longer names the run."""
        if not self.told:
            return []
        told, self.told = Event.from_dict(self.told), {}
        return [told.revised(verdict="STABLE", severity="warning")]

    def _fault(self, row: Row) -> tuple[tuple[str, str] | None, bool]:
        """(whose fault it is, and what accuracy for which), and whether it is beyond noise."""
        plain, again = row.finite(ACCURACY), row.finite("recalibrated_top1")
        if plain is None or again is None:
            return None, False
        instead = f"an accuracy of {again:.2%} instead of {plain:.2%}"
        if again <= self.regained * plain:
            return ("weights", instead), False
        images = row.finite("eval_images") or self._images
        mean = (plain + again) / 2.0
        noise = math.sqrt(2.0 * mean * (1.0 - mean) / images) if images else math.inf
        return ("statistics", instead), again - plain > self.sigmas * noise
