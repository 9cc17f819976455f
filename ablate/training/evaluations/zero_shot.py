"""Zero-shot classification by the texts of class names.

It follows open_clip_train.zero_shot and open_clip.build_zero_shot_classifier step by step; what
differs is the work saved: classes and images are shared out over the ranks (the peer evaluates on
rank 0 while the others wait), prompts are tokenised once, and images are decoded and resized once
for a machine.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from ablate.training.data.pairs import Tokenizer
from ablate.training.evaluations.features import (
    IMAGES_PER_BATCH,
    TEXTS_PER_BATCH,
    Encoder,
    share_batches,
    tokenise_once,
)
from ablate.training.evaluations.images import EvalImages
from ablate.training.ranks import Gang, gather_rows, sum_over_ranks

PROMPTS_PER_SHARE = 4096
"""Prompts of whole classes that a rank takes at a time, whatever the number of ranks: features
depend on the shape of a batch in their last bits."""


class ZeroShot:
    """Zero-shot top-1 and top-5 accuracy on labelled images.

    `prompts` holds the same number of texts for each class, in the order of the class numbers.
    `measures` are the names of both accuracies, `counts` that of the number of images (None: it
    is not told) and `clock` that of the wall time.
    """

    def __init__(
        self,
        images: EvalImages,
        prompts: Sequence[Sequence[str]],
        *,
        tokenizer: Tokenizer,
        encoder: Encoder,
        due: Callable[[int], bool],
        name: str = "zero_shot",
        measures: Sequence[str] = ("imagenet_top1", "imagenet_top5"),
        counts: str | None = "eval_images",
        clock: str = "eval_time_s",
    ) -> None:
        self.name = name
        self._images = images
        self._prompts = prompts
        self._encoder = encoder
        self.due = due
        self._measures = measures
        self._counts = counts
        self._clock = clock
        self.tokens = tokenise_once(prompts, tokenizer)
        self.right: dict[str, npt.NDArray[np.bool_]] = {}
        """Which images had their class first when it last ran; equal on all ranks."""

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """Class of each image."""
        return self._images.labels

    def run(self, model: torch.nn.Module, gang: Gang) -> dict[str, float]:
        """Both accuracies, number of images, seconds; equal on all ranks."""
        began = time.perf_counter()
        with torch.inference_mode():
            classifier = self.classifier(model, gang)
            counts = torch.zeros(3, dtype=torch.float64)
            first, last = share_batches(len(self._images), IMAGES_PER_BATCH, gang)
            mine = [torch.zeros(0)]
            for images, labels in self._images.batches(first, last, IMAGES_PER_BATCH):
                correct = self._correct(model, classifier, images, labels)
                found = float(correct[:, 0].sum()), float(correct.sum())
                counts += torch.tensor([*found, len(labels)], dtype=torch.float64)
                mine.append(correct[:, 0].float().cpu())
            sum_over_ranks(counts, gang)
            right = gather_rows(torch.cat(mine), first, len(self._images), gang)
        self.right = {self._measures[0]: right.numpy() > 0.5}
        top1, top5, total = counts.tolist()
        measured = dict(zip(self._measures, (top1 / total, top5 / total), strict=True))
        if self._counts is not None:
            measured[self._counts] = total
        return {**measured, self._clock: time.perf_counter() - began}

    def classifier(self, model: torch.nn.Module, gang: Gang) -> torch.Tensor:
        """Class embeddings, features x classes; each rank makes its share of them."""
        num_classes, num_prompts = len(self._prompts), len(self._prompts[0])
        size = max(1, PROMPTS_PER_SHARE // num_prompts)
        shared = 1 < gang.world_size <= math.ceil(num_classes / size)
        first, last = share_batches(num_classes, size, gang) if shared else (0, num_classes)
        mine = torch.cat(
            [
                self._embed(model, begin, min(begin + size, last))
                for begin in range(first, last, size)
            ]
        )
        if not shared:
            return mine.T
        # Exact: 16-bit floats are 32-bit floats.
        return gather_rows(mine.float(), first, num_classes, gang).to(mine.dtype).T

    def _embed(self, model: torch.nn.Module, first: int, last: int) -> torch.Tensor:
        """Embeddings of classes `first` to `last`, classes x features."""
        num_prompts = len(self._prompts[0])
        tokens = self.tokens[first * num_prompts : last * num_prompts]
        # Texts of like length go together: an encoder may leave out the padding behind the longest.
        order = np.argsort((tokens != 0).sum(axis=1), kind="stable")
        with self._encoder.autocast():
            parts = [
                self._encoder.texts(model, tokens[order[begin : begin + TEXTS_PER_BATCH]])
                for begin in range(0, len(order), TEXTS_PER_BATCH)
            ]
            features = torch.cat(parts)[torch.from_numpy(np.argsort(order)).to(parts[0].device)]
            embeddings = features.reshape(last - first, num_prompts, -1).mean(dim=1)
            embedded: torch.Tensor = embeddings / embeddings.norm(dim=1, keepdim=True)
        return embedded

    def _correct(
        self,
        model: torch.nn.Module,
        classifier: torch.Tensor,
        images: torch.Tensor,
        labels: torch.Tensor,
    ) -> torch.Tensor:
        """images x 5: whether the class of each is at that place."""
        with self._encoder.autocast():
            logits = 100.0 * self._encoder.images(model, images) @ classifier
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices
        return best == labels.to(best.device)[:, None]
