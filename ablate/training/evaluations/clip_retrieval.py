"""Retrieval of clips by captions, and of captions by clips."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from ablate.training.evaluations import scores
from ablate.training.evaluations.clips import EvalClips
from ablate.training.evaluations.features import TEXTS_PER_BATCH, share_batches
from ablate.training.ranks import Gang, gather_rows, sum_over_ranks
from ablate.trial.pulse import part_ended

CLIPS_PER_BATCH = 64
"""Clips that are encoded together, whatever the number of ranks: rounding depends on it."""

Encode = Callable[[torch.nn.Module, torch.Tensor], torch.Tensor]
"""(model, a batch) -> features of norm 1, one row a clip or text."""


class ClipRetrieval:
    """Text-to-video and video-to-text recall at 1, 5 and 10 (:func:`scores.recalls`)."""

    name = "clip_retrieval"

    def __init__(
        self,
        clips: EvalClips,
        *,
        tokens: torch.Tensor,
        encode_clips: Encode,
        encode_texts: Encode,
        due: Callable[[int], bool],
    ) -> None:
        self.due = due
        self._clips = clips
        self._tokens = tokens
        self._encode_clips = encode_clips
        self._encode_texts = encode_texts

    def run(self, model: torch.nn.Module, gang: Gang) -> dict[str, float]:
        """The six recalls and the seconds; each rank encodes and ranks its share."""
        began = time.perf_counter()
        total = len(self._clips)
        with torch.inference_mode():
            first, last = share_batches(total, CLIPS_PER_BATCH, gang)
            # A rank without a part encodes one clip, to know how wide a row is.
            ranges = (first, last) if first < last else (0, 1)
            parts = []
            for views in self._clips.batches(*ranges, CLIPS_PER_BATCH):
                parts.append(self._encode_clips(model, views).float())
                part_ended()
            videos = gather_rows(torch.cat(parts)[: last - first], first, total, gang)
            first, last = share_batches(total, TEXTS_PER_BATCH, gang)
            ranges = (first, last) if first < last else (0, 1)
            parts = [
                self._encode_texts(model, part).float()
                for part in torch.split(self._tokens[slice(*ranges)], TEXTS_PER_BATCH)
            ]
            texts = gather_rows(torch.cat(parts)[: last - first], first, total, gang)
        rows = slice(*share_batches(total, scores.ROWS, gang))
        measured = {}
        for way, queries, targets in (("t2v", texts, videos), ("v2t", videos, texts)):
            found = scores.recalls(queries, targets, rows=rows).sum(dim=0).cpu()
            for k, right in zip(scores.RECALLS, sum_over_ranks(found, gang), strict=True):
                measured[f"{way}_r{k}"] = float(right) / total
        measured[f"eval_time_s/{self.name}"] = time.perf_counter() - began
        return measured
