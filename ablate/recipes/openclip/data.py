"""Training samples: the shards' index, how many steps they make, and how they are read."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from ablate.errors import DataError
from ablate.recipes import absolute

if TYPE_CHECKING:
    from ablate.datasets.shards import ShardIndex
    from ablate.training.data import Batch
from ablate.recipes.openclip.config import PATH_FIELDS, Config


def num_samples(config: Config, *, root: Path) -> int:
    """Samples of one epoch: as given, else counted in the shards under `root`."""
    if config.train_num_samples is not None:
        return config.train_num_samples
    return open_train_index(absolute(config, PATH_FIELDS, root=root)).num_samples


def num_steps(config: Config, *, workers: int, num_samples: int) -> int:
    """Optimizer steps of the run.

    As the peer counts with at most one loader process: batches of an epoch are rounded up (the
    last is filled from the epoch's start), then divided by accum_freq and rounded down.
    """
    batches = math.ceil(num_samples / (config.batch_size * workers))
    return batches // config.accum_freq * config.epochs


def open_index(pattern: str) -> ShardIndex:
    """The index of these shards, made once for a machine.

    Raises:
        DataError: shards are missing.
    """
    from ablate.datasets.shards import index_shards
    from ablate.training.cache import cache_folder

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
    assert config.train_data is not None
    index = open_index(config.train_data)
    lost = lost_samples(index)
    if lost > config.max_fault_share * (lost + index.num_samples):
        shown = "; ".join(str(fault) for fault in index.faults[:3])
        raise DataError(
            f"about {lost} of {lost + index.num_samples} samples of train_data "
            f"{config.train_data} are lost, more than the share of {config.max_fault_share:g} "
            f"that max_fault_share allows: {shown}. Fetch these shards again"
        )
    return index


def lost_samples(index: ShardIndex) -> int:
    """Samples that the shards should hold and the index lacks: a truncated shard would else only
    make an epoch shorter.

    Incomplete samples are counted; what a shard lost that is not read to its end is taken to be
    what it lacks of the median of the whole shards.
    """
    import numpy as np

    lost, broken = 0, set()
    for fault in index.faults:
        if fault.kind in ("missing_caption", "missing_image", "duplicate_key"):
            lost += fault.count
        else:
            broken.add(fault.shard)
    whole = [shard.num_samples for shard in index.shards if shard.path not in broken]
    typical = int(np.median(whole)) if whole else max(s.num_samples for s in index.shards)
    for shard in index.shards:
        if shard.path in broken:
            lost += max(typical - shard.num_samples, 0)
    return lost


def make_train_transform(config: Config, preprocess: Any, peer_transform: Any) -> Any:
    """The peer's own transform, or for its default path the same operations without overhead.

    A random resized crop is drawn and resized by ablate.training.augment, which gives 8-bit
    images that are normalised in one go on the device; jitter and grey are the peer's objects.
    """
    from ablate.training import augment

    if config.aug_cfg.use_timm:
        return augment.SeededTransform(peer_transform)
    # The peer's list: crop, to RGB (done at decoding), then jitter, grey, to tensor, normalise.
    extra = tuple(peer_transform.transforms[2:-2])
    return augment.SeededCrop(
        preprocess.size, scale=config.aug_cfg.scale, extra=extra, fast=config.fast_resize
    )


def least_size(config: Config, size: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width that an image needs, so that its smallest crop is no smaller than `size`.

    For crops of the image's own shape; narrower ones may be enlarged a little.
    """
    height, width = (size, size) if isinstance(size, int) else size
    smallest = math.sqrt(config.aug_cfg.scale[0])
    return math.ceil(height / smallest), math.ceil(width / smallest)


def make_stream(
    config: Config,
    index: ShardIndex,
    num_samples: int,
    transform: Any,
    tokenizer: Any,
    *,
    world_size: int,
) -> Callable[[int, int], Iterator[Batch]]:
    """Micro-batches through the peer's own WebDataset pipeline and transform.

    Shards are ordered by seed and epoch; the peer seeds the shuffle of samples with process id and
    time. What is unreadable it skips, uncounted.

    Raises:
        DataError: a loading process may get fewer samples than a batch, and would wait for ever.
    """
    import numpy as np

    from ablate.training.data import Batch, ignore_stop_signals

    processes = max(1, config.workers) * world_size
    sizes = np.sort([shard.num_samples for shard in index.shards])
    fewest = int(sizes[: len(sizes) // processes].sum())
    if fewest < config.batch_size:
        raise DataError(
            f"data_order: stream deals {len(sizes)} shards to {processes} loading processes, so "
            f"one of them may get {fewest} samples, fewer than batch_size {config.batch_size}. "
            "Lower workers or batch_size, or set data_order: indexed"
        )
    steps = num_steps(config, workers=world_size, num_samples=num_samples)
    per_epoch = steps // config.epochs * config.accum_freq

    def batches(start: int, stop: int) -> Iterator[Batch]:
        # Newer versions than 0.2.86 refuse to run commands when they see this.
        os.environ["WDS_SECURE"] = "1"
        from open_clip_train.data import get_wds_dataset

        gopen = importlib.import_module("webdataset.gopen")
        for scheme in gopen.gopen_schemes:  # commands and addresses; plain paths pass by them
            gopen.gopen_schemes[scheme] = gopen.gopen_error
        arguments = SimpleNamespace(
            train_data=[shard.path for shard in index.shards],
            train_num_samples=num_samples,
            train_data_upsampling_factors=None,
            dataset_resampled=False,
            batch_size=config.batch_size,
            workers=config.workers,
            world_size=world_size,
            seed=config.seed,
        )
        source = get_wds_dataset(arguments, transform, is_train=True, tokenizer=tokenizer)
        if config.workers:
            loader = source.dataloader.pipeline[0]
            loader.multiprocessing_context = "fork"  # its parts cannot be pickled
            loader.worker_init_fn = ignore_stop_signals
        while start < stop:
            epoch, within = divmod(start, per_epoch)
            source.set_epoch(epoch)
            for images, texts in islice(source.dataloader, per_epoch - within):
                yield Batch((images, texts), substitutes=0)
            start += per_epoch - within

    return batches
