"""One rank in the caller's own process: for a debugger, a profiler, ``breakpoint()``."""

from __future__ import annotations

import os
import signal
import time
import traceback
from collections import deque

from ablate.cluster.contract import Attempt, Capacity, Cluster, GangEvent, Shape
from ablate.cluster.keeper.rank import exit_code, find
from ablate.errors import ClusterError, PlacementError

_HERE = "this process"


class DebugCluster:
    """Attempts of one worker, one after the other, each inside :meth:`wait`.

    Nothing is forked, watched or logged apart: an entry that hangs hangs here, where a debugger
    sees it, and what it prints is printed. Accelerators are those that the process sees. The
    environment of a rank is there while it runs, and taken back afterwards, as its handler of
    SIGTERM is.
    """

    def __init__(self) -> None:
        self._queue: deque[Attempt] = deque()
        self._events: list[GangEvent] = []

    def start(self, attempt: Attempt) -> None:
        if attempt.shape.workers > 1:
            raise PlacementError(
                f"trial {attempt.trial_id} can never start: {self.capacity(attempt.shape).reason}"
            )
        if any(waiting.trial_id == attempt.trial_id for waiting in self._queue):
            raise ClusterError(f"trial {attempt.trial_id} is queued already")
        self._queue.append(attempt)

    def wait(self, timeout_s: float) -> list[GangEvent]:
        if not self._events and self._queue:
            attempt = self._queue.popleft()
            self._events = [self._event(attempt, "placed", f"in process {os.getpid()}")]
            self._events.append(self._run(attempt))
        elif not self._events:
            time.sleep(timeout_s)
        events, self._events = self._events, []
        return events

    def stop(self, trial_id: str, *, grace_s: float) -> None:
        """Take a waiting attempt out of the queue; one that runs holds the caller."""
        for attempt in [a for a in self._queue if a.trial_id == trial_id]:
            self._queue.remove(attempt)
            detail = "stopped before it was placed"
            self._events.append(self._event(attempt, "exited", detail, None, stopped=True))

    def capacity(self, shape: Shape) -> Capacity:
        if shape.workers > 1:
            reason = f"the gang needs {shape}, but a debugger holds one process: gang.workers: 1"
            return Capacity(0, 0, reason)
        return Capacity(1, int(not self._queue), "")

    def set_aside(self, node: str, shape: Shape) -> bool:
        return False

    def pids(self) -> dict[str, tuple[int, ...]]:
        return {}

    def close(self, *, grace_s: float = 0.0) -> None:
        self._queue.clear()

    def __enter__(self) -> DebugCluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, attempt: Attempt) -> GangEvent:
        before, on_term = dict(os.environ), signal.getsignal(signal.SIGTERM)
        os.environ.update(attempt.env)
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
        os.environ.update(ABLATE_TRIAL=str(attempt.folder), ABLATE_ATTEMPT=str(attempt.number))
        try:
            code = exit_code(find(attempt.entry)())
        except SystemExit as stop:
            code = exit_code(stop.code)
        except Exception:
            traceback.print_exc()
            code = 1
        finally:
            os.environ.clear()
            os.environ.update(before)
            signal.signal(signal.SIGTERM, on_term)
        return self._event(attempt, "exited", f"ended with exit code {code}", code)

    def _event(
        self,
        attempt: Attempt,
        kind: str,
        detail: str,
        code: int | None = None,
        *,
        stopped: bool = False,
    ) -> GangEvent:
        placed = not stopped
        return GangEvent(
            trial_id=attempt.trial_id,
            number=attempt.number,
            kind="placed" if kind == "placed" else "exited",
            detail=detail,
            time=time.time(),
            nodes=(_HERE,) if placed else (),
            pids=(os.getpid(),) if placed else (),
            exit_codes=() if kind == "placed" else (code,),
            failed_rank=0 if code not in (None, 0, 75) else None,
            stopped=stopped,
        )


# DebugCluster is a Cluster; mypy checks it here, where it is defined.
_: type[Cluster] = DebugCluster
