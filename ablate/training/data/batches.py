"""Batches of samples in the run's order, from any number of loader processes.

Neither loader processes nor prefetching nor the number of ranks change which samples make up a
global batch. An epoch has ``ceil(samples / G)`` micro-batches as in the peer (G: a batch of all
ranks together); the last one is filled from the epoch's beginning. With accumulation,
micro-batches that make no whole step at the end of an epoch are left out, as the peer leaves them.

A bad sample (unreadable image, empty caption) is replaced by the sample at the next position that
is good, and counted: ranks never misalign, and the same run meets the same substitutes.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ablate.training.counts import steps_per_epoch
from ablate.training.data.augment import sample_seeds
from ablate.training.data.order import Ids, Order, child_seeds, rounds_of

if TYPE_CHECKING:
    from ablate.training.data.samples import Samples

MAX_SUBSTITUTES = 1000
"""Positions that are tried to replace one bad sample before the data count as unusable."""


class Batch(NamedTuple):
    """A micro-batch of one rank."""

    tensors: tuple[torch.Tensor, ...]
    substitutes: int
    """Rows that stand for a bad sample."""
    unusable: str = ""
    """Why some row has no substitute; such a batch must not be learnt from.

    It is no exception, because the other ranks would wait for this one: the loop tells them.
    """


class Batches(Dataset[Batch]):
    """This rank's micro-batches by their number in the run."""

    def __init__(
        self,
        samples: Samples,
        *,
        num_samples: int,
        batch_size: int,
        accum_freq: int,
        rank: int,
        world_size: int,
        seed: int,
    ) -> None:
        order_key, self._augmentation_key, _ = child_seeds(seed)
        self._samples = samples
        self._order = Order(samples.shard_sizes, key=order_key)
        self._num_samples = num_samples
        self._batch_size = batch_size
        self._global_batch = batch_size * world_size
        self._rank = rank
        self._per_epoch = accum_freq * steps_per_epoch(
            num_samples, batch_size=batch_size, accum_freq=accum_freq, world_size=world_size
        )
        # Rounded up to whole batches; what exceeds the set by less than a step only fills one.
        whole = math.ceil(num_samples / self._global_batch) * self._global_batch
        self._passes = whole >= self._order.size + self._global_batch * accum_freq

    def positions(self, number: int) -> tuple[int, Ids]:
        """(epoch, positions in it) of micro-batch `number`."""
        epoch, within = divmod(number, self._per_epoch)
        start = within * self._global_batch + self._rank * self._batch_size
        positions = np.arange(start, start + self._batch_size)
        return epoch, positions if self._passes else positions % self._num_samples

    def ids(self, number: int) -> Ids:
        """Sample ids of micro-batch `number`, before any substitution."""
        epoch, positions = self.positions(number)
        return self._order.ids(self._rounds(epoch, positions), positions)

    def _rounds(self, epoch: int, positions: Ids) -> Ids:
        if self._passes:
            return rounds_of(epoch, positions, self._order.size)
        return np.full_like(positions, epoch)

    def __getitem__(self, number: int) -> Batch:
        epoch, positions = self.positions(number)
        rounds = self._rounds(epoch, positions)
        ids = self._order.ids(rounds, positions)
        seeds = sample_seeds(self._augmentation_key, rounds, ids)
        tensors, bad = self._samples.batch(ids, seeds)
        for row in np.flatnonzero(bad).tolist():
            position = int(positions[row])
            replacement = self._substitute(int(rounds[row]), position)
            if replacement is None:
                return Batch(tensors, int(bad.sum()), self._why(epoch, position, int(ids[row])))
            for tensor, value in zip(tensors, replacement, strict=True):
                tensor[row] = value[0]
        return Batch(tensors, int(bad.sum()))

    def _why(self, epoch: int, position: int, sample: int) -> str:
        tried = min(MAX_SUBSTITUTES, self._order.size)
        explain = getattr(self._samples, "explain", None)
        first = f"; the first: {explain(sample)}" if explain is not None else ""
        return (
            f"{tried} samples in a row cannot be used, from position {position} of epoch {epoch} "
            f"on{first}. `ablate data check` tells of all of them"
        )

    def _substitute(self, number: int, position: int) -> tuple[torch.Tensor, ...] | None:
        """The next good sample of the same round."""
        last = position + min(MAX_SUBSTITUTES, self._order.size)
        for later in range(position + 1, last + 1):
            ids = self._order.ids(number, np.array([later]))
            tensors, bad = self._samples.batch(
                ids, sample_seeds(self._augmentation_key, number, ids)
            )
            if not bad[0]:
                return tensors
        return None


def load(
    batches: Batches, *, start: int, stop: int, workers: int, prefetch: int, pin_memory: bool
) -> Iterator[Batch]:
    """Micro-batches `start` to `stop`; `workers` processes read `prefetch` ahead (0: read here).

    The processes live as long as the run: an epoch's end does not empty what was read ahead.
    """
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=range(start, stop),
        num_workers=workers,
        pin_memory=pin_memory,
        collate_fn=_as_it_is,
        prefetch_factor=prefetch if workers else None,
        # Forked loaders share the index and the mapped caches, and start at once, whatever the
        # start method of the process that runs us.
        multiprocessing_context="fork" if workers else None,
        worker_init_fn=_ignore_stop_signals,
    )
    return iter(loader)


def _ignore_stop_signals(worker: int) -> None:
    """Some launchers send SIGTERM to every process of a job; the rank still needs its loaders
    until its last step and checkpoint. They end with their rank, also when it is killed."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _as_it_is(item: Any) -> Any:
    return item
