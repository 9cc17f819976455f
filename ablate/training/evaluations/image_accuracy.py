"""Accuracy of a classifier of images, by its own head."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from ablate.training.evaluations.features import IMAGES_PER_BATCH, share_batches
from ablate.training.evaluations.images import EvalImages
from ablate.training.ranks import Gang, gather_rows
from ablate.trial.pulse import part_ended

Classify = Callable[[torch.nn.Module, torch.Tensor], torch.Tensor]
"""(model, images N x S x S x 3 bytes) -> logits (N, classes)."""


class ImageAccuracy:
    """``image_top1`` and ``image_top5``; `labels` are the images' classes in the head's numbers."""

    def __init__(
        self,
        images: EvalImages,
        *,
        labels: npt.NDArray[np.int64],
        classify: Classify,
        due: Callable[[int], bool],
        label: str = "",
    ) -> None:
        self.name = f"accuracy{label}"
        self.due = due
        self.labels = labels
        self.right: dict[str, npt.NDArray[np.bool_]] = {}
        """Which images had their class first when it last ran; equal on all ranks."""
        self._images = images
        self._classify = classify
        self._label = label

    def run(self, model: torch.nn.Module, gang: Gang) -> dict[str, float]:
        """The two accuracies and the seconds; each rank judges its share of the images."""
        began = time.perf_counter()
        first, last = share_batches(len(self._images), IMAGES_PER_BATCH, gang)
        mine = [torch.zeros(0, 2)]
        place = first
        with torch.inference_mode():
            for pixels, _ in self._images.batches(first, last, IMAGES_PER_BATCH):
                logits = self._classify(model, pixels).float().cpu()
                part_ended()
                labels = torch.from_numpy(self.labels[place : place + len(logits)])
                place += len(logits)
                best = logits.topk(min(5, logits.shape[1]), dim=1).indices
                hit = best == labels[:, None]
                mine.append(torch.stack([hit[:, 0], hit.any(dim=1)], dim=1).float())
        found = gather_rows(torch.cat(mine), first, len(self._images), gang)
        self.right = {f"image_top1{self._label}": found[:, 0].numpy() > 0.5}
        top1, top5 = found.double().mean(dim=0).tolist()
        return {
            f"image_top1{self._label}": top1,
            f"image_top5{self._label}": top5,
            f"eval_time_s/{self.name}": time.perf_counter() - began,
        }
