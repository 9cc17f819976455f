"""Video clips as a training set: frames drawn and cut for each sample, with its label or caption.

When all frames of all clips fit into `cache_gib`, they are decoded once for all trials of a
machine, into a file that every process maps; else each time.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL
import torch

from ablate.errors import DataError
from ablate.training.data import cache
from ablate.training.data.augment import Seeds
from ablate.training.data.clips import ClipSource, Frames, count_frames, read_frames
from ablate.training.data.frames import Choice, TrainCut
from ablate.training.data.order import Ids

_SPREAD = 16
"""Clips of a set that tell its size."""


class ClipReader:
    """Frames of a set's clips, from the cache where they fit."""

    def __init__(self, source: ClipSource, *, cache_gib: float) -> None:
        self._source = source
        self._cached: _Decoded | None = None
        if cache_gib and _probable_bytes(source) < cache_gib * 2**30:
            self._cached = _Decoded(source)

    def length(self, clip: int) -> int:
        """Frames of a clip.

        Raises:
            DataError: it cannot be read.
        """
        if self._cached is not None:
            return self._cached.length(clip)
        return count_frames(self._source.paths[clip])

    def frames(self, clip: int, wanted: npt.NDArray[np.int64]) -> Frames:
        """Those frames of a clip.

        Raises:
            DataError: it cannot be read.
        """
        if self._cached is not None:
            return self._cached.frames(clip)[wanted]
        return read_frames(self._source.paths[clip], wanted.tolist())


class ClipSamples:
    """(clips N x T x 3 x S x S bytes, labels N) or, with `tokens`, (clips, tokens N x L)."""

    def __init__(
        self,
        source: ClipSource,
        *,
        choice: Choice,
        cut: TrainCut,
        tokens: torch.Tensor | None = None,
        words: str = "",
        cache_gib: float = 0.0,
    ) -> None:
        self._source = source
        self._reader = ClipReader(source, cache_gib=cache_gib)
        self._choice = choice
        self._cut = cut
        self._answers = torch.from_numpy(source.labels) if tokens is None else tokens
        self._words = words

    @property
    def shard_sizes(self) -> npt.NDArray[np.int64]:
        return np.array([len(self._source)], np.int64)

    @property
    def fingerprint(self) -> str:
        return self._source.fingerprint + (f"+{self._words}" if self._words else "")

    def batch(self, ids: Ids, seeds: Seeds) -> tuple[tuple[torch.Tensor, ...], npt.NDArray[Any]]:
        """Clips and labels or tokens of these samples; the clip of a bad one is black."""
        size = self._cut.size
        clips = torch.zeros(len(ids), self._choice.num_frames, 3, size, size, dtype=torch.uint8)
        bad = np.zeros(len(ids), bool)
        for row, (clip, seed) in enumerate(zip(ids.tolist(), seeds, strict=True)):
            try:
                clips[row] = self._read(clip, seed)
            except (DataError, OSError):
                bad[row] = True
        return (clips, self._answers[torch.from_numpy(ids)]), bad

    def explain(self, sample: int) -> str:
        """Why a sample is bad."""
        try:
            self._read(sample, np.uint64(0))
        except (DataError, OSError) as error:
            return str(error)
        return f"{self._source.paths[sample]} can be read now"

    def _read(self, clip: int, seed: np.uint64) -> torch.Tensor:
        wanted = self._choice.drawn(self._reader.length(clip), seed)
        return self._cut(self._reader.frames(clip, wanted), seed)


def _probable_bytes(source: ClipSource) -> float:
    """Size of all clips decoded, from a few of the whole set."""
    count = min(_SPREAD, len(source))
    sizes = []
    for clip in np.linspace(0, len(source) - 1, count).astype(int).tolist():
        try:
            path = source.paths[clip]
            sizes.append(count_frames(path) * read_frames(path, [0]).size)
        except (DataError, OSError):
            continue
    if not sizes:
        raise DataError(f"none of {count} clips of {source.place} can be read; check them")
    return len(source) * float(np.mean(sizes))


class _Decoded:
    """All frames of a set, mapped from the cache; none of a clip that cannot be read."""

    def __init__(self, source: ClipSource) -> None:
        facts = [cache.facts_of(path) if path.exists() else () for path in source.paths]
        name = cache.key("clips-1", *map(str, source.paths), *facts, PIL.__version__, _av())
        folder = cache.build_once("clips", name, lambda place: _decode_all(source, place))
        self._pixels = np.asarray(np.memmap(folder / "pixels.bin", np.uint8, "r"))
        self._shapes = np.load(folder / "shapes.npy")
        self._ends = np.cumsum(self._shapes.prod(axis=1) * 3)

    def length(self, clip: int) -> int:
        frames = int(self._shapes[clip, 0])
        if not frames:
            raise DataError("it could not be decoded")
        return frames

    def frames(self, clip: int) -> Frames:
        shape = (*self._shapes[clip].tolist(), 3)
        end = int(self._ends[clip])
        return self._pixels[end - int(np.prod(shape)) : end].reshape(shape)


def _decode_all(source: ClipSource, folder: Path) -> None:
    """Write pixels.bin and shapes.npy (frames, height, width; 0: a clip that cannot be read)."""
    shapes = np.zeros((len(source), 3), np.int64)
    with open(folder / "pixels.bin", "wb") as file:
        for clip, path in enumerate(source.paths):
            try:
                frames = read_frames(path)
            except (DataError, OSError):
                continue
            shapes[clip] = frames.shape[:3]
            file.write(frames.tobytes())
    if not shapes.any():
        raise DataError(f"none of the clips of {source.place} is readable; check them")
    np.save(folder / "shapes.npy", shapes)


def _av() -> str:
    """Version of PyAV, whose decoders decide pixels; empty without it."""
    try:
        import av
    except ImportError:
        return ""
    return str(av.__version__)
