"""The marker of updates too large or too small for their weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import median
from typing import Any, ClassVar

from ablate.markers.event import Context, Event, Row, event
from ablate.markers.marker import Marker

_NAMED = 20  # names listed in one event; the rest is counted


@dataclass
class UpdateRatio(Marker):
    """Updates too large or too small for their weights, or drowned in epsilon.

    ``update_ratio/<group>`` is |update| / |weights|. After the warm-up it should lie between
    ``low`` and ``high``; the lower bound falls with the learning rate's schedule, because a
    decay to zero ends every run in tiny updates. And it should lie below ``growth`` times the
    median of the group's own last ``memory`` measurements, over the learning rate: updates ten
    times too large for a group are far below ``high`` in most. Positional embeddings begin with
    0.01 and move by 2 % a step in healthy runs. ``eps_share`` is the share of tensors whose
    sqrt(mean second moment) is below 10 epsilon: there Adam is mere momentum. A third of
    them begin so with open_clip's zero-initialised residual branches. ``repeats`` measurements
    in a row count.
    """

    name: ClassVar[str] = "update_ratio"
    reads: ClassVar[tuple[str, ...]] = ("update_ratio/", "eps_share")

    high: float = 5e-2
    low: float = 1e-6
    eps_share: float = 0.5
    repeats: int = 3
    growth: float = 5.0
    memory: int = 10

    past: dict[str, list[float]] = field(default_factory=dict, init=False)
    """Group -> its last ratios over the learning rate."""
    peak_lr: float = field(default=0.0, init=False)
    streaks: dict[str, list[Any]] = field(default_factory=dict, init=False)
    """Group -> [side, measurements in a row, first step]."""

    def start(self, context: Context) -> None:
        self._warmup = context.warmup

    def update(self, row: Row) -> Iterable[Event]:
        lr = row.finite("lr")
        self.peak_lr = max(self.peak_lr, lr or 0.0)
        ratios = row.group("update_ratio")
        share = row.finite("eps_share")
        if (not ratios and share is None) or row.step <= self._warmup:
            return ()
        decay = min(1.0, lr / self.peak_lr) if lr is not None and self.peak_lr > 0.0 else 1.0
        sides: dict[str, list[tuple[str, float, int]]] = {}
        for group, ratio in ratios:
            side = "high" if ratio > self.high else "low" if ratio < self.low * decay else ""
            grown = self._has_grown(group, ratio, lr)
            side = side or ("grown" if grown else "")
            self._count(sides, row.step, group, ratio, side)
        if share is not None:
            self._count(sides, row.step, "", share, "eps" if share > self.eps_share else "")
        return [self._tell(row.step, side, groups) for side, groups in sides.items()]

    def _has_grown(self, group: str, ratio: float, lr: float | None) -> bool:
        """Far above what is usual for the group at this learning rate."""
        if lr is None or lr <= 0.0 or ratio <= 0.0:
            return False
        past = self.past.get(group, [])
        self.past[group] = [*past, ratio / lr][-self.memory :]
        return len(past) == self.memory and ratio / lr > self.growth * median(past)

    def _count(
        self,
        sides: dict[str, list[tuple[str, float, int]]],
        step: int,
        group: str,
        value: float,
        side: str,
    ) -> None:
        held, length, first = self.streaks.get(group, ["", 0, step])
        if side != held:
            length, first = 0, step
        self.streaks[group] = [side, length + 1, first]
        if side and length + 1 == self.repeats:
            sides.setdefault(side, []).append((group, value, first))

    def _tell(self, step: int, side: str, groups: list[tuple[str, float, int]]) -> Event:
        groups = sorted(groups, key=lambda item: item[1], reverse=side != "low")
        group, value, _ = groups[0]
        if side == "eps":
            quantity, flag = "eps_share", "EPSILON_DOMINATES"
            message = f"{value:.0%} of the tensors have second moments below 10 epsilon"
        else:
            quantity, flag = "update_ratio", f"UPDATES_{'SMALL' if side == 'low' else 'LARGE'}"
            message = f"updates of {group} are {value:.2g} of its weights" + (
                f", and {len(groups) - 1} more groups" if len(groups) > 1 else ""
            )
        return event(
            self.name,
            kind=side,
            quantity=quantity,
            first_step=min(first for _, _, first in groups),
            last_step=step,
            detected_at=step,
            severity="warning",
            flag=flag,
            message=message,
            value=value,
            groups=[name for name, _, _ in groups[:_NAMED]],
            count=len(groups),
        )
