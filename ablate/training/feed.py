"""One rank's batches, on its device, from any step of a run on."""

from __future__ import annotations

import time
from collections.abc import Iterator

from ablate.training.data import batches as data
from ablate.training.ranks import Gang
from ablate.training.task import MicroBatch, Task


class Feed:
    """Hands out the micro-batches of one step after the other."""

    def __init__(self, task: Task, gang: Gang) -> None:
        self.unusable = ""
        """Why this rank's data cannot be used."""
        self._task = task
        self._gang = gang
        self._batches: Iterator[data.Batch] = iter(())

    def start(self, first: int, stop: int) -> None:
        """The next step is `first`, and `stop` is the one after the last."""
        self._batches = self._load(first, stop, workers=self._task.data.workers)

    def next_batches(self) -> tuple[list[MicroBatch], int, float]:
        """One step's micro-batches on the device, their substitutes, seconds waited."""
        began = time.perf_counter()
        micro, faults = [], 0
        for _ in range(self._task.length.accum_freq):
            batch = next(self._batches)
            micro.append(self._placed(batch))
            faults += batch.substitutes
            self.unusable = self.unusable or batch.unusable
        return micro, faults, time.perf_counter() - began

    def peek(self, step: int) -> list[MicroBatch]:
        """The micro-batches of `step`, read in this process; nothing else changes."""
        return [self._placed(batch) for batch in self._load(step, step + 1, workers=0)]

    def _placed(self, batch: data.Batch) -> MicroBatch:
        return tuple(t.to(self._gang.device, non_blocking=True) for t in batch.tensors)

    def _load(self, first: int, stop: int, *, workers: int) -> Iterator[data.Batch]:
        task, length = self._task, self._task.length
        source = data.Batches(
            task.data.samples,
            num_samples=length.num_samples,
            batch_size=length.batch_size,
            accum_freq=length.accum_freq,
            rank=self._gang.rank,
            world_size=self._gang.world_size,
            seed=task.seed,
        )
        return data.load(
            source,
            start=first * length.accum_freq,
            stop=stop * length.accum_freq,
            workers=workers,
            prefetch=task.data.prefetch,
            pin_memory=task.data.pin_memory and self._gang.device.type == "cuda",
        )
