"""Which trial starts next."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from ablate.trial.identity import Trial


@dataclass(slots=True)
class Backlog:
    """Trials that wait for a place, in the study's order; one that crashed waits a while longer.

    Every operation costs O(log n), so that a trial of a large study costs no more than one of a
    small study. Times are seconds of any clock that only goes forward.
    """

    _trials: dict[str, Trial] = field(default_factory=dict)
    _position: dict[str, int] = field(default_factory=dict)
    """Place in the study's order of every trial that was ever added."""
    _ready: list[tuple[int, str]] = field(default_factory=list)
    _delayed: list[tuple[float, int, str]] = field(default_factory=list)
    _per_seed: Counter[int] = field(default_factory=Counter)

    def __len__(self) -> int:
        return len(self._trials)

    def __iter__(self) -> Iterator[Trial]:
        return iter(self._trials.values())

    def add(self, trial: Trial, *, not_before: float | None = None) -> None:
        """Let a trial wait; one that was here before takes its old place in the order."""
        position = self._position.setdefault(trial.id, len(self._position))
        self._trials[trial.id] = trial
        self._per_seed[trial.seed] += 1
        if not_before is None:
            heapq.heappush(self._ready, (position, trial.id))
        else:
            heapq.heappush(self._delayed, (not_before, position, trial.id))

    def first(self, now: float) -> Trial | None:
        """The trial to start next; None while none waits or all that wait have crashed just now."""
        while self._delayed and self._delayed[0][0] <= now:
            _, position, trial_id = heapq.heappop(self._delayed)
            heapq.heappush(self._ready, (position, trial_id))
        while self._ready and self._ready[0][1] not in self._trials:
            heapq.heappop(self._ready)  # removed
        return self._trials[self._ready[0][1]] if self._ready else None

    def take(self, now: float) -> Trial:
        """Remove and return :meth:`first`, which must be there."""
        trial = self.first(now)
        assert trial is not None
        heapq.heappop(self._ready)
        del self._trials[trial.id]
        self._per_seed[trial.seed] -= 1
        return trial

    def remove(self, trial: Trial) -> bool:
        """Let a trial wait no longer; whether it did."""
        if self._trials.pop(trial.id, None) is None:
            return False
        self._per_seed[trial.seed] -= 1
        return True

    def num_of_seed(self, seed: int) -> int:
        """How many trials of a seed block wait."""
        return self._per_seed[seed]
