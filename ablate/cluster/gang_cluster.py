"""The Cluster contract for clusters that differ only in where a gang is placed."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from abc import abstractmethod
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, Self, TypeVar

from ablate.cluster.contract import Attempt, Capacity, GangEvent, Shape
from ablate.cluster.gang import Gang, Life
from ablate.errors import ClusterError, PlacementError

_T = TypeVar("_T")


class GangCluster:
    """The life of gangs, for clusters that differ only in where a gang is placed.

    One background thread with its own event loop moves every gang; it lives as long as the
    cluster does, because a process that is bound to its parent is bound to the thread that
    started it.
    """

    def __init__(self) -> None:
        self._events: queue.SimpleQueue[GangEvent] = queue.SimpleQueue()
        self._lives: dict[str, Life] = {}
        self._lock = threading.Lock()
        self._closed = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="cluster", daemon=True)
        self._thread.start()

    # -- where gangs go: for subclasses ---------------------------------------------------------

    @abstractmethod
    async def _place(self, shape: Shape) -> Gang:
        """Wait for all seats at once; cancelled when the attempt is stopped first."""

    @abstractmethod
    async def _release(self, gang: Gang) -> None:
        """Give seats back; nothing of the gang is alive on any machine that still answers."""

    @abstractmethod
    async def _shut_down(self) -> None:
        """Let go of the machines; no gang is left."""

    @abstractmethod
    def capacity(self, shape: Shape) -> Capacity:
        """How many such gangs fit, in total and now."""

    # -- the contract ----------------------------------------------------------------------------

    def start(self, attempt: Attempt) -> None:
        capacity = self.capacity(attempt.shape)
        if capacity.total == 0:
            raise PlacementError(f"trial {attempt.trial_id} can never start: {capacity.reason}")
        with self._lock:
            if self._closed:
                raise ClusterError(f"trial {attempt.trial_id} cannot start: the cluster is closed")
            if attempt.trial_id in self._lives:
                running = self._lives[attempt.trial_id].attempt.number
                raise ClusterError(
                    f"trial {attempt.trial_id} has attempt {running} queued or running; wait for "
                    f"its last event before attempt {attempt.number} is started"
                )
            life = self._lives[attempt.trial_id] = Life(attempt, tell=self._events.put)
        self._loop.call_soon_threadsafe(self._begin, life)

    def wait(self, timeout_s: float) -> list[GangEvent]:
        events: list[GangEvent] = []
        with contextlib.suppress(queue.Empty):
            events.append(self._events.get(timeout=max(0.0, timeout_s)))
            while True:
                events.append(self._events.get_nowait())
        return events

    def stop(self, trial_id: str, *, grace_s: float) -> None:
        self._loop.call_soon_threadsafe(self._stop, trial_id, max(0.0, grace_s))

    def set_aside(self, node: str, shape: Shape) -> bool:
        return False  # a cluster of one machine

    def pids(self) -> dict[str, tuple[int, ...]]:
        with self._lock:
            return {trial: life.pids for trial, life in self._lives.items() if life.pids}

    def close(self, *, grace_s: float = 0.0) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            trials = list(self._lives)
        for trial_id in trials:
            self.stop(trial_id, grace_s=grace_s)
        self._call(self._drain())
        self._call(self._shut_down())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # -- the life of a gang, in the loop --------------------------------------------------------

    def _call(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Run a coroutine in the loop and wait for it, from another thread."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _drain(self) -> None:
        while tasks := [life.task for life in self._lives.values() if life.task is not None]:
            await asyncio.wait(tasks)

    def _begin(self, life: Life) -> None:
        life.placing = self._loop.create_task(self._place(life.attempt.shape))
        life.task = self._loop.create_task(self._live(life))

    def _stop(self, trial_id: str, grace_s: float) -> None:
        if life := self._lives.get(trial_id):
            life.stop(grace_s)

    async def _live(self, life: Life) -> None:
        event = await life.live(self._release)
        with self._lock:
            del self._lives[life.attempt.trial_id]
        self._events.put(event)
