"""Signs of life of one rank, for the keeper that forked it.

The keeper (:mod:`ablate.keeper`) shares 16 bytes of memory with each rank, whose descriptor is in
ABLATE_PULSE_FD. The rank writes a mark that changes and how many seconds the keeper shall wait for
the next one; a hung collective or a deadlocked loader writes none. Under other launchers, or in a
process that stands alone, a beat does nothing.
"""

from __future__ import annotations

import itertools
import math
import mmap
import os
import struct

PATIENCE_S = 120.0
"""A training step may take this long, or 10 times the slowest before it, whichever is more.
ABLATE_PATIENCE_S in the environment replaces it."""


class Pulse:
    """What a training loop tells its keeper."""

    def __init__(self) -> None:
        descriptor = os.environ.get("ABLATE_PULSE_FD")
        self._cell = mmap.mmap(int(descriptor), 16) if descriptor else None
        self._marks = itertools.count(1)
        self._slowest_s = 0.0
        self._floor_s = float(os.environ.get("ABLATE_PATIENCE_S", PATIENCE_S))

    def step(self, took_s: float) -> None:
        """A step has ended, and the next one begins."""
        self._slowest_s = max(self._slowest_s, took_s)
        self._beat(max(self._floor_s, 10 * self._slowest_s))

    def rest(self) -> None:
        """What comes now (an evaluation, a checkpoint, the end) may take any time."""
        self._beat(math.inf)

    def _beat(self, patience_s: float) -> None:
        if self._cell is not None:
            struct.pack_into("=dd", self._cell, 0, float(next(self._marks)), patience_s)
