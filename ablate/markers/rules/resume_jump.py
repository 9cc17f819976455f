"""The marker of a run that did not come back from a break as it was left."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import median
from typing import ClassVar

from ablate.markers.event import Context, Event, Row, event
from ablate.markers.marker import Marker


@dataclass
class ResumeJump(Marker):
    """The first update after a border is not as those before it, or the learning rate jumped.

    A border is a change of attempt, or a row with ``interrupted``. ``update_norm`` is the norm of
    the update of all weights over the learning rate; before a border the last few steps have it.
    Without history Adam moves every weight by about the learning rate, which is three times what
    it moved before; momentum that begins anew moves half where gradients agree from step to step,
    and is not told apart where the noise of small batches rules. The loss shows neither. A run that
    comes back whole has the update of the run that was never left: a share between ``low`` and
    ``high`` (0.86 to 1.06 where it was measured). ``resume_lr_ratio`` is the learning rate over
    that of a schedule that goes on: exactly 1 there.

    Moments of another run or of another parameter have the right size. What they lack is the
    direction: ``update_turn`` is the cosine between an update and the one before, about 0.9 where
    a mean of gradients decays by 0.9, and far below where that mean is not this run's: -0.2 to
    0.42, the more the two runs have in common the higher. It is known about a break within a trial
    alone, for the update before a change of attempt is not kept. Of 1,009 ordinary steps of six
    healthy runs that were ``steady`` two were below ``turned`` times the five before; under
    momentum with noisy gradients updates are not, and nothing is said.
    """

    name: ClassVar[str] = "resume_jump"
    reads: ClassVar[tuple[str, ...]] = ("update_norm", "update_turn", "resume_lr_ratio")

    high: float = 2.0
    low: float = 0.62
    turned: float = 0.5
    """Share of the smallest cosine before a break below which an update has turned."""
    steady: float = 0.5
    """Cosine that those before must have for that: else updates turn by themselves."""
    least: int = 3
    """Updates before the border that must be known."""
    memory: int = 5

    before: list[float] = field(default_factory=list, init=False)
    """The last updates, with the steps they were measured at in `steps`."""
    steps: list[int] = field(default_factory=list, init=False)
    turns: list[float] = field(default_factory=list, init=False)
    """Cosines before a break."""
    attempt: float | None = field(default=None, init=False)

    def start(self, context: Context) -> None:
        """Nothing to size."""

    def update(self, row: Row) -> Iterable[Event]:
        attempt = row.get("attempt")
        border = bool(row.get("interrupted"))
        if attempt is not None:
            border |= self.attempt is not None and attempt != self.attempt
            self.attempt = attempt
        found = list(self._judge(row)) if border else []
        norm = row.finite("update_norm")
        if norm is not None:
            self.before = [*self.before, norm][-self.memory :]
            self.steps = [*self.steps, row.step][-self.memory :]
        turn = row.finite("update_turn")
        if turn is not None:
            self.turns = [*self.turns, turn][-self.memory :]
        return found

    def _judge(self, row: Row) -> Iterable[Event]:
        ratio = row.finite("resume_lr_ratio")
        if ratio is not None and abs(ratio - 1.0) > 0.01:
            yield event(
                self.name,
                kind="schedule",
                quantity="lr",
                first_step=row.step,
                last_step=row.step,
                detected_at=row.step,
                severity="warning",
                flag="SCHEDULE_RESTARTED",
                message=f"the learning rate is {ratio:.3g} times what the schedule had come to",
                ratio=ratio,
            )
        yield from list(self._judge_size(row)) or self._judge_direction(row)

    def _judge_size(self, row: Row) -> Iterable[Event]:
        norm = row.finite("update_norm")
        known = [
            value
            for value, step in zip(self.before, self.steps, strict=True)
            if row.step - step <= 2 * self.memory and value > 0.0
        ]
        if norm is None or len(known) < self.least:
            return
        usual = median(known)
        # Updates that fall or rise by themselves, as Adan's first ones do, are no jump.
        if norm >= self.low * min(known) and norm <= self.high * max(known):
            return
        yield event(
            self.name,
            kind="update",
            quantity="update_norm",
            first_step=row.step,
            last_step=row.step,
            detected_at=row.step,
            severity="warning",
            flag="RESUME_JUMP",
            message=f"the first update after step {row.step - 1} is {norm / usual:.2g} times those "
            "before it: the optimizer's state did not come back as it was",
            ratio=norm / usual,
            usual=usual,
        )

    def _judge_direction(self, row: Row) -> Iterable[Event]:
        turn = row.finite("update_turn")
        if turn is None or len(self.turns) < self.least or min(self.turns) < self.steady:
            return
        if turn >= self.turned * min(self.turns):
            return
        usual = median(self.turns)
        yield event(
            self.name,
            kind="direction",
            quantity="update_turn",
            first_step=row.step,
            last_step=row.step,
            detected_at=row.step,
            severity="warning",
            flag="RESUME_JUMP",
            message=f"the first update after step {row.step - 1} goes another way than the one "
            f"before it (cosine {turn:.2f}, before that {usual:.2f}): the optimizer's moments are "
            "of another run, or of another parameter",
            cosine=turn,
            usual=usual,
        )
