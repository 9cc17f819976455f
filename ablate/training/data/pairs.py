"""Image and caption pairs of shards: decoded, tokenised, and kept for all trials of a machine."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from ablate.errors import DataError
from ablate.training.data import cache
from ablate.training.data.augment import Seeds
from ablate.training.data.decode import BLACK, Bytes, decoders, open_pair, read_pair
from ablate.training.data.order import Ids

if TYPE_CHECKING:
    from ablate.training.data.shards import ShardIndex


class ImageTransform(Protocol):
    """Decoded images, and the seed of each one's generator, to one tensor."""

    def __call__(self, images: Sequence[Bytes], seeds: Seeds, /) -> torch.Tensor: ...


class Tokenizer(Protocol):
    """Captions to token numbers, one row a caption."""

    @property
    def fingerprint(self) -> str:
        """Digest of all that decides the numbers (vocabulary, rules, cleaning, length, version of
        the code), whatever its files are called."""
        ...

    def __call__(self, texts: list[str], /) -> torch.Tensor: ...


_PROBES = (
    "a photo of a cat",
    "A Photo of a CAT, 3 dogs & 17.5 birds!",
    "the quick brown fox jumps over the lazy dog",
    "naïve café über Ångström — “quoted”",
    "一张猫的照片 ネコ кошка قطة",
    "  two  spaces\tand\ta line\nbreak ",
    "it's &amp; isn't <end_of_text> [SEP] </s> 😀",
    "",
    " ".join(f"word{number}" for number in range(300)),
)
_SPREAD = 32
"""Texts of a set that are tokenised to find its cached tokens, and pairs that tell its size."""


def key_of_tokens(tokenizer: Tokenizer, texts: Sequence[str]) -> str:
    """What the cached tokens of `texts` depend on, beside the texts.

    The tokenizer's own fingerprint, and what it gives now for a few texts: a fingerprint that
    leaves something out must not hand one model the numbers of another.
    """
    chosen = np.linspace(0, len(texts) - 1, min(_SPREAD, len(texts))).astype(int).tolist()
    given = tokenizer([*_PROBES, *(texts[place] for place in chosen)])
    digest = hashlib.sha256(given.numpy().astype(np.int64).tobytes()).hexdigest()
    return cache.key(tokenizer.fingerprint, tuple(given.shape), digest)


class ImageTextSamples:
    """Image and caption pairs of WebDataset shards: (images, tokens).

    When the decoded images fit into `cache_gib`, they are decoded and the captions tokenised once
    for all trials of the machine, into files that every process maps; else each time. `at_least`
    is for :func:`decode`. `words` is part of the fingerprint: a run whose captions become other
    numbers is none to resume.
    """

    def __init__(
        self,
        index: ShardIndex,
        *,
        transform: ImageTransform,
        tokenizer: Tokenizer,
        cache_gib: float = 0.0,
        at_least: tuple[int, int] | None = None,
        words: str = "",
    ) -> None:
        self._index = index
        self._at_least = at_least
        self._words = words
        self._transform = transform
        self._tokenizer = tokenizer
        self._cached: _Decoded | None = None
        if cache_gib:
            pairs = _spread_pairs(index, at_least)
            if _probable_bytes(index, pairs) < cache_gib * 2**30:
                texts = ["" if pair is None else pair[1] for pair in pairs]
                key = key_of_tokens(tokenizer, texts)
                self._cached = _Decoded(index, tokenizer, key, at_least)

    @property
    def shard_sizes(self) -> npt.NDArray[np.int64]:
        return np.array([shard.num_samples for shard in self._index.shards], np.int64)

    @property
    def fingerprint(self) -> str:
        return self._index.fingerprint + (f"+{self._words}" if self._words else "")

    def batch(self, ids: Ids, seeds: Seeds) -> tuple[tuple[torch.Tensor, ...], npt.NDArray[Any]]:
        """(images, tokens) of these samples; rows of bad ones hold a black image, no text."""
        if self._cached is not None:
            images, tokens, bad = self._cached.rows(ids)
        else:
            images, tokens, bad = self._read(ids)
        return (self._transform(images, seeds), tokens), bad

    def explain(self, sample: int) -> str:
        """Why a sample is bad."""
        try:
            open_pair(self._index, sample, self._at_least)
        except (DataError, OSError) as error:
            return str(error)
        return f"{self._index.describe(sample)} can be read now"

    def _read(self, ids: Ids) -> tuple[list[Bytes], torch.Tensor, npt.NDArray[np.bool_]]:
        pairs = [read_pair(self._index, i, self._at_least) for i in ids.tolist()]
        bad = np.array([pair is None for pair in pairs])
        images = [BLACK if pair is None else pair[0] for pair in pairs]
        tokens = self._tokenizer(["" if pair is None else pair[1] for pair in pairs])
        return images, tokens, bad


def _spread_pairs(
    index: ShardIndex, at_least: tuple[int, int] | None
) -> list[tuple[Bytes, str] | None]:
    """A few pairs from the whole set."""
    if not index.num_samples:
        raise DataError("the shards hold no sample with an image and a caption")
    count = min(_SPREAD, index.num_samples)
    chosen = np.linspace(0, index.num_samples - 1, count).astype(int).tolist()
    return [read_pair(index, i, at_least) for i in chosen]


def _probable_bytes(index: ShardIndex, pairs: Sequence[tuple[Bytes, str] | None]) -> float:
    """Size of all images decoded, from those of `pairs`."""
    sizes = [pair[0].size for pair in pairs if pair is not None]
    return index.num_samples * (float(np.mean(sizes)) if sizes else math.inf)


class _Decoded:
    """All images and tokens of an index, mapped from the cache."""

    def __init__(
        self,
        index: ShardIndex,
        tokenizer: Tokenizer,
        tokens: str,
        at_least: tuple[int, int] | None,
    ) -> None:
        def build(folder: Path) -> None:
            _decode_all(index, tokenizer, folder, at_least)

        name = cache.key("decoded-2", index.fingerprint, tokens, decoders(), at_least)
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
                images.append(BLACK)
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
