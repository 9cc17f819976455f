"""What a configuration amounts to before anything runs."""

from __future__ import annotations

import math
from pathlib import Path

from ablate.errors import DataError
from ablate.recipes.timesformer.config import Config
from ablate.recipes.timesformer.data import batch_of_rank, open_train, steps_per_epoch
from ablate.recipes.timesformer.model import describe_start, sketch
from ablate.training.counts import count_evaluations
from ablate.training.sketches import sentence
from ablate.trial.extras import refuse_without
from ablate.trial.metrics import Metric
from ablate.trial.precision import slow_on_cpu
from ablate.trial.recipe import Note, Outline, absolute

METRICS = (
    Metric("clip_top1", "fraction", "top-1 accuracy over a clip's views", "maximize"),
    Metric("clip_top5", "fraction", "top-5 accuracy over a clip's views", "maximize"),
)


def metrics(config: Config) -> tuple[Metric, ...]:
    """What a run may be judged by."""
    return METRICS


def outline(config: Config, *, workers: int, gpus: int, root: Path, deep: bool = False) -> Outline:
    """What `config` amounts to on `workers`; `deep` sketches the model with torch.

    Raises:
        ValueError: it cannot run there; says why and what to change.
        LoadError: the initial weights do not fit.
    """
    refuse_without(("transformers",), recipe="timesformer", extra="video")
    if config.train_data is None:
        raise ValueError("train_data is missing; give clips, e.g. by `ablate data emoji-video`")
    batch_of_rank(config, workers=workers)
    warnings = [] if gpus else slow_on_cpu(config.precision)
    steps, why, classes = None, "", 400
    try:
        source = open_train(config, root=root)
    except (DataError, OSError) as error:
        if config.epoch_clips is None:
            why = str(error)
        else:
            steps = steps_per_epoch(config, config.epoch_clips) * config.max_epoch
    else:
        from ablate.training.data.clips import needs_av

        if needs_av(source):
            refuse_without(("av",), recipe="timesformer", extra="video")
        steps = steps_per_epoch(config, len(source)) * config.max_epoch
        classes = len(source.classes)
        if config.random_flip and {"left", "right"} <= {name.lower() for name in source.classes}:
            warnings.append(
                "random_flip turns clips of class left into what class right looks like; "
                "set random_flip: false"
            )
    if config.val_data is None:
        warnings.append("val_data is missing: nothing is measured but the loss")
    start = describe_start(absolute(config, root=root), classes)
    if start is not None:
        warnings.append(start)
    notes, size = [], None
    if deep:
        groups, state = sketch(config, classes)
        notes.append(Note(label="decay", text=sentence(groups), facts=groups))
        size = config.keep.at_once(config.max_epoch) * state
    return Outline(
        measures=tuple(m.name for m in METRICS) if config.val_data is not None else (),
        measured_on={m.name: str(config.val_data) for m in METRICS},
        steps=steps,
        samples=config.batch_size,
        no_steps=why,
        warmup=warmup_steps(config, steps),
        evaluations=count_evaluations([config.eval_period], epochs=config.max_epoch),
        checkpoint_bytes=size,
        warnings=tuple(warnings),
        notes=tuple(notes),
    )


def warmup_steps(config: Config, steps: int | None) -> int:
    """Steps over which the learning rate rises."""
    return 0 if steps is None else math.ceil(config.warmup_epochs * steps / config.max_epoch)


def chance(config: Config, *, metric: str, root: Path) -> float | None:
    """Accuracy by guessing.

    Raises:
        DataError: the clips are not there.
    """
    classes = len(open_train(config, root=root).classes)
    return min(1.0, int(metric.removeprefix("clip_top")) / classes)


def shorten(config: Config, *, steps: int, workers: int) -> Config:
    """A run of a few steps and one evaluation that takes the same time for each."""
    few = {"epoch_clips": steps * config.batch_size, "interruption": None}
    return config.model_copy(update={**few, "max_epoch": 1, "steps": (0,), "lrs": (1.0,)})


def share_out(config: Config, *, workers: int, ranks: int, root: Path) -> Config:
    """The configuration with which `ranks` do the work of `workers`: the same steps, in smaller
    parts, added up in another order."""
    return config.model_copy(update={"accum_freq": config.accum_freq * workers // ranks})
