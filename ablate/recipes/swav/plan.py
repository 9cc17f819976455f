"""What a configuration amounts to before anything runs: warnings, steps, groups, measurements."""

from __future__ import annotations

import math
from pathlib import Path

from ablate.errors import DataError
from ablate.recipes.swav.config import EXTRA, KINDS, LIBRARIES, Config
from ablate.training.counts import count_evaluations, steps_per_epoch
from ablate.training.evaluations.fields import chance_of_features, data_of
from ablate.training.planning import count_samples, sketch
from ablate.training.sketches import sentence
from ablate.trial.extras import refuse_without
from ablate.trial.metrics import Metric
from ablate.trial.recipe import Note, Outline


def metrics(config: Config) -> tuple[Metric, ...]:
    """What a run may be judged by; evaluations with a name measure NAME_OF_METRIC/NAME."""
    return tuple(metric for kind in KINDS for metric in kind.MEASURES)


def outline(config: Config, *, workers: int, gpus: int, root: Path, deep: bool = False) -> Outline:
    """What a configuration amounts to on a gang; `deep` builds the model without memory.

    Raises:
        ValueError: it cannot run there; says why and what to change.
    """
    refuse_without(LIBRARIES, recipe="swav", extra=EXTRA)
    if config.data_path is None:
        raise ValueError("data_path is missing; give a folder of images, or shards (.tar)")
    if config.sync_bn == "pytorch" and workers > 1 and gpus == 0:
        raise ValueError(
            "sync_bn: pytorch needs GPUs: torch's SyncBatchNorm has no CPU kernel. "
            "Set gang.gpus_per_worker: 1, or sync_bn: none"
        )
    steps, why = None, ""
    try:
        samples = count_samples(config.data_path, given=config.train_num_samples, root=root)
        steps = num_steps(config, workers=workers, num_samples=samples)
    except (DataError, OSError) as error:
        why = str(error)
    size, notes = None, list[Note]()
    if deep:
        size, note = _sketch(config, workers=workers)
        notes.append(note)
    return Outline(
        measures=tuple(name for spec in config.evaluations for name in spec.measures()),
        measured_on=data_of(config.evaluations, default=config.val_path),
        steps=steps,
        samples=config.batch_size * workers,
        no_steps=why,
        warmup=(steps or 0) // config.epochs * config.warmup_epochs,
        evaluations=count_evaluations(
            (spec.every for spec in config.evaluations), epochs=config.epochs
        ),
        checkpoint_bytes=size,
        warnings=tuple(check(config, workers=workers, gpus=gpus, steps=steps)),
        notes=tuple(notes),
    )


def check(config: Config, *, workers: int, gpus: int, steps: int | None) -> list[str]:
    """Warnings about a configuration on a gang; `steps` of the run, where they are known."""
    warnings = [
        f"{why}: use it as a negative control only" for why in unsound(config, workers=workers)
    ]
    if gpus == 0 and config.use_fp16:
        warnings.append(
            "use_fp16 on a CPU is fp16 autocast with a CPU gradient scaler: real, and slow where "
            "the CPU emulates fp16; set use_fp16: false"
        )
    whole = config.batch_size * workers
    if config.queue_length and not config.queue(workers):
        warnings.append(
            f"queue_length {config.queue_length} is below a global batch of {whole}: no queue"
        )
    balanced = whole if config.sinkhorn_scope == "global" else config.batch_size
    if not config.queue(workers) and balanced < config.nmb_prototypes / 8:
        warnings.append(
            f"{balanced} samples are balanced over {config.nmb_prototypes} prototypes: use fewer "
            "prototypes, or a queue (queue_length: 3840 for a global batch of 256)"
        )
    if steps is not None and config.freeze_prototypes_niters >= steps:
        warnings.append(
            f"freeze_prototypes_niters {config.freeze_prototypes_niters} covers all {steps} steps: "
            "the prototypes stay as they began"
        )
    return warnings


def unsound(config: Config, *, workers: int) -> list[str]:
    """Why no one should train with this configuration, whatever it scores; empty if one may."""
    if not config.sinkhorn_iterations:
        return ["sinkhorn_iterations 0 balances nothing, so everything may go to one prototype"]
    return []


def num_steps(config: Config, *, workers: int, num_samples: int) -> int:
    """Optimizer steps of the run."""
    per_epoch = steps_per_epoch(
        num_samples, batch_size=config.batch_size, accum_freq=1, world_size=workers
    )
    return per_epoch * config.epochs


def _sketch(config: Config, *, workers: int) -> tuple[int, Note]:
    """Bytes that a trial's checkpoints take at most, and what is decayed."""
    import torch

    from ablate.recipes.swav.learner import make_optimizer
    from ablate.recipes.swav.model import create_model

    model = create_model(config, torch.device("meta"), workers=workers)
    # LARS asks for norms, which nothing without memory has; its state is plain SGD's.
    plain = config.model_copy(update={"optimizer": "sgd"})
    size, groups = sketch(model, make_optimizer(plain, model), config.keep, epochs=config.epochs)
    return size, Note(label="decay", text=sentence(groups), facts=groups)


def chance(config: Config, *, metric: str, root: Path) -> float | None:
    """A measurement by guessing.

    Raises:
        DataError: the data of that evaluation are not there.
    """
    return chance_of_features(
        config.evaluations, metric=metric, default_path=config.val_path, root=root
    )


def shorten(config: Config, *, steps: int, workers: int) -> Config:
    """A run of a few steps and one evaluation that takes the same time for each."""
    return config.model_copy(
        update={
            "train_num_samples": steps * config.batch_size * workers,
            "epochs": 1,
            "interruption": None,
            "warmup_epochs": min(config.warmup_epochs, 1),
        }
    )


def share_out(config: Config, *, workers: int, ranks: int, root: Path) -> Config:
    """Refused: the assignments of a step are balanced over its whole batch.

    Raises:
        ValueError: always, with what to do.
    """
    raise ValueError(
        f"swav balances the assignments of {workers} workers' batches together, so {ranks} ranks "
        "cannot take them one after the other. Wait for the gang, or start a study with "
        f"gang.workers: {ranks} and batch_size: {math.ceil(config.batch_size * workers / ranks)}"
    )
