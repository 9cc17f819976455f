"""The order of samples.

A run is a list of positions: micro-batch m of rank r is positions
``m * G + r * b ... m * G + (r + 1) * b - 1`` of its epoch (b: batch size, G: b times ranks).
:class:`Order` maps (epoch, position) to a sample by a seeded two-level permutation: shards, then
samples within windows of shards, so that reading stays local on slow disks. Everything is a
function of the seed and the position, so resuming takes one integer.

An epoch longer than the set passes over it several times. Each pass is a round of its own, with an
order and augmentations of its own (:func:`rounds_of`).
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from ablate.training.data.augment import mix

Ids = npt.NDArray[np.int64]

WINDOW = 16
"""Shards that are shuffled together, if they hold enough samples."""
WINDOW_SAMPLES = 20_000
"""Samples that are shuffled together at least: of shards sorted by class or source, fewer would
fill a batch with one of them. open_clip_train's buffer holds 5000 for each loader process."""


def child_seeds(seed: int) -> tuple[int, int, int]:
    """Independent keys for data order, augmentation and the step's own randomness.

    Spawned from the trial's seed alone, so cells with the same seed are paired.
    """
    children = np.random.SeedSequence(seed).spawn(3)
    order, augmentation, step = (int(c.generate_state(1, np.uint64)[0]) for c in children)
    return order, augmentation, step


def rounds_of(epoch: int, positions: Ids, size: int) -> Ids:
    """The round of each position: the epoch, and how often it passed over the set before."""
    return epoch + (positions // size << 32)


class Order:
    """Which sample stands at a position of a round over the set.

    `window` shards are shuffled together, or as many as hold `WINDOW_SAMPLES` at their mean size.
    """

    def __init__(
        self, shard_sizes: npt.NDArray[np.int64], *, key: int, window: int | None = None
    ) -> None:
        self._sizes = np.asarray(shard_sizes, np.int64)
        self._starts = np.concatenate([[0], np.cumsum(self._sizes)])
        self._key = key
        enough = math.ceil(WINDOW_SAMPLES * len(self._sizes) / max(1, int(self._starts[-1])))
        self._window = max(WINDOW, enough) if window is None else window
        self.size = int(self._starts[-1])
        self._round = lru_cache(maxsize=2)(self._plan)
        self._shuffled = lru_cache(maxsize=4)(self._window_ids)

    def ids(self, rounds: int | Ids, positions: Ids) -> Ids:
        """Sample ids at `positions`, modulo the size of the set, of one round or one for each."""
        positions = positions % self.size
        rounds = np.broadcast_to(np.asarray(rounds), positions.shape)
        ids = np.empty_like(positions)
        for number in np.unique(rounds).tolist():
            chosen = rounds == number
            ids[chosen] = self._in_round(number, positions[chosen])
        return ids

    def _in_round(self, number: int, positions: Ids) -> Ids:
        _, ends = self._round(number)
        windows = np.searchsorted(ends, positions, side="right")
        ids = np.empty_like(positions)
        for window in np.unique(windows).tolist():
            chosen = windows == window
            start = int(ends[window - 1]) if window else 0
            ids[chosen] = self._shuffled(number, window)[positions[chosen] - start]
        return ids

    def _plan(self, number: int) -> tuple[Ids, Ids]:
        """Shards in this round's order, and the position after each window."""
        shards = _permutation(len(self._sizes), self._key, number, 0)
        ends = np.cumsum(self._sizes[shards])
        last = np.minimum(
            np.arange(self._window, len(shards) + self._window, self._window), len(shards)
        )
        return shards, ends[last - 1]

    def _window_ids(self, number: int, window: int) -> Ids:
        """All ids of a window of shards, shuffled."""
        shards, _ = self._round(number)
        chosen = shards[window * self._window : (window + 1) * self._window]
        ids = np.concatenate([np.arange(self._starts[s], self._starts[s + 1]) for s in chosen])
        shuffled: Ids = ids[_permutation(len(ids), self._key, number, window + 1)]
        return shuffled


def _permutation(size: int, *key: int) -> Ids:
    """A permutation of range(size) that depends on `key` alone, on every machine."""
    start = np.zeros(1, np.uint64)
    for part in key:
        start = mix(start ^ np.array([part], np.uint64))
    return np.argsort(mix(start ^ mix(np.arange(size, dtype=np.uint64))), kind="stable")
