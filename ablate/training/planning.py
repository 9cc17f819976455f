"""What recipes of images ask before a run: samples, bytes on the disk.

Imports no torch until a model is sketched.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ablate.training.data.picture_files import open_pictures

if TYPE_CHECKING:
    import torch

    from ablate.training.task import Keep


def count_samples(path: str, *, given: int | None, root: Path) -> int:
    """Samples of one epoch: as given, else counted in the images at `path` under `root`.

    Raises:
        DataError: they are not there.
    """
    return given if given is not None else len(open_pictures(str(root / path)))


def sketch(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, keep: Keep, *, epochs: int
) -> tuple[int, Mapping[str, Any]]:
    """Bytes that a trial's checkpoints take at most, and its parameter groups; of a model on the
    device ``meta``.

    Raises:
        ValueError: a trainable parameter is in no group, or in two.
    """
    from ablate.training.optim import describe, read_groups, refuse_uneven, state_bytes

    groups = read_groups(model, optimizer)
    refuse_uneven(model, groups)
    return keep.at_once(epochs) * state_bytes(model, optimizer), describe(groups)
