"""Models of images alone: how evaluations read their features, and how they are looked at."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ablate.training.data.image_source import open_labelled
from ablate.training.evaluations.features import IMAGES_PER_BATCH, Encode, Encoder
from ablate.training.evaluations.images import EvalImages, central_crop
from ablate.training.inspection.specimen import Specimen


def make_encoder(
    encode: Encode,
    *,
    autocast: Callable[[], AbstractContextManager[Any]],
    to_input: Callable[[torch.Tensor], torch.Tensor],
    device: torch.device,
) -> Encoder:
    """An encoder of images that reads no text."""

    def no_text(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        raise AssertionError("this model reads no text")

    return Encoder(
        encode_image=encode,
        encode_text=no_text,
        autocast=autocast,
        to_input=to_input,
        device=device,
    )


def open_eval_images(path: str, *, size: int, cache_gib: float) -> EvalImages:
    """Labelled images of a folder of class folders or of shards, cropped as usual.

    Raises:
        DataError: there are none.
    """
    return EvalImages(
        open_labelled(path), transform=central_crop(size), size=(size, size), cache_gib=cache_gib
    )


def make_features(
    images: EvalImages | None, encoder: Encoder
) -> Callable[[torch.nn.Module, npt.NDArray[np.int64]], torch.Tensor]:
    """What a model makes of chosen images: (model, rows) -> N x feature dim, on the host."""

    def features(net: torch.nn.Module, rows: npt.NDArray[np.int64]) -> torch.Tensor:
        assert images is not None
        with torch.inference_mode(), encoder.autocast():
            parts = [
                encoder.images(net, pixels).float().cpu()
                for pixels in images.chosen(rows, IMAGES_PER_BATCH)
            ]
        return torch.cat(parts).clone()

    return features


def make_specimen(model: torch.nn.Module, images: EvalImages | None, encoder: Encoder) -> Specimen:
    """`model`, put into eval mode, with the images to look at it with."""
    return Specimen(
        model=model.eval(),
        frozen=tuple(name for name, p in model.named_parameters() if not p.requires_grad),
        labels=images.labels if images is not None else np.zeros(0, np.int64),
        class_names=images.source.folders if images is not None else (),
        features=make_features(images, encoder),
    )
