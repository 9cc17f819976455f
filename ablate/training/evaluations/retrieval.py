"""Retrieval of captions by images, and of images by captions."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from ablate.training.data.pairs import Tokenizer
from ablate.training.evaluations import scores
from ablate.training.evaluations.features import (
    Encoder,
    image_features,
    share_batches,
    text_features,
    tokenise_once,
)
from ablate.training.evaluations.images import EvalImages
from ablate.training.ranks import Gang, sum_over_ranks


class Retrieval:
    """Image-to-text and text-to-image recall at 1, 5 and 10 on pairs (:func:`scores.recalls`)."""

    def __init__(
        self,
        images: EvalImages,
        *,
        tokenizer: Tokenizer,
        encoder: Encoder,
        due: Callable[[int], bool],
        label: str = "",
    ) -> None:
        self.name = f"retrieval{label}"
        self._images = images
        self._encoder = encoder
        self.due = due
        self._label = label
        captions = [[text] for text in images.source.texts]
        self._tokens = tokenise_once(captions, tokenizer)

    def run(self, model: torch.nn.Module, gang: Gang) -> dict[str, float]:
        """The six recalls and the seconds; each rank ranks its share of the pairs."""
        began = time.perf_counter()
        images = image_features(model, self._images, self._encoder, gang)
        same = self._images.source.first_equal
        if same is not None:
            images = images[torch.from_numpy(same).to(images.device)]
        texts = text_features(model, self._tokens, self._encoder, gang)
        rows = slice(*share_batches(len(images), scores.ROWS, gang))
        measured = {}
        for way, queries, targets in (("i2t", images, texts), ("t2i", texts, images)):
            found = scores.recalls(queries, targets, rows=rows).sum(dim=0).cpu()
            for k, right in zip(scores.RECALLS, sum_over_ranks(found, gang), strict=True):
                measured[f"retrieval_{way}_r{k}{self._label}"] = float(right) / len(images)
        measured[f"eval_time_s/{self.name}"] = time.perf_counter() - began
        return measured
