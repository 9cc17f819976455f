"""Colour jitter and grey of a whole batch: torchvision's and open_clip's, with the same bytes.

One picture at a time pays for Python: some seven hundred calls a picture, whatever its size. Here
Pillow converts many pictures as one tall one, and what has a factor of its own for each picture
is computed as Pillow 13 does (ImageEnhance.py; Blend.c). A batch is N x S x S x 3 bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from ablate.training.data.augment import Seeds, seed_globals
from ablate.training.data.decode import Bytes

if TYPE_CHECKING:
    from torchvision.transforms import ColorJitter

Factors = npt.NDArray[np.float32]

_BLOCK = 1 << 16
"""Pixels that are worked on together, so that what lies between stays in a processor's cache."""


class Drawn(NamedTuple):
    """What is done to each of N images."""

    jittered: npt.NDArray[np.bool_]
    order: npt.NDArray[np.int64]
    """N x 4: which of brightness, contrast, saturation and hue comes first, second, ..."""
    factors: Factors
    """N x 4, in the order of the names."""
    grey: npt.NDArray[np.bool_]

    def of(self, rows: npt.NDArray[np.int64]) -> Drawn:
        """What is done to some of them."""
        return Drawn(self.jittered[rows], self.order[rows], self.factors[rows], self.grey[rows])


class SeededColours:
    """torchvision's ColorJitter for a share of the images, then grey for a share of them.

    Each image draws from the global generators seeded by its own seed, in the order of the peers'
    objects: so it becomes what these would make of it. `chance` draws for the two shares:
    ``random.random`` as open_clip's objects, torch's generator as torchvision's.
    """

    def __init__(
        self, jitter: ColorJitter, *, share: float, grey_share: float, chance: Callable[[], float]
    ) -> None:
        ranges = (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
        self.active = [given is not None for given in ranges]
        self.low, self.high = np.array([given or (0, 0) for given in ranges], np.float32).T
        self.share = share
        self.grey_share = grey_share
        self.chance = chance

    def draw(self, seeds: Seeds) -> Drawn:
        """What is done to the images with these seeds."""
        count = len(seeds)
        jittered, grey = np.zeros(count, np.bool_), np.zeros(count, np.bool_)
        order, shares = np.zeros((count, 4), np.int64), np.zeros((count, 4), np.float32)
        drawn = sum(self.active)
        for row, seed in enumerate(seeds.tolist()):
            seed_globals(seed)
            if self.share and self.chance() < self.share:
                jittered[row] = True
                order[row] = torch.randperm(4).numpy()
                shares[row, self.active] = torch.empty(drawn).uniform_().numpy()
            grey[row] = self.grey_share and self.chance() < self.grey_share
        # As torch's uniform_ does it: a product of doubles, of which the sum becomes a float.
        factors = shares.astype(np.float64) * (self.high - self.low) + self.low
        return Drawn(jittered, order, factors.astype(np.float32), grey)

    def __call__(self, images: Bytes, seeds: Seeds) -> None:
        """Change the images in place."""
        drawn = self.draw(seeds)
        size = max(1, _BLOCK // (images.shape[1] * images.shape[2]))
        changed = np.flatnonzero(drawn.jittered | drawn.grey)
        for rows in (changed[start : start + size] for start in range(0, len(changed), size)):
            images[rows] = self._coloured(images[rows], drawn.of(rows))

    def _coloured(self, images: Bytes, drawn: Drawn) -> Bytes:
        for rows, kind in self._in_turn(drawn):
            images[rows] = ADJUST[kind](images[rows], drawn.factors[rows, kind])
        images[drawn.grey] = make_grey(images[drawn.grey])
        return images

    def _in_turn(self, drawn: Drawn) -> Iterator[tuple[npt.NDArray[np.int64], int]]:
        """Which images have which adjustment next."""
        for turn in range(4):
            for kind in range(4):
                rows = np.flatnonzero(drawn.jittered & (drawn.order[:, turn] == kind))
                if self.active[kind] and len(rows):
                    yield rows, kind


def make_grey(images: Bytes) -> Bytes:
    """Each pixel's brightness in all three colours."""
    return _apart(_tall(images).convert("L").convert("RGB"), images)


def change_brightness(images: Bytes, factors: Factors) -> Bytes:
    """Towards black, or away from it."""
    return _looked_up(images, np.zeros((len(images), 1), np.float32), factors)


def change_contrast(images: Bytes, factors: Factors) -> Bytes:
    """Towards an image's mean grey, or away from it."""
    mean = make_grey(images)[..., 0].mean(axis=(1, 2), dtype=np.float64)
    return _looked_up(images, np.floor(mean + 0.5).astype(np.float32)[:, None], factors)


def change_saturation(images: Bytes, factors: Factors) -> Bytes:
    """Towards each pixel's grey, or away from it."""
    grey = make_grey(images).astype(np.float32)
    return _blend(grey, images, factors[:, None, None, None])


def turn_hue(images: Bytes, factors: Factors) -> Bytes:
    """Around the circle of hues by so many turns, through Pillow's HSV of 8 bits each."""
    turned = _apart(_tall(images).convert("HSV"), images).copy()
    steps = (factors.astype(np.float64) * 255).astype(np.int32).astype(np.uint8)
    turned[..., 0] += steps[:, None, None]  # over its end the hue begins again
    return _apart(_tall(turned, "HSV").convert("RGB"), images)


ADJUST = (change_brightness, change_contrast, change_saturation, turn_hue)
"""In torchvision's order of the names."""


def _tall(images: Bytes, mode: str = "RGB") -> Image.Image:
    """All the images as one, each below the one before."""
    count, height, width, _ = images.shape
    return Image.frombytes(mode, (width, count * height), images.tobytes())


def _apart(tall: Image.Image, images: Bytes) -> Bytes:
    return np.asarray(tall).reshape(images.shape)


def _looked_up(images: Bytes, base: Factors, factors: Factors) -> Bytes:
    """A blend with one value an image: a table of 256 for each."""
    tables = _blend(base, np.arange(256, dtype=np.uint8)[None], factors[:, None])
    rows = [
        image.tobytes().translate(table.tobytes())
        for image, table in zip(images, tables, strict=True)
    ]
    return np.frombuffer(b"".join(rows), np.uint8).reshape(images.shape)


def _blend(base: Factors, values: Bytes, factors: Factors) -> Bytes:
    """ImagingBlend: in floats, what follows the point left out, and cut where it leaves a byte."""
    mixed = values - base
    mixed *= factors
    mixed += base
    return np.clip(mixed, 0, 255, out=mixed).astype(np.uint8)
