"""Numbers of a step averaged over the ranks, without waiting for the device that computes them.

On a GPU the scalars of a step stay there; they are copied to pinned memory together with those of
the steps around it and read when the next copy is due. So records, markers and stop flags lag by
up to two intervals between copies: of so many steps as take a second, and never more than 16. On
a CPU they are read at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import torch

from ablate.training.ranks import Gang, sum_over_ranks

FLUSH_STEPS = 16
"""Most steps between two copies."""
EARS_S = 1.0
"""Seconds between two copies, where a step takes less: a stop must be heard well within the grace
of two minutes that clouds and batch systems give, and a checkpoint written."""

FLAGS = ("stop", "end", "faults", "unusable", "save")
"""A stop was asked for, the markers want an end, substituted samples, data unusable, a checkpoint
is due."""

Row = tuple[dict[str, Any], dict[str, float]]
"""What the host knew of a step, and the numbers of its device."""


class Mark(Protocol):
    """A point in the device's own time, as torch.cuda.Event."""

    def elapsed_time(self, end: Any, /) -> float:
        """Milliseconds from here to `end`, when both have passed."""


class _Pushed(NamedTuple):
    """A step whose numbers are on the device."""

    host: dict[str, Any]
    names: tuple[str, ...]
    vector: torch.Tensor
    mark: Mark | None


class _Copy(NamedTuple):
    """Steps whose numbers are on their way to the host."""

    steps: list[_Pushed]
    vectors: list[torch.Tensor]
    done: torch.cuda.Event | None


class Exchange:
    """Measurements averaged over the ranks, and flags added up.

    Pushed are scalars on the device; what comes back are plain numbers of earlier steps. Which
    steps come back at which push is the same on all ranks: rank 0 decides on the interval, by its
    clock, and its wish arrives with the numbers.
    """

    def __init__(
        self,
        gang: Gang,
        *,
        interval: int = 1,
        at_once: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
        mark: Callable[[], Mark] | None = None,
    ) -> None:
        """`interval`: steps until the first copy. `at_once`: read in the same step; by default on
        CPUs. `mark`: the device's time where it is not the host's; by default on GPUs."""
        self._gang = gang
        self._at_once = gang.device.type == "cpu" if at_once is None else at_once
        self._clock = clock
        self._mark = _cuda_mark if mark is None and gang.device.type == "cuda" else mark
        self._last: Mark | None = None
        """When the step before ended, on the device."""
        self._interval = self._wish = interval
        self._since: float | None = None
        self._pushed = 0
        self._waiting: list[_Pushed] = []
        self._copied: _Copy | None = None

    @property
    def waiting(self) -> list[tuple[str, ...]]:
        """Names of the numbers of each step whose copy has not begun."""
        return [step.names for step in self._waiting]

    def begin(self) -> None:
        """The next step begins now: what was since the one before is none of its time."""
        self._last = self._mark() if self._mark else None

    def push(
        self,
        values: Mapping[str, torch.Tensor],
        flags: tuple[float, float, float, float, float],
        host: dict[str, Any],
    ) -> list[Row]:
        """Take in a step; give back the steps whose numbers have arrived.

        A GPU's steps come back with ``step_time_s`` by its own clock: the host only hands them
        over, until the queue is full, and then waits for many at once.

        `flags` are this rank's FLAGS, added up over the ranks. The order in which names come is
        the same on all ranks.
        """
        device, names = self._gang.device, tuple(values)
        # To the widest type among them first: exact, and one conversion in the place of many.
        vector = torch.stack([value.reshape(()) for value in values.values()]).double()
        wish = float(self._wish) if self._gang.first else 0.0
        # From memory that is not pinned, a copy would wait for the GPU.
        told = torch.tensor((*flags, wish), dtype=torch.float64, pin_memory=device.type == "cuda")
        vector = torch.cat([vector, told.to(device, non_blocking=True)])
        if self._gang.world_size > 1:
            sum_over_ranks(vector, self._gang)
            vector[: len(names)] /= self._gang.world_size
        if self._at_once:
            return [self._read(host, names, vector)]
        self._pushed += 1
        self._waiting.append(_Pushed(host, names, vector, self._mark() if self._mark else None))
        if len(self._waiting) < self._interval:
            return []
        arrived = self._arrived()
        self._start_copy()
        return arrived

    def flush(self) -> list[Row]:
        """Everything that was pushed, waiting for the device."""
        arrived = self._arrived()
        if self._waiting:
            self._start_copy()
            arrived += self._arrived()
        self._since = None  # what comes now is no step
        return arrived

    def _start_copy(self) -> None:
        cuda = self._gang.device.type == "cuda"
        on_host = [
            torch.empty(step.vector.shape, dtype=step.vector.dtype, pin_memory=cuda)
            for step in self._waiting
        ]
        for step, target in zip(self._waiting, on_host, strict=True):
            target.copy_(step.vector, non_blocking=True)
        done = torch.cuda.Event() if cuda else None  # type: ignore[no-untyped-call]
        if done is not None:
            done.record()
        self._copied = _Copy(self._waiting, on_host, done)
        self._waiting = []

    def _arrived(self) -> list[Row]:
        if self._copied is None:
            return []
        (steps, vectors, done), self._copied = self._copied, None
        if done is not None:
            done.synchronize()
        now = self._clock()
        if self._since is not None and self._pushed:
            self._wish = interval_of((now - self._since) / self._pushed)
        self._since, self._pushed = now, 0
        return [
            self._read(self._timed(step), step.names, vector)
            for step, vector in zip(steps, vectors, strict=True)
        ]

    def _timed(self, step: _Pushed) -> dict[str, Any]:
        before, self._last = self._last, step.mark
        if before is None or step.mark is None:
            return step.host
        return {**step.host, "step_time_s": before.elapsed_time(step.mark) / 1000}

    def _read(self, host: dict[str, Any], names: tuple[str, ...], vector: torch.Tensor) -> Row:
        *numbers, interval = vector.tolist()
        self._interval = round(interval)
        return host, dict(zip((*names, *FLAGS), numbers, strict=True))


def _cuda_mark() -> Mark:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def interval_of(seconds_a_step: float) -> int:
    """Steps between two copies where a step takes so long."""
    if seconds_a_step * FLUSH_STEPS <= EARS_S:
        return FLUSH_STEPS
    return max(1, int(EARS_S / seconds_a_step))
