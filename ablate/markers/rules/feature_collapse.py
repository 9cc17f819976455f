"""The marker of features that are all alike."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ablate.markers.event import Context, Event, Row, event
from ablate.markers.marker import Marker


@dataclass
class FeatureCollapse(Marker):
    """Features of a tower that all point the same way, or fill only a few dimensions.

    ``<tower>_feature_std`` is the mean over dimensions of the deviation of normalised
    features: 1/sqrt(dim) when they are spread evenly, 0 when collapsed. Below ``std_share`` of
    that on ``hold`` rows, or a ``<tower>_feature_rank`` (effective rank) below ``rank`` or
    ``rank_share`` of its own maximum on ``rank_repeats`` measurements, is COLLAPSED (in a
    narrow embedding ``rank`` is at most a quarter of its width). Features
    of a network at initialisation lie in a narrow cone (Liang et al. 2022, "Mind the gap"), so
    a tower is judged once it has been healthy, or after ``Context.settled``; but no cone is as
    narrow as ``point_share`` of the limit, which counts from the first row on. A tower that
    leaves its first cone late has done nothing wrong; one that had been healthy and comes back
    makes the run DEGRADED.

    Small transformers have 4 % to 25 % of the even spread until they begin to learn, collapsed
    towers of the same size less than 1 %: hence ``std_share``. The first features after a warm-up
    fill many dimensions at random, and a tower that learns gives most of them up: of 45 runs of
    studies/emoji_sweep.yaml one kept 0.25 of its best rank while its score rose ninefold, and a
    run of another study that had diverged kept 0.13: hence ``rank_share``.
    """

    name: ClassVar[str] = "feature_collapse"
    reads: ClassVar[tuple[str, ...]] = (
        "image_feature_std",
        "text_feature_std",
        "image_feature_rank",
        "text_feature_rank",
    )
    needs: ClassVar[tuple[str, ...]] = ("feature_dim",)

    std_share: float = 0.03
    point_share: float = 0.08
    hold: int = 200
    rank: float = 8.0
    rank_share: float = 0.15
    rank_repeats: int = 2

    healthy: dict[str, bool] = field(default_factory=dict, init=False)
    """Quantities that were once at twice their limit."""
    best_rank: dict[str, float] = field(default_factory=dict, init=False)
    streaks: dict[str, list[int]] = field(default_factory=dict, init=False)
    """Quantity -> [measurements in a row, first step]."""
    told: dict[str, Any] = field(default_factory=dict, init=False)
    """Quantity -> its present event."""

    def start(self, context: Context) -> None:
        dim = context.feature_dim
        self._std_limit = self.std_share / math.sqrt(dim) if dim else None
        self._rank_limit = min(self.rank, dim / 4.0) if dim else self.rank
        self._hold = context.hold(self.hold, share=0.2, least=50)
        self._settled = context.settled

    @property
    def present(self) -> bool:
        """A tower is collapsed now."""
        return bool(self.told)

    def update(self, row: Row) -> Iterable[Event]:
        return self._judge(row)

    def evaluate(self, row: Row) -> Iterable[Event]:
        return self._judge(row)

    def _judge(self, row: Row) -> list[Event]:
        found: list[Event] = []
        for tower in ("image", "text"):
            std = row.finite(name := f"{tower}_feature_std")
            if std is not None and self._std_limit is not None:
                bad = self._is_low(row.step, name, std, self._std_limit)
                found.extend(self._count(row.step, name, std, self._std_limit, self._hold, bad))
            rank = row.finite(name := f"{tower}_feature_rank")
            if rank is not None:
                best = self.best_rank[tower] = max(rank, self.best_rank.get(tower, 0.0))
                limit = max(self._rank_limit, self.rank_share * best)
                bad = self._is_low(row.step, name, rank, limit)
                found.extend(self._count(row.step, name, rank, limit, self.rank_repeats, bad))
        return found

    def _is_low(self, step: int, name: str, value: float, limit: float) -> bool:
        """Below the limit, at a time when that may be held against the tower."""
        if value > 2.0 * limit:
            self.healthy[name] = True
        if name.endswith("_std") and value < self.point_share * limit:
            return True
        return value < limit and (self.healthy.get(name, False) or step > self._settled)

    def _count(
        self, step: int, name: str, value: float, limit: float, hold: int, bad: bool
    ) -> Iterable[Event]:
        length, first = self.streaks.get(name, [0, step])
        if not bad:
            self.streaks[name] = [0, step]
            told = self.told.pop(name, None)
            if told is None:
                return ()
            had_been_healthy = told["evidence"]["had_been_healthy"]
            return [
                Event.from_dict(told).revised(
                    last_step=step,
                    verdict="DEGRADED" if had_been_healthy else "STABLE",
                    severity="severe" if had_been_healthy else "info",
                    evidence={"recovered_at": step},
                )
            ]
        first = first if length else step
        self.streaks[name] = [length + 1, first]
        if length + 1 != hold:
            return ()
        tower, _, what = name.split("_")
        told_now = event(
            self.name,
            kind=what,
            quantity=name,
            first_step=first,
            last_step=step,
            detected_at=step,
            verdict="COLLAPSED",
            flag="FEATURE_COLLAPSE",
            message=f"{tower} features collapsed: {name} is {value:.3g}, below {limit:.3g}",
            value=value,
            limit=limit,
            one_point=what == "std" and value < self.point_share * limit,
            had_been_healthy=self.healthy.get(name, False),
            measurements=hold,
        )
        self.told[name] = told_now.to_dict()
        return [told_now]
