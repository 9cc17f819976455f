"""When a checkpoint is due within an epoch, by the clock and for a small share of the time, and how
many stay. Imports no torch."""

from __future__ import annotations

KEEP_LAST = 2
"""Checkpoints that stay whatever they measured: a damaged newest one has a whole one before it."""
SHARE = 0.01
"""Most of the time that the training is held up for checkpoints between epochs."""


class CheckpointClock:
    """Tells when the next one is due. Times are seconds that only go forward.

    `every_s`: seconds between two; 0: none is ever due.
    """

    def __init__(self, every_s: float, *, now: float) -> None:
        self._every_s = every_s
        self._last = now
        self._took_s = 0.0

    def is_due(self, now: float) -> bool:
        """Whether so much time has passed since the last one, whatever it was written for."""
        return self._every_s > 0 and now - self._last >= max(self._every_s, self._took_s / SHARE)

    def note(self, *, began: float, now: float) -> None:
        """One was written, and held the training up in between."""
        self._last, self._took_s = now, now - began
