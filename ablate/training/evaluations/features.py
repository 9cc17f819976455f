"""Features of images and texts, computed by all ranks together."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ablate.training.data import cache
from ablate.training.data.image_source import first_equal
from ablate.training.data.pairs import Tokenizer, key_of_tokens
from ablate.training.evaluations.images import EvalImages
from ablate.training.ranks import Gang, gather_rows
from ablate.trial.pulse import part_ended

Encode = Callable[[torch.nn.Module, torch.Tensor], torch.Tensor]

IMAGES_PER_BATCH = 128
TEXTS_PER_BATCH = 512
"""Rows that are encoded together, whatever the number of ranks and the batch of training.

Rounding depends on the shape of a batch. Ranks share whole batches, so any number of them computes
the same features to the bit.
"""

Labelled = tuple[torch.Tensor, torch.Tensor]
"""Features of images and the numbers of their classes, on every rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoder:
    """How images and texts become features of norm 1, on this rank's device."""

    encode_image: Encode
    encode_text: Encode
    autocast: Callable[[], AbstractContextManager[Any]]
    to_input: Callable[[torch.Tensor], torch.Tensor]
    device: torch.device

    def images(self, model: torch.nn.Module, pixels: torch.Tensor) -> torch.Tensor:
        """Features of a batch of 8-bit images; call within `autocast`."""
        part_ended()
        return self.encode_image(model, self.to_input(pixels.to(self.device)))

    def texts(self, model: torch.nn.Module, tokens: npt.NDArray[np.int32]) -> torch.Tensor:
        """Features of a batch of token numbers; call within `autocast`."""
        part_ended()
        return self.encode_text(model, torch.from_numpy(tokens.astype(np.int64)).to(self.device))


def share(total: int, gang: Gang) -> tuple[int, int]:
    """First and last (exclusive) of this rank's part of `total` things."""
    return total * gang.rank // gang.world_size, total * (gang.rank + 1) // gang.world_size


def share_batches(total: int, size: int, gang: Gang) -> tuple[int, int]:
    """First and last (exclusive) of this rank's part of `total` rows: whole batches of `size`."""
    first, last = share(math.ceil(total / size), gang)
    return min(first * size, total), min(last * size, total)


def image_features(
    model: torch.nn.Module, images: EvalImages, encoder: Encoder, gang: Gang
) -> torch.Tensor:
    """Features of all images on every rank, each of which computes its part; float32."""
    first, last = share_batches(len(images), IMAGES_PER_BATCH, gang)
    # A rank without a part encodes one image, to know how wide a row is.
    ranges = (first, last) if first < last else (0, 1)
    with torch.inference_mode(), encoder.autocast():
        mine = torch.cat(
            [
                encoder.images(model, pixels).float()
                for pixels, _ in images.batches(*ranges, IMAGES_PER_BATCH)
            ]
        )
    return gather_rows(mine[: last - first], first, len(images), gang)


def text_features(
    model: torch.nn.Module, tokens: npt.NDArray[np.int32], encoder: Encoder, gang: Gang
) -> torch.Tensor:
    """Features of all texts on every rank, each of which computes its part; float32.

    Equal texts have equal features, to the bit.
    """
    first, last = share_batches(len(tokens), TEXTS_PER_BATCH, gang)
    ranges = range(first, last, TEXTS_PER_BATCH) if first < last else range(1)
    with torch.inference_mode(), encoder.autocast():
        mine = torch.cat(
            [
                encoder.texts(model, tokens[begin : min(begin + TEXTS_PER_BATCH, len(tokens))])
                for begin in ranges
            ]
        ).float()
    whole = gather_rows(mine[: last - first], first, len(tokens), gang)
    return whole[torch.from_numpy(first_equal(tokens)).to(whole.device)]


def tokenise_once(prompts: Sequence[Sequence[str]], tokenizer: Tokenizer) -> npt.NDArray[np.int32]:
    """Token numbers of all prompts, one row each, mapped from the cache."""
    texts = [text for of_class in prompts for text in of_class]

    def build(folder: Path) -> None:
        np.save(folder / "tokens.npy", tokenizer(texts).numpy().astype(np.int32))

    name = cache.key("prompts-2", key_of_tokens(tokenizer, texts), *texts)
    folder = cache.build_once("prompts", name, build)
    tokens: npt.NDArray[np.int32] = np.load(folder / "tokens.npy", mmap_mode="r")
    return tokens
