"""What a configuration amounts to before anything runs: warnings, steps, groups, measurements."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ablate.errors import DataError
from ablate.recipes.mae.config import EXTRA, KINDS, LIBRARIES, AccuracyEvaluation, Config
from ablate.training.counts import count_evaluations, steps_per_epoch
from ablate.training.data.image_source import count_classes
from ablate.training.evaluations.fields import chance_of_features, data_of
from ablate.training.init_from import describe_initial
from ablate.training.planning import count_samples, sketch
from ablate.training.sketches import sentence
from ablate.trial.extras import refuse_without
from ablate.trial.metrics import Metric
from ablate.trial.precision import slow_on_cpu
from ablate.trial.recipe import Note, Outline, absolute

if TYPE_CHECKING:
    from ablate.training.weights import LoadReport

FLOOR_SAMPLES = 1024
"""Of the training data, from which the loss of predicting nothing is measured."""


def metrics(config: Config) -> tuple[Metric, ...]:
    """What a run may be judged by; evaluations with a name measure NAME_OF_METRIC/NAME."""
    return tuple(metric for kind in KINDS for metric in kind.MEASURES)


def outline(config: Config, *, workers: int, gpus: int, root: Path, deep: bool = False) -> Outline:
    """What a configuration amounts to on a gang; `deep` builds the model without memory.

    Raises:
        ValueError: it cannot run there; says why and what to change.
    """
    refuse_without(LIBRARIES, recipe="mae", extra=EXTRA)
    if config.data_path is None:
        raise ValueError("data_path is missing; give a folder of images, or shards (.tar)")
    steps, why, classes = None, "", 1000
    try:
        steps = num_steps(config, workers=workers, num_samples=num_samples(config, root=root))
        if config.stage != "pretrain":
            classes = count_classes(str(root / config.data_path))
    except (DataError, OSError) as error:
        why = str(error)
    warnings = check(config, gpus=gpus)
    start = describe_start(absolute(config, root=root), classes)
    warnings += [] if start is None else [start]
    size, notes = None, list[Note]()
    if deep:
        size, note, decayed = _sketch(config, classes)
        notes.append(note)
        if decayed:
            warnings.append(
                f"{decayed} tensors of one dimension (LayerNorms and biases) are decayed by "
                f"param_groups {config.param_groups}: the peer decays none"
            )
    return Outline(
        measures=tuple(name for spec in config.evaluations for name in spec.measures()),
        measured_on=data_of(config.evaluations, default=config.val_path),
        steps=steps,
        samples=config.batch_size * config.accum_iter * workers,
        no_steps=why,
        warmup=round((steps or 0) * config.warmup_epochs / config.epochs),
        evaluations=count_evaluations(
            (spec.every for spec in config.evaluations), epochs=config.epochs
        ),
        checkpoint_bytes=size,
        warnings=tuple(warnings),
        notes=tuple(notes),
    )


def check(config: Config, *, gpus: int) -> list[str]:
    """Warnings about a configuration on workers with `gpus` GPUs each (0: CPU)."""
    warnings = [] if gpus else slow_on_cpu(config.precision)
    if config.warmup_epochs > 0.2 * config.epochs:
        warnings.append(
            f"warmup_epochs {config.warmup_epochs:g} is "
            f"{config.warmup_epochs / config.epochs:.0%} of the run; the peer's is a tenth"
        )
    if config.stage != "pretrain" and config.init_from is None:
        warnings.append(
            f"stage {config.stage} without init_from begins with an encoder at random; give the "
            "weights of a pre-training, or keep it as the level that shows what they bring"
        )
    if int(config.patches * (1 - config.mask_ratio)) == 0:
        warnings.append(
            f"mask_ratio {config.mask_ratio:g} hides all {config.patches} patches: the encoder "
            "sees nothing, and nothing can be learnt. Use it as a negative control only"
        )
    warnings += [f"{why}: use it as a negative control only" for why in _wrong(config)]
    return warnings


def unsound(config: Config, *, workers: int) -> list[str]:
    """Why no one should train with this configuration, whatever it scores; empty if one may."""
    return _wrong(config)


def _wrong(config: Config) -> list[str]:
    if config.init == "transformers":
        return ["init transformers begins with positions of zero, which nothing can mend"]
    return []


def num_samples(config: Config, *, root: Path) -> int:
    """Samples of one epoch: as given, else counted in the data under `root`."""
    assert config.data_path is not None, "outline() refuses a configuration without data"
    return count_samples(config.data_path, given=config.train_num_samples, root=root)


def num_steps(config: Config, *, workers: int, num_samples: int) -> int:
    """Optimizer steps of the run."""
    per_epoch = steps_per_epoch(
        num_samples,
        batch_size=config.batch_size,
        accum_freq=config.accum_iter,
        world_size=workers,
    )
    return per_epoch * config.epochs


def describe_start(config: Config, classes: int) -> str | None:
    """What init_from brings, tried on a model without memory; None where nothing is loaded.

    Raises:
        LoadError: the file does not fit the model.
    """

    def fit() -> LoadReport:
        import torch

        from ablate.recipes.mae.classifier import create_classifier

        _, report = create_classifier(config, classes, torch.device("meta"))
        assert report is not None
        return report

    return describe_initial(config.init_from, fit)


def _sketch(config: Config, classes: int) -> tuple[int, Note, int]:
    """Bytes that a trial's checkpoints take at most, what is decayed, and how many vectors are."""
    import torch

    if config.stage != "pretrain":
        from ablate.recipes.mae import classifier, supervised_learner

        alone = config.model_copy(update={"init_from": None})
        tuned, _ = classifier.create_classifier(alone, classes, torch.device("meta"))
        stepped = supervised_learner.make_optimizer(config, tuned, lr=1.0)
        size, groups = sketch(tuned, stepped, config.keep, epochs=config.epochs)
        text = sentence(groups) if config.stage == "linprobe" else _sentence_of_layers(groups)
        return size, Note(label="decay", text=text, facts=groups), 0

    from ablate.recipes.mae.groups import count_decayed_vectors, make_optimizer
    from ablate.recipes.mae.model import create_model

    model = create_model(config, torch.device("meta"))
    optimizer = make_optimizer(config, model, lr=1.0)
    size, groups = sketch(model, optimizer, config.keep, epochs=config.epochs)
    note = Note(label="decay", text=sentence(groups), facts=groups)
    return size, note, count_decayed_vectors(optimizer.param_groups)


def _sentence_of_layers(groups: Mapping[str, Any]) -> str:
    """Groups of layers, which are many, in few words."""
    counts = {kind: 0 for kind in ("decay", "no_decay")}
    for name, group in groups.items():
        if name != "hash":
            counts[name.rpartition(" ")[2]] += group["tensors"]
    lowest = next(iter(groups)).split()[2]
    return (
        f"parameter groups {groups['hash']}: {len(groups) // 2} layers at lr {lowest} (patches) to "
        f"x1 (head); {counts['decay']} tensors are decayed, {counts['no_decay']} are not"
    )


def chance(config: Config, *, metric: str, root: Path) -> float | None:
    """A measurement by guessing; None for losses, whose floor the run itself measures.

    Raises:
        DataError: the data of that evaluation are not there.
    """
    for spec in config.evaluations:
        if isinstance(spec, AccuracyEvaluation) and metric in spec.measures():
            classes = count_classes(str(root / str(config.data_path)))
            return min(1.0, (5 if metric.startswith("image_top5") else 1) / classes)
    return chance_of_features(
        config.evaluations, metric=metric, default_path=config.val_path, root=root
    )


def shorten(config: Config, *, steps: int, workers: int) -> Config:
    """A run of a few steps and one evaluation that takes the same time for each."""
    samples = steps * config.batch_size * config.accum_iter * workers
    changed: dict[str, Any] = {"train_num_samples": samples, "epochs": 1, "interruption": None}
    return config.model_copy(update={**changed, "warmup_epochs": min(config.warmup_epochs, 1.0)})


def share_out(config: Config, *, workers: int, ranks: int, root: Path) -> Config:
    """The configuration with which `ranks` do the work of `workers`, which they divide: each takes
    several micro-batches in the place of one, and a step has the same mean gradient."""
    whole = config.batch_size * workers
    samples = math.ceil(num_samples(config, root=root) / whole) * whole
    return Config(
        **{
            **config.model_dump(),
            "accum_iter": config.accum_iter * (workers // ranks),
            "train_num_samples": samples,
        }
    )
