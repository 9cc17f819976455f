"""Which frames of a clip, and which part of each, a model sees.

In training both are drawn from the sample's own seed; an evaluation looks at fixed views: `views`
moments times `crops` places. All frames of a view are cut alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch

from ablate.training.data.augment import Seeds, mix, uniforms
from ablate.training.data.clips import Frames

FrameOrder = Literal["kept", "shuffled", "first_only"]
Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class FrameChoice:
    """`num_frames` frames, `sampling_rate` apart; of a shorter clip spread over the whole of it.

    `order` is a control of what time tells: ``shuffled`` frames have the same pictures without
    their order, ``first_only`` is the first picture over and over.
    """

    num_frames: int
    sampling_rate: int
    order: FrameOrder = "kept"

    def drawn(self, length: int, seed: np.uint64) -> Numbers:
        """From a random moment of a clip of `length` frames."""
        moment, *rest = uniforms(np.array([seed], np.uint64), 1 + self.num_frames)[0].tolist()
        return self._frames(length, moment, np.argsort(rest, kind="stable"))

    def view(self, length: int, view: int, views: int) -> Numbers:
        """Of one of `views` moments that share a clip evenly; shuffled, the same way for all."""
        key = mix(np.arange(1, 1 + self.num_frames, dtype=np.uint64))
        return self._frames(length, (view + 0.5) / views, np.argsort(key, kind="stable"))

    def _frames(self, length: int, moment: float, shuffled: Numbers) -> Numbers:
        span = min(self.num_frames * self.sampling_rate, length)
        start = int(moment * (length - span + 1))
        numbers = start + (np.arange(self.num_frames) * span) // self.num_frames
        if self.order == "first_only":
            numbers = np.full_like(numbers, numbers[0])
        return numbers[shuffled] if self.order == "shuffled" else numbers


@dataclass(frozen=True, slots=True)
class PartChoice:
    """One frame of each of `num_frames` equal parts of a clip: its middle one, or in training a
    `random` one."""

    num_frames: int
    random: bool

    def drawn(self, length: int, seed: np.uint64) -> Numbers:
        """Of a clip of `length` frames."""
        if not self.random:
            return self.view(length, 0, 1)
        return self._frames(length, uniforms(np.array([seed], np.uint64), self.num_frames)[0])

    def view(self, length: int, view: int, views: int) -> Numbers:
        """The same within each part, of one of `views` places that share it evenly."""
        return self._frames(length, np.full(self.num_frames, (view + 0.5) / views))

    def _frames(self, length: int, places: npt.NDArray[np.float64]) -> Numbers:
        numbers = (np.arange(self.num_frames) + places) * length / self.num_frames
        return np.minimum(numbers.astype(np.int64), length - 1)


class Choice(Protocol):
    """Which frames of a clip are seen."""

    @property
    def num_frames(self) -> int: ...

    def drawn(self, length: int, seed: np.uint64, /) -> Numbers: ...

    def view(self, length: int, view: int, views: int, /) -> Numbers: ...


@dataclass(frozen=True, slots=True)
class TrainCut:
    """The short side scaled to a random length between `scales`, a random square of `size`, and
    with `flip` the mirror image of half of the clips."""

    size: int
    scales: tuple[int, int]
    flip: bool

    def __call__(self, frames: Frames, seed: np.uint64) -> torch.Tensor:
        """T x 3 x size x size bytes."""
        # Other draws than those of the moment, which begin at the seed itself.
        other = mix(np.array([seed], np.uint64))
        length, top, left, side = uniforms(other, 4)[0].tolist()
        low, high = self.scales
        scaled = _scale(frames, low + int(length * (high - low + 1)))
        height, width = scaled.shape[-2:]
        y, x = int(top * (height - self.size + 1)), int(left * (width - self.size + 1))
        cut = scaled[..., y : y + self.size, x : x + self.size]
        return cut.flip(-1) if self.flip and side < 0.5 else cut


@dataclass(frozen=True, slots=True)
class ViewCut:
    """The short side scaled to `size`, and one of `crops` squares along the long side; the middle
    one where there is one."""

    size: int
    crops: int

    def __call__(self, frames: Frames, crop: int) -> torch.Tensor:
        """T x 3 x size x size bytes."""
        scaled = _scale(frames, self.size)
        height, width = scaled.shape[-2:]
        place = crop / (self.crops - 1) if self.crops > 1 else 0.5
        y, x = round(place * (height - self.size)), round(place * (width - self.size))
        return scaled[..., y : y + self.size, x : x + self.size]


def _scale(frames: Frames, side: int) -> torch.Tensor:
    """Frames with a short side of `side` pixels, as T x 3 x H x W bytes."""
    pixels = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2)
    height, width = pixels.shape[-2:]
    short = min(height, width)
    if short == side:
        return pixels
    size = (max(side, round(height * side / short)), max(side, round(width * side / short)))
    return torch.nn.functional.interpolate(
        pixels, size=size, mode="bilinear", antialias=True, align_corners=False
    )


class ClipInput:
    """Bytes N x T x 3 x S x S to normalised floats on the device."""

    def __init__(
        self,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        *,
        device: torch.device,
    ) -> None:
        self._mean = torch.tensor(mean, device=device).view(3, 1, 1)
        self._std = torch.tensor(std, device=device).view(3, 1, 1)

    def __call__(self, clips: torch.Tensor) -> torch.Tensor:
        return clips.to(torch.float32).div_(255).sub_(self._mean).div_(self._std)


def seeds_of(ids: npt.NDArray[np.int64]) -> Seeds:
    """Seeds that depend on the samples alone."""
    return mix(ids.astype(np.uint64))
