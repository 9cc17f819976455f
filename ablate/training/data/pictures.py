"""Images alone as a training set, each image cropped once or often."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ablate.errors import DataError
from ablate.training.data import cache
from ablate.training.data.augment import Seeds, mix, uniforms
from ablate.training.data.decode import BLACK, Bytes, decode, decoders
from ablate.training.data.order import Ids
from ablate.training.data.pairs import ImageTransform
from ablate.training.data.picture_files import PictureFiles

_SPREAD = 32
"""Images from which the size of the whole set decoded is estimated."""
_VIEW = np.uint64(0xD1B54A32D192ED03)
"""An odd number that spreads the views of one image over the seeds (Steele, Lea, Flood 2014)."""


class Pictures:
    """A training set of images: a tensor for each of `views`, and with `labelled` their classes.

    Each view of an image draws from a seed of its own. When the decoded images fit into
    `cache_gib` they are decoded once for all trials of the machine, into a file that every process
    maps; else each time.
    """

    def __init__(
        self,
        files: PictureFiles,
        *,
        views: Sequence[ImageTransform],
        labelled: bool = False,
        cache_gib: float = 0.0,
    ) -> None:
        self._files = files
        self._views = tuple(views)
        self._labels = files.labels if labelled else None
        self._decoded: _Decoded | None = None
        if cache_gib and _probable_bytes(files) < cache_gib * 2**30:
            self._decoded = _Decoded(files)

    @property
    def shard_sizes(self) -> npt.NDArray[np.int64]:
        return self._files.shard_sizes

    @property
    def fingerprint(self) -> str:
        return self._files.fingerprint

    @property
    def num_classes(self) -> int:
        """Of images with their classes: numbers up to the largest."""
        assert self._labels is not None
        return int(self._labels.max()) + 1

    def batch(self, ids: Ids, seeds: Seeds) -> tuple[tuple[torch.Tensor, ...], npt.NDArray[Any]]:
        """The views of these images, each N x ...; rows of bad ones show a black image."""
        if self._decoded is not None:
            images = self._decoded.rows(ids)
        else:
            images = [_read(self._files, number) for number in ids.tolist()]
        bad = np.array([image is None for image in images])
        shown = [BLACK if image is None else image for image in images]
        tensors = [
            view(shown, seeds if number == 0 else view_seeds(seeds, number))
            for number, view in enumerate(self._views)
        ]
        if self._labels is not None:
            tensors.append(torch.from_numpy(self._labels[ids]))
        return tuple(tensors), bad

    def explain(self, sample: int) -> str:
        """Why a sample is bad."""
        try:
            decode(self._files.read(sample))
        except (DataError, OSError) as error:
            return f"{self._files.describe(sample)}: {error}"
        return f"{self._files.describe(sample)} can be read now"


def view_seeds(seeds: Seeds, view: int) -> Seeds:
    """Seeds of another view of the same images."""
    with np.errstate(over="ignore"):
        return mix(seeds ^ (np.uint64(view) * _VIEW))


class Flipped:
    """What another transform makes, mirrored with a chance of one half."""

    def __init__(self, transform: ImageTransform) -> None:
        self._transform = transform

    def __call__(self, images: Sequence[Bytes], seeds: Seeds) -> torch.Tensor:
        made = self._transform(images, seeds)
        mirrored = torch.from_numpy(uniforms(mix(seeds), 1)[:, 0] < 0.5)
        made[mirrored] = made[mirrored].flip(2)
        return made


def _read(files: PictureFiles, number: int) -> Bytes | None:
    try:
        return decode(files.read(number))
    except (DataError, OSError):
        return None


def _probable_bytes(files: PictureFiles) -> float:
    """Size of all images decoded, from a few of the whole set.

    Raises:
        DataError: none of them is readable.
    """
    chosen = np.linspace(0, len(files) - 1, min(_SPREAD, len(files))).astype(int).tolist()
    sizes = [
        image.size for image in (_read(files, number) for number in chosen) if image is not None
    ]
    if not sizes:
        raise DataError(f"none of {len(chosen)} images is readable, {files.describe(0)} is not")
    return len(files) * float(np.mean(sizes))


class _Decoded:
    """All images of a set, mapped from the cache."""

    def __init__(self, files: PictureFiles) -> None:
        def build(folder: Path) -> None:
            shapes = np.zeros((len(files), 2), np.int64)
            with open(folder / "pixels.bin", "wb") as file:
                for number in range(len(files)):
                    image = _read(files, number)
                    if image is not None:
                        shapes[number] = image.shape[:2]
                        file.write(image.tobytes())
            np.save(folder / "shapes.npy", shapes)

        name = cache.key("pictures-1", files.fingerprint, decoders())
        folder = cache.build_once("pictures", name, build)
        # As a plain array: slices of a memmap object cost twelve times as much.
        self._pixels = np.asarray(np.memmap(folder / "pixels.bin", np.uint8, "r"))
        self._shapes = np.load(folder / "shapes.npy")
        self._ends = np.cumsum(self._shapes[:, 0] * self._shapes[:, 1] * 3)

    def rows(self, ids: Ids) -> list[Bytes | None]:
        images: list[Bytes | None] = []
        for end, shape in zip(self._ends[ids].tolist(), self._shapes[ids].tolist(), strict=True):
            height, width = shape
            flat = self._pixels[end - height * width * 3 : end]
            images.append(flat.reshape(height, width, 3) if height else None)
        return images
