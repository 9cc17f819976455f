"""Training samples: the shards' index, how many steps they make, and how they are read."""

from __future__ import annotations

import math
import random
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ablate.errors import DataError
from ablate.training.counts import steps_per_epoch
from ablate.training.data.shard_names import expand_shards
from ablate.trial.recipe import absolute

if TYPE_CHECKING:
    from ablate.training.data.colours import SeededColours
    from ablate.training.data.shards import ShardIndex
from ablate.recipes.openclip.config import Augmentation, Config


def num_samples(config: Config, *, root: Path) -> int:
    """Samples of one epoch: as given, else counted in the shards under `root`."""
    if config.train_num_samples is not None:
        return config.train_num_samples
    return open_train_index(absolute(config, root=root)).num_samples


def num_steps(config: Config, *, workers: int, num_samples: int) -> int:
    """Optimizer steps of the run."""
    per_epoch = steps_per_epoch(
        num_samples,
        batch_size=config.batch_size,
        accum_freq=config.accum_freq,
        world_size=workers,
    )
    return per_epoch * config.epochs


def open_index(pattern: str) -> ShardIndex:
    """The index of these shards, made once for a machine, and opened once for a process.

    Raises:
        DataError: shards are missing.
    """
    from ablate.training.data.cache import facts_of

    paths = [Path(path) for path in expand_shards(pattern)]
    return _open_index(pattern, tuple(facts_of(path) if path.exists() else () for path in paths))


@lru_cache(maxsize=4)  # the cells of a study mostly train on one set
def _open_index(pattern: str, facts: tuple[object, ...]) -> ShardIndex:
    from ablate.training.data.cache import cache_folder
    from ablate.training.data.shards import index_shards

    index = index_shards(pattern, cache=cache_folder() / "shards")
    missing = [str(fault) for fault in index.faults if fault.kind == "missing_shard"]
    if missing:
        raise DataError(
            f"{len(missing)} shards of {pattern} are missing, the first: "
            f"{missing[0]}. Fetch them, or leave them out of the pattern"
        )
    return index


def open_train_index(config: Config) -> ShardIndex:
    """The index of train_data.

    Raises:
        DataError: shards are missing, or more samples are lost than max_fault_share allows.
    """
    from ablate.training.data.shard_scan import FAULTS, LOST_SAMPLES

    assert config.train_data is not None
    index = open_index(config.train_data)
    lost = lost_samples(index)
    if lost > config.max_fault_share * (lost + index.num_samples):
        shown = "; ".join(str(fault) for fault in index.faults[:3])
        kinds = [fault.kind for fault in index.faults if fault.kind in LOST_SAMPLES]
        mend = FAULTS[kinds[0]] if kinds else "fetch these shards again"
        raise DataError(
            f"about {lost} of {lost + index.num_samples} samples of train_data "
            f"{config.train_data} are lost, more than the share of {config.max_fault_share:g} "
            f"that max_fault_share allows: {shown}; {mend}"
        )
    return index


def lost_samples(index: ShardIndex) -> int:
    """Samples that the shards should hold and the index lacks: a truncated shard would else only
    make an epoch shorter.

    Incomplete samples are counted; what a shard lost that is not read to its end is taken to be
    what it lacks of the median of the whole shards.
    """
    import numpy as np

    from ablate.training.data.shard_scan import LOST_SAMPLES, SEEN_SAMPLES

    lost, broken = 0, set()
    for fault in index.faults:
        if fault.kind in LOST_SAMPLES:
            lost += fault.count
        elif fault.kind not in SEEN_SAMPLES:
            broken.add(fault.shard)
    whole = [shard.num_samples for shard in index.shards if shard.path not in broken]
    typical = int(np.median(whole)) if whole else max(s.num_samples for s in index.shards)
    for shard in index.shards:
        if shard.path in broken:
            lost += max(typical - shard.num_samples, 0)
    return lost


def make_train_transform(config: Config, preprocess: Any, peer_transform: Any) -> Any:
    """The peer's own transform, or for its default path the same operations without overhead.

    A random resized crop is drawn and resized by ablate.training.data.augment, which gives 8-bit
    images that are normalised in one go on the device; a batch's colours change at once.
    """
    from ablate.training.data import augment

    if config.aug_cfg.use_timm:
        return augment.SeededTransform(peer_transform)
    return augment.SeededCrop(
        preprocess.size,
        scale=config.aug_cfg.scale,
        colours=make_colours(config.aug_cfg),
        fast=config.fast_resize,
    )


def make_colours(augmentation: Augmentation) -> SeededColours | None:
    """open_clip's color_jitter and gray_scale; None where neither is asked for."""
    from torchvision.transforms import ColorJitter

    from ablate.training.data.colours import SeededColours

    share, grey_share = augmentation.color_jitter_prob, augmentation.gray_scale_prob
    if not share and not grey_share:
        return None
    strengths = augmentation.color_jitter if share else None
    assert strengths is None or isinstance(strengths, tuple)
    jitter = ColorJitter(*(strengths or ()))
    return SeededColours(
        jitter, share=share or 0.0, grey_share=grey_share or 0.0, chance=random.random
    )


def least_size(config: Config, size: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width that an image needs, so that its smallest crop is no smaller than `size`.

    For crops of the image's own shape; narrower ones may be enlarged a little.
    """
    height, width = (size, size) if isinstance(size, int) else size
    smallest = math.sqrt(config.aug_cfg.scale[0])
    return math.ceil(height / smallest), math.ceil(width / smallest)
