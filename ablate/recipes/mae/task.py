"""Everything that a trial trains and evaluates, put together; and a model to look at."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from ablate.recipes.mae.config import EXTRA, LIBRARIES, Config
from ablate.recipes.mae.plan import FLOOR_SAMPLES, num_steps
from ablate.training.counts import make_due
from ablate.trial.extras import refuse_without

if TYPE_CHECKING:
    import torch

    from ablate.training.data.augment import ToInput
    from ablate.training.data.pictures import Pictures
    from ablate.training.evaluations.evaluation import Evaluation
    from ablate.training.inspection.specimen import Specimen
    from ablate.training.ranks import Gang
    from ablate.training.task import Task
    from ablate.trial.session import Ending, Session


def run(session: Session) -> Ending:
    """One rank of one attempt, from its checkpoint to its end."""
    refuse_without(LIBRARIES, recipe="mae", extra=EXTRA)
    from ablate.recipes.mae.model import loss_of_nothing, make_input
    from ablate.training import ranks
    from ablate.training.fit import fit
    from ablate.training.memory import fitting

    gang = ranks.enter(session)
    config: Config = session.config
    with fitting():
        task = build(config, gang=gang, pictures=session.folder / "pictures")
    steps = num_steps(config, workers=gang.world_size, num_samples=task.length.num_samples)
    if config.stage == "pretrain":
        pixels = _first_crops(config, task, make_input(gang.device))
        uniform_loss = float(loss_of_nothing(task.learner.model, pixels))
    else:
        uniform_loss = math.log(task.facts["classes"])
    session.about(
        uniform_loss=uniform_loss,
        in_nats=config.stage != "pretrain",
        warmup=round(steps * config.warmup_epochs / config.epochs),
        steps_total=steps,
    )
    return fit(
        session, task, gang, specimen=lambda: specimen(config, data=None, device=gang.device)
    )


def _first_crops(config: Config, task: Task, to_input: ToInput) -> torch.Tensor:
    """Training images as the first steps crop them, the same on every rank."""
    import numpy as np

    from ablate.training.data.augment import sample_seeds

    total = int(task.data.samples.shard_sizes.sum())
    ids = np.linspace(0, total - 1, min(FLOOR_SAMPLES, total)).astype(np.int64)
    (images,), _ = task.data.samples.batch(ids, sample_seeds(config.seed, 0, ids))
    return to_input(images)


def build(config: Config, *, gang: Gang, pictures: Path | None = None) -> Task:
    """The model with its initial weights, its data, optimizer, step and evaluations.

    Reconstructions are drawn into the folder `pictures`.
    """
    import torch

    if config.stage != "pretrain":
        from ablate.recipes.mae import supervised

        return supervised.build(config, gang=gang)
    from ablate.recipes.mae.learner import MaskedAutoencoder
    from ablate.recipes.mae.model import create_model, make_input
    from ablate.training.task import Data, Execution, Length, Task, Watch

    model = create_model(config, gang.device)
    to_input = make_input(gang.device)
    samples = open_samples(config)
    length = Length(
        num_samples=config.train_num_samples or int(samples.shard_sizes.sum()),
        batch_size=config.batch_size,
        accum_freq=config.accum_iter,
        epochs=config.epochs,
    )
    learner = MaskedAutoencoder(
        config,
        model,
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
        evaluations=make_evaluations(
            config, samples, length.num_samples, gang.device, to_input, pictures
        ),
        execution=Execution(scaler=torch.amp.GradScaler(gang.device.type) if amp else None),
        keep=config.keep,
        interruption=config.interruption,
        watch=Watch(moments=("vit.embeddings.patch_embeddings.projection.weight",)),
        facts={"params_decayed_1d": learner.decayed_vectors},
    )


def open_samples(config: Config) -> Pictures:
    """The training images, cropped and mirrored as main_pretrain.py does."""
    from ablate.training.data.augment import SeededCrop
    from ablate.training.data.picture_files import open_pictures
    from ablate.training.data.pictures import Flipped, Pictures

    assert config.data_path is not None, "outline() refuses a configuration without data"
    crop = Flipped(SeededCrop(config.input_size, scale=config.crop_scale))
    return Pictures(open_pictures(config.data_path), views=[crop], cache_gib=config.cache_gib)


def make_evaluations(
    config: Config,
    samples: Pictures,
    num_samples: int,
    device: torch.device,
    to_input: ToInput,
    pictures: Path | None,
) -> tuple[Evaluation, ...]:
    """Those of `evaluations`, and the model's health with any."""
    from ablate.recipes.mae.config import ReconstructionEvaluation
    from ablate.recipes.mae.evaluations import make_reader, make_readers, open_images
    from ablate.recipes.mae.model import encode, reconstruct
    from ablate.training.evaluations.health import with_health
    from ablate.training.evaluations.reconstruction import Reconstruction

    opened = cache(lambda path: open_images(config, path))
    encoder = make_reader(config, encode, device=device, to_input=to_input)
    found: list[Evaluation] = list(make_readers(config, encoder, opened=opened))
    for spec in config.evaluations:
        if isinstance(spec, ReconstructionEvaluation):
            path = spec.path or config.val_path
            assert path is not None, "Config refuses an evaluation without data"
            found.append(
                Reconstruction(
                    opened(path),
                    look=lambda model, pixels, noise: reconstruct(
                        model, to_input(pixels.to(device)), noise
                    ),
                    patches=config.patches,
                    due=make_due(spec.every, config.epochs),
                    label=spec.label,
                    pictures=pictures,
                )
            )

    def look(model: torch.nn.Module, batch: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
        images = to_input(batch[0])
        with encoder.autocast():
            return {"loss": model(images).loss, "encoder": encode(model, images)}

    return with_health(
        found, samples, num_samples=num_samples, seed=config.seed, look=look, device=device
    )


def specimen(config: Config, *, data: str | None, device: torch.device) -> Specimen:
    """The model with its initial weights in eval mode, and labelled images to look at it with:
    `data`, else those of val_path.

    Raises:
        DataError: the images cannot be used.
    """
    if config.stage != "pretrain":
        from ablate.recipes.mae import supervised

        return supervised.specimen(config, data=data, device=device)
    from ablate.recipes.mae.evaluations import make_reader, open_images
    from ablate.recipes.mae.model import create_model, encode, make_input
    from ablate.training.image_models import make_specimen

    path = data or config.val_path
    images = open_images(config, path) if path is not None else None
    encoder = make_reader(config, encode, device=device, to_input=make_input(device))
    return make_specimen(create_model(config, device), images, encoder)
