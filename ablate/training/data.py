"""The order of samples, and batches in that order.

A run is a list of positions: micro-batch m of rank r is positions
``m * G + r * b ... m * G + (r + 1) * b - 1`` of its epoch (b: batch size, G: b times ranks).
:class:`Order` maps (epoch, position) to a sample by a seeded two-level permutation: shards, then
samples within windows of shards, so that reading stays local on slow disks. Everything is a
function of the seed and the position, so resuming takes one integer, and neither loader
processes nor prefetching nor the number of ranks change which samples make up a global batch.

An epoch has ``ceil(samples / G)`` micro-batches as in the peer; the last one is filled from the
epoch's beginning. With accumulation, micro-batches that make no whole step at the end of an epoch
are left out, as the peer leaves them.

A bad sample (unreadable image, empty caption) is replaced by the sample at the next position that
is good, and counted: ranks never misalign, and the same run meets the same substitutes.
"""

from __future__ import annotations

import io
import math
import signal
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import PIL
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from ablate.errors import DataError
from ablate.training import cache
from ablate.training.augment import Bytes, Seeds, mix, sample_seeds

if TYPE_CHECKING:
    from ablate.datasets.shards import ShardIndex
    from ablate.recipes import Samples

Ids = npt.NDArray[np.int64]

WINDOW = 16
"""Shards that are shuffled together."""
BY_POSITION = "by seed and position"
STREAMED = (
    "streamed, not reproducible: after a resume the rest of the epoch is drawn anew, so some of "
    "its samples come twice and others not at all"
)
"""What a record says about the order of a run's samples."""
MAX_SUBSTITUTES = 1000
"""Positions that are tried to replace one bad sample before the data count as unusable."""


def child_seeds(seed: int) -> tuple[int, int, int]:
    """Independent keys for data order, augmentation and the step's own randomness.

    Spawned from the trial's seed alone, so cells with the same seed are paired.
    """
    children = np.random.SeedSequence(seed).spawn(3)
    order, augmentation, step = (int(c.generate_state(1, np.uint64)[0]) for c in children)
    return order, augmentation, step


class Order:
    """Which sample stands at a position of an epoch."""

    def __init__(self, shard_sizes: npt.NDArray[np.int64], *, key: int, window: int = WINDOW):
        self._sizes = np.asarray(shard_sizes, np.int64)
        self._starts = np.concatenate([[0], np.cumsum(self._sizes)])
        self._key = key
        self._window = window
        self.size = int(self._starts[-1])
        self._epoch = lru_cache(maxsize=2)(self._plan)
        self._shuffled = lru_cache(maxsize=4)(self._window_ids)

    def ids(self, epoch: int, positions: Ids) -> Ids:
        """Sample ids at `positions`, which are taken modulo the size of the set."""
        positions = positions % self.size
        _, ends = self._epoch(epoch)
        windows = np.searchsorted(ends, positions, side="right")
        ids = np.empty_like(positions)
        for number in np.unique(windows).tolist():
            chosen = windows == number
            start = int(ends[number - 1]) if number else 0
            ids[chosen] = self._shuffled(epoch, number)[positions[chosen] - start]
        return ids

    def _plan(self, epoch: int) -> tuple[Ids, Ids]:
        """Shards in this epoch's order, and the position after each window."""
        shards = _permutation(len(self._sizes), self._key, epoch, 0)
        ends = np.cumsum(self._sizes[shards])
        last = np.minimum(
            np.arange(self._window, len(shards) + self._window, self._window), len(shards)
        )
        return shards, ends[last - 1]

    def _window_ids(self, epoch: int, number: int) -> Ids:
        """All ids of a window of shards, shuffled."""
        shards, _ = self._epoch(epoch)
        chosen = shards[number * self._window : (number + 1) * self._window]
        ids = np.concatenate([np.arange(self._starts[s], self._starts[s + 1]) for s in chosen])
        shuffled: Ids = ids[_permutation(len(ids), self._key, epoch, number + 1)]
        return shuffled


def _permutation(size: int, *key: int) -> Ids:
    """A permutation of range(size) that depends on `key` alone, on every machine."""
    start = np.zeros(1, np.uint64)
    for part in key:
        start = mix(start ^ np.array([part], np.uint64))
    return np.argsort(mix(start ^ mix(np.arange(size, dtype=np.uint64))), kind="stable")


def steps_per_epoch(num_samples: int, *, batch_size: int, accum_freq: int, world_size: int) -> int:
    """Optimizer steps of an epoch, as the peer counts with at most one loader process."""
    return math.ceil(num_samples / (batch_size * world_size)) // accum_freq


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

    def positions(self, number: int) -> tuple[int, Ids]:
        """(epoch, positions in it) of micro-batch `number`."""
        epoch, within = divmod(number, self._per_epoch)
        start = within * self._global_batch + self._rank * self._batch_size
        return epoch, np.arange(start, start + self._batch_size) % self._num_samples

    def ids(self, number: int) -> Ids:
        """Sample ids of micro-batch `number`, before any substitution."""
        epoch, positions = self.positions(number)
        return self._order.ids(epoch, positions)

    def __getitem__(self, number: int) -> Batch:
        epoch, positions = self.positions(number)
        ids = self._order.ids(epoch, positions)
        seeds = sample_seeds(self._augmentation_key, epoch, ids)
        tensors, bad = self._samples.batch(ids, seeds)
        for row in np.flatnonzero(bad).tolist():
            position = int(positions[row])
            replacement = self._substitute(epoch, position)
            if replacement is None:
                unusable = (
                    f"{MAX_SUBSTITUTES} samples in a row are unreadable, from position {position} "
                    f"of epoch {epoch} on. Check the shards (ablate doctor), or fetch them again"
                )
                return Batch(tensors, int(bad.sum()), unusable)
            for tensor, value in zip(tensors, replacement, strict=True):
                tensor[row] = value[0]
        return Batch(tensors, int(bad.sum()))

    def _substitute(self, epoch: int, position: int) -> tuple[torch.Tensor, ...] | None:
        for later in range(position + 1, position + 1 + MAX_SUBSTITUTES):
            ids = self._order.ids(epoch, np.array([later]))
            tensors, bad = self._samples.batch(
                ids, sample_seeds(self._augmentation_key, epoch, ids)
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
        worker_init_fn=ignore_stop_signals,
    )
    return iter(loader)


def ignore_stop_signals(worker: int) -> None:
    """Some launchers send SIGTERM to every process of a job; the rank still needs its loaders
    until its last step and checkpoint. They end with their rank, also when it is killed."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _as_it_is(item: Any) -> Any:
    return item


# --------------------------------------------------------------------------- images and captions


class ImageTransform(Protocol):
    """Decoded images, and the seed of each one's generator, to one tensor."""

    def __call__(self, images: Sequence[Bytes], seeds: Seeds, /) -> torch.Tensor: ...


class Tokenizer(Protocol):
    """Captions to token numbers, one row a caption."""

    def __call__(self, texts: list[str], /) -> torch.Tensor: ...


class ImageTextSamples:
    """Image and caption pairs of WebDataset shards: (images, tokens).

    When the decoded images fit into `cache_gib`, they are decoded and the captions tokenised once
    for all trials of the machine, into files that every process maps; else each time. `at_least`
    is for :func:`decode`.
    """

    def __init__(
        self,
        index: ShardIndex,
        *,
        transform: ImageTransform,
        tokenizer: Tokenizer,
        tokenizer_name: str,
        cache_gib: float = 0.0,
        at_least: tuple[int, int] | None = None,
    ) -> None:
        self._index = index
        self._at_least = at_least
        self._transform = transform
        self._tokenizer = tokenizer
        self._cached: _Decoded | None = None
        if cache_gib and _probable_bytes(index, at_least) < cache_gib * 2**30:
            self._cached = _Decoded(index, tokenizer, tokenizer_name, at_least)

    @property
    def shard_sizes(self) -> npt.NDArray[np.int64]:
        return np.array([shard.num_samples for shard in self._index.shards], np.int64)

    @property
    def fingerprint(self) -> str:
        return self._index.fingerprint

    def batch(self, ids: Ids, seeds: Seeds) -> tuple[tuple[torch.Tensor, ...], npt.NDArray[Any]]:
        """(images, tokens) of these samples; rows of bad ones hold a black image, no text."""
        if self._cached is not None:
            images, tokens, bad = self._cached.rows(ids)
        else:
            images, tokens, bad = self._read(ids)
        return (self._transform(images, seeds), tokens), bad

    def _read(self, ids: Ids) -> tuple[list[Bytes], torch.Tensor, npt.NDArray[np.bool_]]:
        pairs = [read_pair(self._index, i, self._at_least) for i in ids.tolist()]
        bad = np.array([pair is None for pair in pairs])
        images = [_BLACK if pair is None else pair[0] for pair in pairs]
        tokens = self._tokenizer(["" if pair is None else pair[1] for pair in pairs])
        return images, tokens, bad


_BLACK: Bytes = np.zeros((8, 8, 3), np.uint8)


def read_pair(
    index: ShardIndex, sample: int, at_least: tuple[int, int] | None = None
) -> tuple[Bytes, str] | None:
    """Decoded image and caption; None when the image is unreadable or the caption empty."""
    try:
        data, caption = index.read(sample)
        return (decode(data, at_least), caption) if caption.strip() else None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        # What Pillow raises for damaged files; DataError is a ValueError too.
        return None


def decode(data: bytes, at_least: tuple[int, int] | None = None) -> Bytes:
    """An image file as H x W x 3 bytes, as the peer's loader decodes it.

    With `at_least` (height, width) a JPEG is decoded at the smallest of 1/1, 1/2, 1/4, 1/8 of its
    side that is no smaller than that: libjpeg then computes only the coefficients it needs.

    Raises:
        OSError, ValueError, SyntaxError: it is damaged.
    """
    with Image.open(io.BytesIO(data)) as image:
        if at_least is not None:
            image.draft("RGB", (at_least[1], at_least[0]))  # other formats ignore it
        return np.asarray(image.convert("RGB"))


def _probable_bytes(index: ShardIndex, at_least: tuple[int, int] | None) -> float:
    """Size of all images decoded, from 32 of them."""
    if not index.num_samples:
        raise DataError("the shards hold no sample with an image and a caption")
    chosen = np.linspace(0, index.num_samples - 1, min(32, index.num_samples)).astype(int).tolist()
    pairs = (read_pair(index, i, at_least) for i in chosen)
    sizes = [pair[0].size for pair in pairs if pair is not None]
    return index.num_samples * (float(np.mean(sizes)) if sizes else math.inf)


class _Decoded:
    """All images and tokens of an index, mapped from the cache."""

    def __init__(
        self,
        index: ShardIndex,
        tokenizer: Tokenizer,
        tokenizer_name: str,
        at_least: tuple[int, int] | None,
    ) -> None:
        def build(folder: Path) -> None:
            _decode_all(index, tokenizer, folder, at_least)

        # Pillow's version: another one may decode a JPEG with other rounding.
        name = cache.key("decoded-1", index.fingerprint, tokenizer_name, PIL.__version__, at_least)
        folder = cache.build_once("decoded", name, build)
        # As a plain array: slices of a memmap object cost twelve times as much.
        self._pixels = np.asarray(np.memmap(folder / "pixels.bin", np.uint8, "r"))
        self._shapes = np.load(folder / "shapes.npy")
        self._ends = np.cumsum(self._shapes[:, 0] * self._shapes[:, 1] * 3)
        self._tokens = np.load(folder / "tokens.npy", mmap_mode="r")

    def rows(self, ids: Ids) -> tuple[list[Bytes], torch.Tensor, npt.NDArray[np.bool_]]:
        shapes = self._shapes[ids]
        images: list[Bytes] = []
        for end, (height, width) in zip(self._ends[ids].tolist(), shapes.tolist(), strict=True):
            if height:
                flat = self._pixels[end - height * width * 3 : end]
                images.append(flat.reshape(height, width, 3))
            else:
                images.append(_BLACK)
        tokens = torch.from_numpy(self._tokens[ids].astype(np.int64))
        return images, tokens, shapes[:, 0] == 0


def _decode_all(
    index: ShardIndex, tokenizer: Tokenizer, folder: Path, at_least: tuple[int, int] | None
) -> None:
    """Write pixels.bin, shapes.npy (0 x 0: a bad sample) and tokens.npy."""
    shapes = np.zeros((index.num_samples, 2), np.int64)
    rows = []
    with open(folder / "pixels.bin", "wb") as file:
        for sample in range(index.num_samples):
            pair = read_pair(index, sample, at_least)
            if pair is not None:
                shapes[sample] = pair[0].shape[:2]
                file.write(pair[0].tobytes())
            rows.append(tokenizer(["" if pair is None else pair[1]]).numpy().astype(np.int32))
        if not shapes.any():
            raise DataError("none of the samples is readable; check the shards")
    np.save(folder / "shapes.npy", shapes)
    np.save(folder / "tokens.npy", np.concatenate(rows))
