"""Signs of life of one rank, for the keeper that forked it.

The keeper (:mod:`ablate.cluster.keeper`) shares 16 bytes of memory with each rank, whose descriptor
is in ABLATE_PULSE_FD. The rank writes a mark that changes and how many seconds the keeper shall
wait for the next one; a hung collective or a deadlocked loader writes none. Under other launchers,
or in a process that stands alone, a beat does nothing.
"""

from __future__ import annotations

import itertools
import math
import mmap
import os
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

PATIENCE_S = 120.0
"""A training step may take this long, or 10 times the slowest before it, whichever is more.
ABLATE_PATIENCE_S in the environment replaces it."""

EVALUATION_PATIENCE_S = 600.0
"""A batch of an evaluation, or what it computes behind the last one, may take this long, or 10
times the slowest evaluation before it, whichever is more. ABLATE_EVALUATION_PATIENCE_S in the
environment replaces it."""

START_PATIENCE = "ABLATE_START_PATIENCE_S"
"""Environment variable of a rank: seconds until its first sign of life."""
START_PATIENCE_S = 1800.0
"""A rank may take so long for its imports, its data and its first step (a large model that is
compiled takes minutes). A mount that hangs would hold all seats of its gang for ever."""

_FIRST_EVALUATIONS = 3.0
"""The first evaluation, which has no other to compare with, has so many times that patience."""

_part_ended: ContextVar[Callable[[], None]] = ContextVar("part_ended", default=lambda: None)


def part_ended() -> None:
    """A batch of an evaluation has ended; outside of :meth:`Pulse.evaluating` nothing happens."""
    _part_ended.get()()


class Pulse:
    """What a training loop tells its keeper."""

    def __init__(self) -> None:
        descriptor = os.environ.get("ABLATE_PULSE_FD")
        self._cell = mmap.mmap(int(descriptor), 16) if descriptor else None
        self._marks = itertools.count(1)
        self._slowest_s = 0.0
        self._floor_s = float(os.environ.get("ABLATE_PATIENCE_S", PATIENCE_S))
        self._slowest_evaluation_s = 0.0
        self._evaluation_floor_s = float(
            os.environ.get("ABLATE_EVALUATION_PATIENCE_S", EVALUATION_PATIENCE_S)
        )

    def step(self, took_s: float) -> None:
        """A step has ended, and the next one begins."""
        self._slowest_s = max(self._slowest_s, took_s)
        self._beat(max(self._floor_s, 10 * self._slowest_s))

    def rest(self) -> None:
        """What comes now (a checkpoint, the end) may take any time."""
        self._beat(math.inf)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """The evaluations of one epoch run inside."""
        slowest_s, began = self._slowest_evaluation_s, time.perf_counter()
        first = 1.0 if slowest_s else _FIRST_EVALUATIONS
        patience_s = max(first * self._evaluation_floor_s, 10 * slowest_s)
        self._beat(patience_s)
        before = _part_ended.set(lambda: self._beat(patience_s))
        try:
            yield
        finally:
            _part_ended.reset(before)
        self._slowest_evaluation_s = max(slowest_s, time.perf_counter() - began)
        self.rest()

    def _beat(self, patience_s: float) -> None:
        if self._cell is not None:
            struct.pack_into("=dd", self._cell, 0, float(next(self._marks)), patience_s)
