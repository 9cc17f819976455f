"""Images to tensors, with a random generator of its own for every sample.

A sample's augmentation depends on (seed, epoch, sample) alone: not on the number of loader
processes, on the world size or on what was drawn before. So cells with the same seed see the same
crops, and a resumed run sees those it would have seen.

Shapes: N images, H x W x 3 bytes each (sizes may differ); batches are N x S x S x 3 bytes or, when
a transform makes floats itself, N x 3 x S x S.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from ablate.training.data.decode import Bytes

Seeds = npt.NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_ATTEMPTS = 10
"""Tries to fit a random crop into the image before a central one is taken, as torchvision."""


def mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014): a bijection that looks random.

    Integer arithmetic alone, so its numbers are the same on every machine and numpy version.
    """
    with np.errstate(over="ignore"):
        values = values + _GOLDEN
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed: npt.NDArray[np.uint64] = values ^ (values >> np.uint64(31))
        return mixed


def sample_seeds(
    key: int, rounds: int | npt.NDArray[np.int64], ids: npt.NDArray[np.int64]
) -> Seeds:
    """The seed of each sample's generator in a round over the set, one for all or one a sample."""
    start = mix(mix(np.array([key], np.uint64)) ^ np.asarray(rounds).astype(np.uint64))
    return mix(start ^ mix(ids.astype(np.uint64)))


def uniforms(seeds: Seeds, count: int) -> npt.NDArray[np.float64]:
    """`count` numbers in [0, 1) from each seed; shape (len(seeds), count)."""
    with np.errstate(over="ignore"):
        counters = seeds[:, None] + _GOLDEN * np.arange(1, count + 1, dtype=np.uint64)
    return (mix(counters) >> np.uint64(11)).astype(np.float64) * 2.0**-53


class SeededCrop:
    """torchvision's RandomResizedCrop (ratio 3/4 to 4/3, bicubic), drawn for a batch at once.

    Same distribution and, for the same crop, the same bytes as torchvision's on PIL images; what
    it leaves out is the per-image overhead. `colours` changes the resized images, all at once;
    `extra` are transforms of each as a PIL image, after it, called with all global generators
    seeded from the sample's. `fast` resizes by torch's kernel, which rounds otherwise than
    Pillow's: by 1 of 255 in about one of a hundred values, rarely by 2.
    Bytes are returned; :class:`ToInput` makes them floats on the device.
    """

    def __init__(
        self,
        size: int | tuple[int, int],
        *,
        scale: tuple[float, float],
        ratio: tuple[float, float] = (3.0 / 4.0, 4.0 / 3.0),
        colours: Callable[[Bytes, Seeds], None] | None = None,
        extra: Sequence[Callable[[Any], Any]] = (),
        fast: bool = False,
    ) -> None:
        self.size = (size, size) if isinstance(size, int) else size
        self.scale = scale
        self.ratio = ratio
        self.colours = colours
        self.extra = tuple(extra)
        self.fast = fast

    def boxes(
        self, heights: npt.NDArray[np.int64], widths: npt.NDArray[np.int64], seeds: Seeds
    ) -> npt.NDArray[np.int64]:
        """Crop of each image as (top, left, height, width); shape (N, 4)."""
        draws = uniforms(seeds, 4 * _ATTEMPTS).reshape(len(seeds), _ATTEMPTS, 4)
        area = (heights * widths)[:, None]
        low, high = self.scale
        target = area * (low + (high - low) * draws[:, :, 0])
        log_low, log_high = np.log(self.ratio[0]), np.log(self.ratio[1])
        aspect = np.exp(log_low + (log_high - log_low) * draws[:, :, 1])
        crop_w = np.rint(np.sqrt(target * aspect)).astype(np.int64)
        crop_h = np.rint(np.sqrt(target / aspect)).astype(np.int64)
        fits = (0 < crop_w) & (crop_w <= widths[:, None]) & (0 < crop_h)
        fits &= crop_h <= heights[:, None]
        first = fits.argmax(axis=1)
        rows = np.arange(len(seeds))
        h, w = crop_h[rows, first], crop_w[rows, first]
        u = draws[rows, first]
        top = (u[:, 2] * (heights - h + 1)).astype(np.int64)
        left = (u[:, 3] * (widths - w + 1)).astype(np.int64)
        boxes = np.stack([top, left, h, w], axis=1)
        for row in np.flatnonzero(~fits.any(axis=1)):
            boxes[row] = self._central(int(heights[row]), int(widths[row]))
        return boxes

    def _central(self, height: int, width: int) -> tuple[int, int, int, int]:
        aspect = width / height
        w, h = width, height
        if aspect < min(self.ratio):
            h = round(w / min(self.ratio))
        elif aspect > max(self.ratio):
            w = round(h * max(self.ratio))
        return (height - h) // 2, (width - w) // 2, h, w

    def __call__(self, images: Sequence[Bytes], seeds: Seeds) -> torch.Tensor:
        heights = np.array([image.shape[0] for image in images], np.int64)
        widths = np.array([image.shape[1] for image in images], np.int64)
        batch = np.empty((len(images), *self.size, 3), np.uint8)
        for row, (image, box) in enumerate(
            zip(images, self.boxes(heights, widths, seeds).tolist(), strict=True)
        ):
            top, left, h, w = box
            # Crop first: resizing with a box would let the filter see pixels outside of it.
            batch[row] = self._resize(image[top : top + h, left : left + w])
        if self.colours is not None:
            self.colours(batch, seeds)
        for row, seed in enumerate(seeds.tolist() if self.extra else ()):
            seed_globals(seed)
            picture = Image.fromarray(batch[row])
            for transform in self.extra:
                picture = transform(picture)
            batch[row] = np.asarray(picture)
        return torch.from_numpy(batch)

    def _resize(self, crop: Bytes) -> Bytes:
        height, width = self.size
        if not self.fast:
            picture = Image.fromarray(crop)
            return np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC))
        shorter, narrower = crop.shape[0] - height, crop.shape[1] - width
        # Pillow 13 reduces the height first where it shrinks by more than twice as many pixels
        # (ImagingResampleInner in Resample.c), torch always the width.
        if shorter > max(0, 2 * narrower):
            return self._width_first(crop.transpose(1, 0, 2), (width, height)).transpose(1, 0, 2)
        return self._width_first(crop, (height, width))

    def _width_first(self, crop: Bytes, size: tuple[int, int]) -> Bytes:
        pixels = torch.from_numpy(crop.copy()).permute(2, 0, 1)[None]  # the cache is read-only
        small = torch.nn.functional.interpolate(pixels, size=size, mode="bicubic", antialias=True)
        resized: Bytes = small[0].permute(1, 2, 0).numpy()
        return resized


class SeededTransform:
    """Any transform of PIL images, with all global generators seeded from each sample's."""

    def __init__(self, transform: Callable[[Any], torch.Tensor]) -> None:
        self.transform = transform

    def __call__(self, images: Sequence[Bytes], seeds: Seeds) -> torch.Tensor:
        rows = []
        for image, seed in zip(images, seeds.tolist(), strict=True):
            seed_globals(seed)
            rows.append(self.transform(Image.fromarray(image)))
        return torch.stack(rows)


def seed_globals(seed: int) -> None:
    """Seed torch's CPU generator, numpy's and Python's."""
    torch.default_generator.manual_seed(seed & 0x7FFFFFFFFFFFFFFF)
    np.random.seed(seed & 0xFFFFFFFF)
    random.seed(seed)


class ToInput:
    """Bytes N x S x S x 3 to normalised floats N x 3 x S x S on the device; floats pass through.

    The same operations on each value as torchvision's ToTensor and Normalize, so equal to the bit,
    but for a whole batch and after a transfer of a quarter of the size.
    """

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
    ) -> None:
        self.format = torch.channels_last if channels_last else torch.contiguous_format
        self.mean = torch.tensor(mean, device=device).view(1, 3, 1, 1)
        self.std = torch.tensor(std, device=device).view(1, 3, 1, 1)
        self.dtype = dtype

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        if images.dtype == torch.uint8:
            images = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=self.format)
            images = images.div_(255).sub_(self.mean).div_(self.std)
        return images.to(self.dtype, memory_format=self.format)
