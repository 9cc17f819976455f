"""The clips of a configuration, and how many steps they make."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from ablate.errors import DataError
from ablate.trial.recipe import absolute

if TYPE_CHECKING:
    from ablate.training.data.clips import ClipSource
from ablate.recipes.timesformer.config import Config


def open_train(config: Config, *, root: Path | None = None) -> ClipSource:
    """The training clips.

    Raises:
        DataError: they are not there, or have captions instead of classes.
    """
    placed = config if root is None else absolute(config, root=root)
    assert placed.train_data is not None, "check() refuses a configuration without train_data"
    return _with_labels(placed.train_data)


def open_val(config: Config, train: ClipSource) -> ClipSource | None:
    """The clips to judge by, their classes numbered as those of `train`; None where none are asked.

    Raises:
        DataError: a class is none of the training's.
    """
    if config.val_data is None:
        return None
    import dataclasses

    import numpy as np

    found = _with_labels(config.val_data)
    places = {name: number for number, name in enumerate(train.classes)}
    unknown = [name for name in found.classes if name not in places]
    if unknown:
        raise DataError(
            f"{config.val_data} has the class {unknown[0]!r}"
            + (f" and {len(unknown) - 1} more" if unknown[1:] else "")
            + f", which {config.train_data} lacks; give both the same classes"
        )
    numbers = np.array([places[name] for name in found.classes], np.int64)
    return dataclasses.replace(found, labels=numbers[found.labels], classes=train.classes)


def _with_labels(place: str) -> ClipSource:
    from ablate.training.data.clips import find_clips

    found = find_clips(place)
    if not len(found.labels):
        raise DataError(
            f"{place} has captions, and classes are needed: give a folder of class folders or a "
            ".csv of 'path label' lines"
        )
    return found


def batch_of_rank(config: Config, *, workers: int) -> int:
    """Clips of one micro-batch of a rank.

    Raises:
        ValueError: batch_size cannot be shared evenly.
    """
    parts = workers * config.accum_freq
    if config.batch_size % parts:
        raise ValueError(
            f"batch_size {config.batch_size} is of all workers together (upstream's "
            f"TRAIN.BATCH_SIZE), and cannot be shared by {workers} workers in "
            f"{config.accum_freq} parts each; give a multiple of {parts}"
        )
    return config.batch_size // parts


def steps_per_epoch(config: Config, num_clips: int) -> int:
    """Steps of one epoch; the last is filled from its beginning, where upstream drops it."""
    return math.ceil((config.epoch_clips or num_clips) / config.batch_size)
