"""Reconstruction of held-out images under masks that never change: loss, and a picture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from ablate.training.data.augment import sample_seeds, uniforms
from ablate.training.evaluations.features import share_batches
from ablate.training.evaluations.images import EvalImages
from ablate.training.ranks import Gang, sum_over_ranks
from ablate.trial.pulse import part_ended

LARGEST = 1024
"""Images that are looked at; of more, evenly spaced ones."""
BATCH = 128
SHOWN = 8
"""Images in the picture."""
SHOWN_PX = 96
"""Smallest side of an image there."""
_MASKS = 6171
"""Key of the masks, the same for every trial."""


@dataclass(frozen=True, slots=True)
class Reconstructed:
    """What a model makes of a batch of images."""

    loss: torch.Tensor
    """Of each patch, hidden or not; N x patches."""
    nothing: torch.Tensor
    """The same for a prediction of nothing."""
    mask: torch.Tensor
    """Which patches were hidden; N x patches."""
    pictures: tuple[torch.Tensor, ...]
    """The images, what was left of them, what was made of that; each N x S x S x 3 bytes."""


Look = Callable[[torch.nn.Module, torch.Tensor, torch.Tensor], Reconstructed]
"""(model, N x S x S x 3 bytes, N x patches numbers of which the largest hide their patch)."""


class Reconstruction:
    """``recon_loss``: mean over hidden patches; ``recon_loss_worst``: at the place of the picture
    where it is largest; ``recon_gap``: how far ``recon_loss`` is below that of predicting nothing.

    With `pictures`, rank 0 draws the first images into ``reconstruction.png`` of that folder.
    """

    def __init__(
        self,
        images: EvalImages,
        *,
        look: Look,
        patches: int,
        due: Callable[[int], bool],
        label: str = "",
        pictures: Path | None = None,
    ) -> None:
        self._images = images
        self._look = look
        self._patches = patches
        self._label = label
        self._pictures = pictures
        self._rows = np.linspace(0, len(images) - 1, min(LARGEST, len(images))).astype(np.int64)
        self.due = due

    @property
    def name(self) -> str:
        return f"reconstruction{self._label}"

    def run(self, model: torch.nn.Module, gang: Gang) -> dict[str, float]:
        """The measurements above, equal on all ranks."""
        first, last = share_batches(len(self._rows), BATCH, gang)
        sums = torch.zeros(3, self._patches, dtype=torch.float64)
        for begin in range(first, last, BATCH):
            rows = self._rows[begin : min(begin + BATCH, last)]
            seen = self._reconstruct(model, rows)
            hidden = seen.mask.double()
            parts = (seen.loss.double() * hidden, seen.nothing.double() * hidden, hidden)
            sums += torch.stack([part.sum(dim=0).cpu() for part in parts])
        loss, nothing, count = sum_over_ranks(sums, gang)
        if gang.first and self._pictures is not None:
            self._draw(model, self._pictures)
        mean = float(loss.sum() / count.sum())
        return {
            f"recon_loss{self._label}": mean,
            f"recon_gap{self._label}": float(nothing.sum() / count.sum()) - mean,
            f"recon_loss_worst{self._label}": float((loss / count.clamp_min(1)).max()),
        }

    def _reconstruct(self, model: torch.nn.Module, rows: npt.NDArray[np.int64]) -> Reconstructed:
        part_ended()
        pixels = torch.cat(list(self._images.chosen(rows, BATCH)))
        noise = torch.from_numpy(uniforms(sample_seeds(_MASKS, 0, rows), self._patches)).float()
        with torch.inference_mode():
            return self._look(model, pixels, noise)

    def _draw(self, model: torch.nn.Module, folder: Path) -> None:
        """A row each of images, of what is left of them, of what the model makes of that."""
        picked = self._rows[np.linspace(0, len(self._rows) - 1, SHOWN).astype(int)]
        views = self._reconstruct(model, picked).pictures
        sheet = torch.cat([torch.cat(list(view), dim=1) for view in views], dim=0).numpy()
        times = max(1, -(-SHOWN_PX // views[0].shape[1]))
        folder.mkdir(parents=True, exist_ok=True)
        name = f"reconstruction{self._label.replace('/', '-')}.png"
        Image.fromarray(sheet.repeat(times, axis=0).repeat(times, axis=1)).save(folder / name)
