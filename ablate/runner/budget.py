"""What is spent, whether more may start, and when what runs must stop: never above the budget."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ablate.records.folder import interrupted, worker_seconds
from ablate.trial.identity import Outcome, Trial

STOPPING_SHARE = 0.05
"""At most this part of a budget is kept back for the checkpoints of trials that must be stopped."""


@dataclass(slots=True)
class Ledger:
    """Running totals over the attempts and trials that have ended."""

    outcomes: Counter[str] = field(default_factory=Counter)
    durations_s: list[float] = field(default_factory=list)
    """Wall time of every ended trial, all its attempts."""
    spent_s: float = 0.0
    """Worker-seconds of all ended attempts."""
    interrupted: dict[str, float] = field(default_factory=dict)
    """What machines that were taken away, or broke, cost, as
    :func:`ablate.records.folder.interrupted` counts it."""
    unanswered: list[tuple[Trial, str, str]] = field(default_factory=list)
    """(trial, outcome, reason) of those that ended without a score."""

    def count(self, trial: Trial, outcome: Mapping[str, Any]) -> None:
        """A trial has ended with this outcome.json."""
        if not Outcome(outcome["outcome"]).answered:
            self.unanswered.append((trial, outcome["outcome"], outcome.get("reason", "")))
        self.outcomes[outcome["outcome"]] += 1
        self.durations_s.append(outcome["wall_s"])

    def uncount(self, outcome: Mapping[str, Any]) -> None:
        """A trial that had ended with this outcome.json goes on."""
        self.outcomes[outcome["outcome"]] -= 1
        self.durations_s.remove(outcome["wall_s"])

    def spend(self, ends: Iterable[Mapping[str, Any]], *, workers: int) -> None:
        """Attempts have ended with these end.json, of gangs of `workers` unless they say fewer."""
        ends = list(ends)
        self.spent_s += worker_seconds(ends, workers=workers)
        self.interrupt(interrupted(ends, workers=workers))

    def interrupt(self, cost: Mapping[str, float]) -> None:
        """Machines that were taken away, or broke, have cost this."""
        for name, amount in cost.items():
            self.interrupted[name] = self.interrupted.get(name, 0) + amount


@dataclass(frozen=True, slots=True)
class Running:
    """A gang that the cluster holds: its workers, and seconds since it was placed."""

    workers: int
    for_s: float


@dataclass(frozen=True, slots=True)
class Budget:
    """Limits on what a study may spend."""

    gpu_hours: float | None
    """Worker-hours of all attempts together; None: no limit."""
    grace_s: float
    """Most that a stopped trial may take for its checkpoint."""
    turn_s: float
    """One turn of the loop: an end is seen up to two of them late."""

    def grace_left_s(
        self, *, spent_s: float, running: Sequence[Running], more: int = 0
    ) -> float | None:
        """Seconds that what runs, and another gang of `more` workers, may take to stop; None while
        it may go on."""
        if self.gpu_hours is None:
            return None
        limit_s = self.gpu_hours * 3600
        left_s = limit_s - spent_s - sum(gang.for_s * gang.workers for gang in running)
        workers = sum(gang.workers for gang in running) + more
        each_s = left_s / workers - 2 * self.turn_s  # all of them spend at once
        grace_s = min(self.grace_s, STOPPING_SHARE * limit_s / workers)
        return max(min(grace_s, each_s), 0.0) if each_s <= grace_s else None

    def allows_block(self, ledger: Ledger, *, num_trials: int, workers: int) -> bool:
        """Whether `num_trials`, all that run and a whole seed block, fit into what is left.

        So a study that is cut consists of whole blocks. Nothing is known before a trial has ended.
        """
        if self.gpu_hours is None or not ledger.durations_s:
            return True
        ahead_s = num_trials * max(ledger.durations_s) * workers
        return (ledger.spent_s + ahead_s) / 3600 <= self.gpu_hours
