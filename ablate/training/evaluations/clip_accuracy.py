"""Accuracy of a classifier of clips, over the mean of each clip's views."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from ablate.training.evaluations.clips import EvalClips
from ablate.training.evaluations.features import share_batches
from ablate.training.ranks import Gang, sum_over_ranks
from ablate.trial.pulse import part_ended

CLIPS_PER_BATCH = 32
"""Clips that are judged together, whatever the number of ranks: rounding depends on it."""

Classify = Callable[[torch.nn.Module, torch.Tensor], torch.Tensor]
"""(model, clips N x T x 3 x S x S bytes) -> logits (N, classes)."""


class ClipAccuracy:
    """``clip_top1`` and ``clip_top5``: the mean probability over a clip's views decides."""

    def __init__(
        self,
        clips: EvalClips,
        *,
        classify: Classify,
        device: torch.device,
        due: Callable[[int], bool],
        label: str = "",
    ) -> None:
        self.name = f"clip{label}"
        self.due = due
        self._clips = clips
        self._classify = classify
        self._device = device
        self._label = label

    def run(self, model: torch.nn.Module, gang: Gang) -> dict[str, float]:
        """The two accuracies and the seconds; each rank judges its share of the clips."""
        began = time.perf_counter()
        first, last = share_batches(len(self._clips), CLIPS_PER_BATCH, gang)
        right = torch.zeros(2, dtype=torch.float64)
        with torch.inference_mode():
            place = first
            for views in self._clips.batches(first, last, CLIPS_PER_BATCH):
                logits = self._classify(model, views.to(self._device)).float().cpu()
                part_ended()
                views_of_each = (-1, self._clips.views, logits.shape[1])
                chances = logits.softmax(dim=1).reshape(views_of_each).mean(dim=1)
                labels = self._clips.labels[place : place + len(chances)]
                place += len(chances)
                best = chances.topk(min(5, chances.shape[1]), dim=1).indices
                hit = best == labels[:, None]
                right += torch.stack([hit[:, 0].sum(), hit.any(dim=1).sum()]).double()
        found = sum_over_ranks(right, gang) / len(self._clips)
        return {
            f"clip_top1{self._label}": float(found[0]),
            f"clip_top5{self._label}": float(found[1]),
            f"eval_time_s/{self.name}": time.perf_counter() - began,
        }
