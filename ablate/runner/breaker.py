"""A cause that is everywhere (a mount that is gone, a full disk) costs a pause and no trial.

A trial that fails says something about itself, a machine on which trial after trial fails about
itself. Where different trials fail alike, one after the other and before their first step, it is
neither: nothing is started for a while, then one canary, and when that gets further all go on.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ablate.runner.endings import FRUITLESS


@dataclass(frozen=True, slots=True)
class BreakerRules:
    """When to pause, and for how long."""

    alike: int = 8
    """So many ends in a row, of at least two trials, before a first step and in the same words."""
    to_lose: int = 10
    """With fewer trials left there is little to protect: they are given up one by one, soon."""
    pause_s: float = 30.0
    """Until the first canary; each that fails alike doubles it."""
    longest_pause_s: float = 1800.0
    space_pause_s: float = 15.0
    """The same for a full disk, whose free space is looked at in between."""
    longest_space_pause_s: float = 600.0
    outage_s: float = 12 * 3600.0
    """After that it is no outage: the cause stays, and trials are given up for it."""


@dataclass(slots=True)
class Breaker:
    """What the ends of one launch say about everything. Times are seconds of the loop's clock."""

    rules: BreakerRules
    cause: Literal["", "alike", "space"] = ""
    words: str = ""
    """What the last attempt said."""
    since: float = 0.0
    next_at: float = 0.0
    canary: str | None = None
    """The trial that tries whether the cause is gone."""
    free_gib: float = 0.0
    """Free space when the disk was found full."""
    blamed: set[str] = field(default_factory=set)
    """Trials of the row."""
    _row: int = 0
    _alike: str = ""
    _pause_s: float = 0.0

    def note(
        self, trial_id: str, end: Mapping[str, Any], *, now: float, left: int, free_gib: float
    ) -> bool:
        """Take down how an attempt ended, with `left` trials to lose; whether it counts against
        its trial."""
        was_canary = self.canary == trial_id
        if was_canary:
            self.canary = None
        if end["kind"] == "no_space":
            self.words, self.free_gib = end["detail"], free_gib
            if self.cause != "space":
                self._trip("space", self.rules.space_pause_s, now)
            elif was_canary:
                self._wait(self.rules.longest_space_pause_s, now)
            return False
        if end["step"] or end["kind"] not in FRUITLESS:
            if end["step"] or end["kind"] == "ended":
                self._reset()
            return True
        self._count(trial_id, end["detail"])
        if self.cause == "alike":
            if was_canary:
                self._wait(self.rules.longest_pause_s, now)
            return now - self.since > self.rules.outage_s
        if self._row >= self.rules.alike and len(self.blamed) > 1 and left >= self.rules.to_lose:
            self._trip("alike", self.rules.pause_s, now)
            return False
        return True

    def release(self, trial_id: str, *, step: int) -> None:
        """The canary has taken a step: go on."""
        if trial_id == self.canary and step > 0 and self.cause == "alike":
            self._reset()

    def seats(self, *, now: float, free_gib: float) -> int | None:
        """How many attempts may be started now; None: as many as there is room for."""
        if not self.cause or (self.cause == "alike" and now - self.since > self.rules.outage_s):
            return None
        if self.canary is not None:
            return 0
        if self.cause == "space" and free_gib >= 1.5 * self.free_gib + 1 / 16:
            self._reset()
            return None
        return int(now >= self.next_at)

    def describe(self) -> str:
        """A sentence for people; empty while nothing is wrong."""
        if self.cause == "space":
            return f"the disk is full; free some space, it goes on: {self.words}"
        if self.cause == "alike":
            return (
                f"paused: {self._row} attempts of {len(self.blamed)} trials ended alike before "
                f"their first step, so the cause lies elsewhere. One trial tries again from time "
                f"to time, and all go on when it gets further. The last said: {self.words}"
            )
        return ""

    def _count(self, trial_id: str, detail: str) -> None:
        words = _plain(detail)
        if words != self._alike:
            self._row, self._alike = 0, words
            self.blamed = set()
        self._row += 1
        self.blamed.add(trial_id)
        self.words = detail

    def _trip(self, cause: Literal["alike", "space"], pause_s: float, now: float) -> None:
        self.cause, self.since, self._pause_s = cause, now, pause_s
        self.next_at = now + pause_s

    def _wait(self, longest_s: float, now: float) -> None:
        self._pause_s = min(2 * self._pause_s, longest_s)
        self.next_at = now + self._pause_s

    def _reset(self) -> None:
        self.cause, self._row, self._alike, self.canary = "", 0, "", None
        self.blamed = set()


def _plain(detail: str) -> str:
    """What an end said, without what differs from attempt to attempt: paths, numbers, ranks."""
    return re.sub(r"\S*/\S*|\d+", "#", detail)
