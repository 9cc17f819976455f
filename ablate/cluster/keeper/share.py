"""The ranks of one gang on this machine, from their fork until nothing of them is left."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil

from ablate.cluster.keeper.pulse import Pulse
from ablate.trial.identity import ORDERLY

# An orderly end leaves this long to what the rank started (multiprocessing's resource tracker
# unlinks its semaphores when its pipe closes); after that, and after any other end, SIGKILL.
_AFTERLIFE_S = 1.0
# Between asking a rank that ignored SIGTERM, or hangs, for its stacks and killing it.
_DUMP_S = 0.3
# A process that is still there so long after SIGKILL hangs in a driver (state D) and may never go.
_UNKILLABLE_S = 60.0
# kill_at of ranks that have been killed, or are to be at once.
_NOW = 0.0


@dataclass(slots=True)
class Share:
    """What the keeper knows of a gang's ranks here. Times are monotonic seconds."""

    pids: dict[int, int] = field(default_factory=dict)
    """Rank -> its process, while it lives."""
    pulses: dict[int, Pulse] = field(default_factory=dict)
    codes: dict[int, int] = field(default_factory=dict)
    failed: int | None = None
    reason: str = ""
    stopped: bool = False
    dump_at: float | None = None
    kill_at: float | None = None
    killed_at: float | None = None
    stuck: str = ""
    """What could not be killed."""

    @property
    def ending(self) -> bool:
        """It has an end in sight, so nobody looks for signs of life."""
        return self.kill_at is not None

    @property
    def deadlines(self) -> list[float]:
        """When something is due."""
        return [deadline for deadline in (self.dump_at, self.kill_at) if deadline is not None]

    def stop(self, grace_s: float) -> None:
        """SIGTERM now, SIGKILL after the grace; a second call can only shorten it."""
        if self.kill_at == _NOW:
            return
        kill_at = time.monotonic() + grace_s
        if not self.stopped and self.pids and grace_s > 0:
            for pid in self.pids.values():
                send(pid, signal.SIGTERM)
        self.stopped = True
        if self.kill_at is None or kill_at < self.kill_at:
            self.kill_at = kill_at if grace_s > 0 else _NOW
            self.dump_at = kill_at - _DUMP_S if grace_s > 2 * _DUMP_S else None

    def kill(self) -> None:
        """End it at the next turn, without a word."""
        self.kill_at = _NOW

    def leave(self, reason: str, grace_s: float) -> None:
        """Stop it for a reason that lies with none of its ranks."""
        if not self.ending:
            self.reason = reason
            self.stop(grace_s)

    def look(self, elapsed_s: float) -> None:
        """End the gang when a rank makes no progress: the others wait for it in a collective."""
        if self.ending:
            return
        found = {rank: self.pulses[rank].look(pid, elapsed_s) for rank, pid in self.pids.items()}
        late = {rank: reason for rank, reason in found.items() if reason}
        if late:
            now = time.monotonic()
            self.failed, self.reason = next(iter(late.items()))
            self.dump_at, self.kill_at = now, now + _DUMP_S

    def note_end(self, pid: int, code: int) -> None:
        """A process has ended; if it was a rank, the others may have to."""
        for rank in [rank for rank, own in self.pids.items() if own == pid]:
            self.codes[rank] = code
            del self.pids[rank]
            if code not in ORDERLY and self.kill_at != _NOW:
                # The others would wait in a collective for a rank that never comes.
                if self.failed is None and not (self.stopped and code == -signal.SIGTERM):
                    self.failed = rank
                self.kill_at = _NOW
            elif not self.pids and self.kill_at != _NOW:
                self.kill_at = time.monotonic() + _AFTERLIFE_S
                self.dump_at = None

    def advance(self, others: Collection[int]) -> bool:
        """Do what is due; whether nothing is left. `others`: the other gangs' ranks here."""
        now = time.monotonic()
        if self.dump_at is not None and now >= self.dump_at:
            self.dump_at = None
            for pid in self.pids.values():
                send(pid, signal.SIGUSR1)
        if self.kill_at is None:
            return False
        remains = _remains(others)
        if remains and now >= self.kill_at:
            self.kill_at = _NOW
            self.killed_at = self.killed_at or now
            for process in remains:
                send(process.pid, signal.SIGKILL)
            if now - self.killed_at > _UNKILLABLE_S:
                self._give_up(remains)
                return True
        return not remains and not self.pids

    def _give_up(self, remains: Sequence[psutil.Process]) -> None:
        states = {}
        for process in remains:
            with contextlib.suppress(psutil.NoSuchProcess):
                states[process.pid] = process.status()
        named = ", ".join(f"{pid} ({state})" for pid, state in states.items())
        self.stuck = f"processes that cannot be killed: {named}"

    def ended(self) -> dict[str, Any]:
        """What the client is told, as :class:`~ablate.cluster.keeper.wire.Ended`."""
        return {
            "codes": self.codes,
            "failed": self.failed,
            "reason": self.reason,
            "stuck": self.stuck,
        }

    def close(self) -> None:
        for pulse in self.pulses.values():
            pulse.close()


def _remains(others: Collection[int]) -> list[psutil.Process]:
    """What is left of a gang: its ranks, what descends from them, adopted orphans; zombies too.

    An orphan that left its rank's session belongs to nobody; it ends with the next gang that
    does. Only sessions of other living ranks are spared.
    """
    remains: list[psutil.Process] = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            if child.pid in others or os.getsid(child.pid) in others:
                continue
            remains += [child, *child.children(recursive=True)]
    return remains


def send(pid: int, number: signal.Signals) -> None:
    """A signal to a process that may be gone."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
