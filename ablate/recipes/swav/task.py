"""Everything that a trial trains and evaluates, put together; and a model to look at."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from ablate.recipes.swav.config import EXTRA, LIBRARIES, Config
from ablate.recipes.swav.plan import num_steps
from ablate.training.counts import make_due
from ablate.trial.extras import refuse_without

if TYPE_CHECKING:
    import torch

    from ablate.recipes.swav.learner import Swapped
    from ablate.training.data.pictures import Pictures
    from ablate.training.evaluations.evaluation import Evaluation
    from ablate.training.evaluations.features import Encoder
    from ablate.training.evaluations.images import EvalImages
    from ablate.training.inspection.specimen import Specimen
    from ablate.training.ranks import Gang
    from ablate.training.task import Task
    from ablate.trial.session import Ending, Session


def run(session: Session) -> Ending:
    """One rank of one attempt, from its checkpoint to its end."""
    refuse_without(LIBRARIES, recipe="swav", extra=EXTRA)
    from ablate.training import ranks
    from ablate.training.fit import fit
    from ablate.training.memory import fitting

    gang = ranks.enter(session)
    config: Config = session.config
    with fitting():
        task = build(config, gang=gang)
    steps = num_steps(config, workers=gang.world_size, num_samples=task.length.num_samples)
    # The level of uniform predictions is none to judge by: sound runs rest near it for long.
    session.about(
        in_nats=True,
        warmup=steps // config.epochs * config.warmup_epochs,
        steps_total=steps,
    )
    return fit(
        session, task, gang, specimen=lambda: specimen(config, data=None, device=gang.device)
    )


def build(config: Config, *, gang: Gang) -> Task:
    """The model with its initial weights, its data, optimizer, step and evaluations."""
    import torch

    from ablate.recipes.swav.crops import make_views
    from ablate.recipes.swav.learner import Swapped
    from ablate.recipes.swav.model import create_model, make_input
    from ablate.training.data.picture_files import open_pictures
    from ablate.training.data.pictures import Pictures
    from ablate.training.task import Data, Execution, Length, Task

    assert config.data_path is not None, "outline() refuses a configuration without data"
    samples = Pictures(
        open_pictures(config.data_path), views=make_views(config), cache_gib=config.cache_gib
    )
    length = Length(
        num_samples=config.train_num_samples or int(samples.shard_sizes.sum()),
        batch_size=config.batch_size,
        epochs=config.epochs,
    )
    learner = Swapped(
        config,
        create_model(config, gang.device, workers=gang.world_size),
        gang=gang,
        steps_per_epoch=length.steps_per_epoch(gang.world_size),
        to_input=make_input(gang.device),
    )
    return Task(
        learner=learner,
        data=Data(samples, max_fault_share=config.max_fault_share, workers=config.workers),
        length=length,
        seed=config.seed,
        evaluations=make_evaluations(config, learner, samples, length.num_samples, gang.device),
        execution=Execution(
            scaler=torch.amp.GradScaler(gang.device.type) if config.use_fp16 else None,
            sync_batch_norm=config.sync_bn == "pytorch",
        ),
        keep=config.keep,
        interruption=config.interruption,
        facts={"queue": config.queue(gang.world_size)},
    )


def make_evaluations(
    config: Config, learner: Swapped, samples: Pictures, num_samples: int, device: torch.device
) -> tuple[Evaluation, ...]:
    """Those of `evaluations`, and the model's health with any."""
    from ablate.training.evaluations.health import with_health
    from ablate.training.evaluations.on_features import read_features

    found = read_features(
        config.evaluations,
        open_images=cache(lambda path: open_images(config, path)),
        default_path=config.val_path,
        encoder=make_reader(config, device),
        make_due=lambda every: make_due(every, config.epochs),
    )
    return with_health(
        found,
        samples,
        num_samples=num_samples,
        seed=config.seed,
        look=learner.look,
        device=device,
    )


def make_reader(config: Config, device: torch.device) -> Encoder:
    """How evaluations compute features: in the precision of training."""
    from ablate.recipes.swav.model import encode, make_input
    from ablate.training.arithmetic import make_autocast
    from ablate.training.image_models import make_encoder

    return make_encoder(
        encode,
        autocast=make_autocast(config.precision, device),
        to_input=make_input(device),
        device=device,
    )


def open_images(config: Config, path: str) -> EvalImages:
    """Labelled images of a folder of class folders, or of shards with class numbers; of the side
    of the largest crops."""
    from ablate.training.image_models import open_eval_images

    return open_eval_images(path, size=config.size_crops[0], cache_gib=config.cache_gib)


def specimen(config: Config, *, data: str | None, device: torch.device) -> Specimen:
    """The model with its initial weights in eval mode, and labelled images to look at it with:
    `data`, else those of val_path.

    Raises:
        DataError: the images cannot be used.
    """
    from ablate.recipes.swav.model import create_model
    from ablate.training.image_models import make_specimen

    path = data or config.val_path
    images = open_images(config, path) if path is not None else None
    return make_specimen(create_model(config, device), images, make_reader(config, device))
