"""Clips that evaluations look at: fixed views of each, the same for every model."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from ablate.errors import DataError
from ablate.training.data.clip_samples import ClipReader
from ablate.training.data.clips import ClipSource
from ablate.training.data.frames import Choice, ViewCut


class EvalClips:
    """Each clip in `views` moments times `cut.crops` places: bytes V x T x 3 x S x S."""

    def __init__(
        self,
        source: ClipSource,
        *,
        choice: Choice,
        cut: ViewCut,
        views: int = 1,
        cache_gib: float = 0.0,
    ) -> None:
        self.source = source
        self.views = views * cut.crops
        """Views of one clip."""
        self._reader = ClipReader(source, cache_gib=cache_gib)
        self._choice = choice
        self._cut = cut
        self._moments = views

    def __len__(self) -> int:
        return len(self.source)

    def views_of(self, clip: int) -> torch.Tensor:
        """All views of a clip.

        Raises:
            DataError: it cannot be read; an evaluation leaves nothing out.
        """
        try:
            length = self._reader.length(clip)
            moments = [self._choice.view(length, n, self._moments) for n in range(self._moments)]
            frames = [self._reader.frames(clip, wanted) for wanted in moments]
        except (DataError, OSError) as error:
            raise DataError(f"{self.source.paths[clip]}: {error}") from error
        return torch.stack(
            [self._cut(cut, place) for cut in frames for place in range(self._cut.crops)]
        )

    def batches(self, start: int, stop: int, clips: int) -> Iterator[torch.Tensor]:
        """Views of clips `start` to `stop`, of so many `clips` at a time, clip after clip."""
        for first in range(start, stop, clips):
            chosen = range(first, min(first + clips, stop))
            yield torch.cat([self.views_of(clip) for clip in chosen])

    @property
    def labels(self) -> torch.Tensor:
        return torch.from_numpy(np.asarray(self.source.labels))
