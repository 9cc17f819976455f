"""Stages finetune and linprobe, put together: labelled images, the encoder with a head."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from ablate.errors import DataError
from ablate.recipes.mae.classifier import create_classifier, encode
from ablate.recipes.mae.config import AccuracyEvaluation, Config
from ablate.recipes.mae.evaluations import make_reader, make_readers, open_images
from ablate.recipes.mae.model import MEAN, make_input
from ablate.recipes.mae.supervised_learner import Classifier
from ablate.training.counts import make_due
from ablate.training.data.image_source import open_labelled, pair_labels
from ablate.training.data.pictures import Pictures
from ablate.training.image_models import make_specimen
from ablate.training.task import Data, Execution, Length, Task

if TYPE_CHECKING:
    from ablate.training.evaluations.evaluation import Evaluation
    from ablate.training.inspection.specimen import Specimen
    from ablate.training.ranks import Gang


def count_of_training(config: Config) -> int:
    """Classes of the training images.

    Raises:
        DataError: they are not there, or have no labels.
    """
    assert config.data_path is not None, "outline() refuses a configuration without data"
    return int(open_labelled(config.data_path).labels.max()) + 1


def build(config: Config, *, gang: Gang) -> Task:
    """The model with its initial weights, its data, optimizer, step and evaluations."""
    samples = open_samples(config)
    classes = samples.num_classes
    model, report = create_classifier(config, classes, torch.device("cpu"))
    to_input = make_input(gang.device)
    length = Length(
        num_samples=config.train_num_samples or int(samples.shard_sizes.sum()),
        batch_size=config.batch_size,
        accum_freq=config.accum_iter,
        epochs=config.epochs,
    )
    learner = Classifier(
        config,
        model.to(gang.device),
        classes=classes,
        workers=gang.world_size,
        steps_per_epoch=length.steps_per_epoch(gang.world_size),
        to_input=to_input,
        device=gang.device,
    )
    amp = config.precision == "amp"
    return Task(
        learner=learner,
        data=Data(samples, max_fault_share=config.max_fault_share, workers=config.num_workers),
        length=length,
        seed=config.seed,
        evaluations=make_evaluations(config, learner, samples, length.num_samples, gang.device),
        execution=Execution(
            scaler=torch.amp.GradScaler(gang.device.type) if amp else None,
            grad_clip_norm=config.clip_grad,
        ),
        keep=config.keep,
        interruption=config.interruption,
        facts={"classes": classes} | ({} if report is None else {"init_from": report.to_dict()}),
    )


def open_samples(config: Config) -> Pictures:
    """The training images with their classes, cropped, changed by `aa` and mirrored."""
    from ablate.training.data.augment import SeededCrop
    from ablate.training.data.picture_files import open_pictures
    from ablate.training.data.pictures import Flipped

    assert config.data_path is not None, "outline() refuses a configuration without data"
    extra: tuple[Any, ...] = ()
    if config.stage == "finetune" and config.aa is not None:
        extra = (make_augmentation(config),)
    crop = Flipped(SeededCrop(config.input_size, scale=config.crop_scale, extra=extra))
    files = open_pictures(config.data_path)
    if files.labels is None:
        raise DataError(f"{config.data_path} has no classes, which stage {config.stage} needs")
    return Pictures(files, views=[crop], labelled=True, cache_gib=config.cache_gib)


def make_augmentation(config: Config) -> Any:
    """timm's, with what its create_transform gives it for this size and mean."""
    from PIL import Image
    from timm.data.auto_augment import (
        augment_and_mix_transform,
        auto_augment_transform,
        rand_augment_transform,
    )

    assert config.aa is not None
    about = {
        "translate_const": int(config.input_size * 0.45),
        "img_mean": tuple(min(255, round(255 * each)) for each in MEAN),
        "interpolation": Image.Resampling.BICUBIC,
    }
    if config.aa.startswith("rand"):
        return rand_augment_transform(config.aa, about)
    if config.aa.startswith("augmix"):
        return augment_and_mix_transform(config.aa, about | {"translate_pct": 0.3})
    return auto_augment_transform(config.aa, about)


def make_evaluations(
    config: Config,
    learner: Classifier,
    samples: Pictures,
    num_samples: int,
    device: torch.device,
) -> tuple[Evaluation, ...]:
    """Those of `evaluations`, and the model's health with any."""
    from ablate.training.evaluations.health import with_health
    from ablate.training.evaluations.image_accuracy import ImageAccuracy

    opened = cache(lambda path: open_images(config, path))
    to_input = make_input(device)
    reader = make_reader(config, encode, device=device, to_input=to_input)

    def classify(model: torch.nn.Module, pixels: torch.Tensor) -> torch.Tensor:
        with reader.autocast():
            logits: torch.Tensor = model(to_input(pixels.to(device)))
        return logits

    found: list[Evaluation] = list(make_readers(config, reader, opened=opened))
    for spec in config.evaluations:
        if isinstance(spec, AccuracyEvaluation):
            path = spec.path or config.val_path
            assert path is not None and config.data_path is not None, "Config refuses that"
            images = opened(path)
            found.append(
                ImageAccuracy(
                    images,
                    labels=pair_labels(images.source, open_labelled(config.data_path)),
                    classify=classify,
                    due=make_due(spec.every, config.epochs),
                    label=spec.label,
                )
            )
    return with_health(
        found, samples, num_samples=num_samples, seed=config.seed, look=learner.look, device=device
    )


def specimen(config: Config, *, data: str | None, device: torch.device) -> Specimen:
    """The model with its initial weights in eval mode, and labelled images to look at it with:
    `data`, else those of val_path."""
    path = data or config.val_path
    images = open_images(config, path) if path is not None else None
    model, _ = create_classifier(config, count_of_training(config), torch.device("cpu"))
    reader = make_reader(config, encode, device=device, to_input=make_input(device))
    return make_specimen(model.to(device), images, reader)
