"""What a rank last said of itself, as the keeper reads it."""

from __future__ import annotations

import mmap
import os
import struct

import psutil

from ablate.trial.pulse import START_PATIENCE, START_PATIENCE_S

# How long a rank may stay stopped.
_STOPPED_S = 10.0


class Pulse:
    """What a rank last said of itself (:mod:`ablate.trial.pulse`), and for how long since.

    Time counts only while the keeper runs: when a batch system suspends the whole job, nobody is
    late.
    """

    def __init__(self, *, start_patience_s: float = START_PATIENCE_S) -> None:
        self.start_patience_s = start_patience_s
        self.descriptor = os.memfd_create("pulse")
        os.ftruncate(self.descriptor, 16)
        self.cell = mmap.mmap(self.descriptor, 16)
        self.mark = 0.0
        self.silent_s = 0.0
        self.stopped_s = 0.0

    def look(self, pid: int, elapsed_s: float) -> str:
        """What is wrong with the rank; empty when nothing is."""
        mark, patience_s = struct.unpack("=dd", self.cell)
        self.silent_s = self.silent_s + elapsed_s if mark == self.mark else 0.0
        self.mark = mark
        try:
            stopped = psutil.Process(pid).status() == psutil.STATUS_STOPPED
        except psutil.NoSuchProcess:
            return ""
        self.stopped_s = self.stopped_s + elapsed_s if stopped else 0.0
        if self.stopped_s >= _STOPPED_S:
            return f"it was stopped by a signal (SIGSTOP) for {self.stopped_s:.0f} s"
        if not mark and self.silent_s > self.start_patience_s:
            return (
                f"it did not come to its first step within {self.silent_s:.0f} s, the stacks of "
                f"all threads are in the logs; {START_PATIENCE} sets the patience"
            )
        if mark and self.silent_s > patience_s:
            return (
                f"no step or evaluation ended for {self.silent_s:.0f} s, the stacks of all threads "
                "are in the logs; ABLATE_PATIENCE_S and ABLATE_EVALUATION_PATIENCE_S set the least "
                "patience"
            )
        return ""

    def close(self) -> None:
        self.cell.close()
