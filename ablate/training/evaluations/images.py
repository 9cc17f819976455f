"""Images that evaluations look at, after a fixed transform."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from ablate.errors import DataError
from ablate.training.data import cache
from ablate.training.data.decode import decode_image, decoders
from ablate.training.data.image_source import ImageSource


class EvalImages:
    """Images after a fixed transform: N x S x S x 3 bytes, mapped from the cache.

    When they would take more than `cache_gib`, they are read anew each time. A transform is known
    by its text and by what it makes of a few pictures: not every text names every setting.
    """

    def __init__(
        self,
        source: ImageSource,
        *,
        transform: Callable[[Any], Any],
        size: tuple[int, int],
        cache_gib: float,
    ) -> None:
        self.source = source
        self._transform = transform
        self._shape = (*size, 3)
        self._pixels: npt.NDArray[np.uint8] | None = None
        if len(source) * int(np.prod(self._shape)) < cache_gib * 2**30:
            made = _digest_transform(transform)
            name = cache.key("eval-2", made, decoders(), *source.facts)
            built = cache.build_once("eval", name, self._build)
            self._pixels = np.load(built / "pixels.npy", mmap_mode="r")

    def __len__(self) -> int:
        return len(self.source)

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        return self.source.labels

    def batches(
        self, start: int, stop: int, batch_size: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(images, labels) of `start` to `stop`."""
        for first in range(start, stop, batch_size):
            last = min(first + batch_size, stop)
            if self._pixels is not None:
                pixels = np.array(self._pixels[first:last])
            else:
                pixels = np.stack(list(self._read(range(first, last))))
            yield torch.from_numpy(pixels), torch.from_numpy(self.labels[first:last])

    def chosen(self, rows: npt.NDArray[np.int64], batch_size: int) -> Iterator[torch.Tensor]:
        """Images of these rows."""
        for first in range(0, len(rows), batch_size):
            mine = rows[first : first + batch_size]
            if self._pixels is not None:
                yield torch.from_numpy(np.array(self._pixels[mine]))
            else:
                yield torch.from_numpy(np.stack(list(self._read(mine.tolist()))))

    def _build(self, folder: Path) -> None:
        pixels = np.lib.format.open_memmap(  # type: ignore[no-untyped-call]
            folder / "pixels.npy", "w+", np.uint8, (len(self), *self._shape)
        )
        for row, image in enumerate(self._read(range(len(self)))):
            pixels[row] = image
        pixels.flush()

    def _read(self, rows: Sequence[int]) -> Iterator[npt.NDArray[np.uint8]]:
        """Transformed images; decoding and resizing leave Python's lock, so threads help."""

        def read(row: int) -> npt.NDArray[np.uint8]:
            try:
                image = decode_image(self.source.read(row))
            except (DataError, OSError) as error:
                raise DataError(f"{self.source.describe(row)}: {error}") from error
            return np.asarray(self._transform(image))

        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            yield from pool.map(read, rows)


def _digest_transform(transform: Callable[[Any], Any]) -> str:
    """Of its text, and of what it makes of a small, a wide and a tall picture of noise."""
    digest = hashlib.sha256(repr(transform).encode())
    rng = np.random.default_rng(0)
    for shape in ((5, 7, 3), (40, 400, 3), (700, 90, 3)):
        picture = Image.fromarray(rng.integers(0, 256, shape, np.uint8))
        digest.update(np.asarray(transform(picture)).tobytes())
    return digest.hexdigest()


def central_crop(size: int) -> Callable[[Any], Any]:
    """The usual transform of evaluations: the shorter side to 256/224 of `size`, bicubic, then the
    central square; as bytes."""
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

    side = size * 256 // 224
    steps: Callable[[Any], Any] = Compose(
        [Resize(side, InterpolationMode.BICUBIC), CenterCrop(size)]
    )
    return steps
