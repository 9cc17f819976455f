"""Everything that a trial trains and evaluates, put together; and a model to look at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ablate.recipes.timesformer.config import Config
from ablate.recipes.timesformer.data import batch_of_rank, open_train, open_val, steps_per_epoch
from ablate.recipes.timesformer.model import (
    create_model,
    make_optimizer,
    make_schedule,
)
from ablate.recipes.timesformer.plan import warmup_steps
from ablate.training.counts import make_due

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    from ablate.training.data.clips import ClipSource
    from ablate.training.evaluations.clips import EvalClips
    from ablate.training.evaluations.evaluation import Evaluation
    from ablate.training.inspection.specimen import Specimen
    from ablate.training.task import Learner, Task
    from ablate.trial.session import Ending, Session


def run(session: Session) -> Ending:
    """One rank of one attempt, from its checkpoint to its end."""
    from ablate.training import ranks
    from ablate.training.fit import fit
    from ablate.training.memory import fitting

    gang = ranks.enter(session)
    config: Config = session.config
    with fitting():
        task = build(config, rank=gang.rank, world_size=gang.world_size, device=gang.device)
    steps = task.length.steps_per_epoch(gang.world_size) * task.length.epochs
    session.about(
        uniform_loss=task.facts["chance_loss"],
        warmup=warmup_steps(config, steps),
        steps_total=steps,
    )
    return fit(
        session, task, gang, specimen=lambda: specimen(config, data=None, device=gang.device)
    )


def build(config: Config, *, rank: int, world_size: int, device: torch.device) -> Task:
    """The model with its initial weights, its data, optimizer, step and evaluations."""
    import math

    from ablate.training.data.clip_samples import ClipSamples
    from ablate.training.data.frames import FrameChoice, TrainCut
    from ablate.training.task import Data, Execution, Length, Task

    source = open_train(config)
    classes = len(source.classes)
    model, facts = create_model(config, classes, device)
    samples = ClipSamples(
        source,
        choice=FrameChoice(config.num_frames, config.sampling_rate, config.frame_order),
        cut=TrainCut(
            config.train_crop_size, scales=config.train_jitter_scales, flip=config.random_flip
        ),
        cache_gib=config.cache_gib,
    )
    return Task(
        learner=make_learner(config, model, device, per_epoch=steps_per_epoch(config, len(source))),
        data=Data(
            samples,
            max_fault_share=config.max_fault_share,
            workers=config.num_workers,
            prefetch=config.prefetch,
            pin_memory=config.pin_memory,
        ),
        length=Length(
            num_samples=config.epoch_clips or len(source),
            batch_size=batch_of_rank(config, workers=world_size),
            accum_freq=config.accum_freq,
            epochs=config.max_epoch,
        ),
        seed=config.seed,
        evaluations=_evaluations(config, source, device),
        execution=Execution(grad_clip_norm=config.grad_clip_norm),
        keep=config.keep,
        interruption=config.interruption,
        facts={**facts, "classes": list(source.classes), "chance_loss": math.log(classes)},
    )


def make_learner(
    config: Config, model: torch.nn.Module, device: torch.device, *, per_epoch: int
) -> Learner:
    """The model and how a step teaches it: the mean cross entropy of the step's clips."""
    import torch

    from ablate.training.arithmetic import make_autocast
    from ablate.training.data.frames import ClipInput
    from ablate.training.optim import set_rates
    from ablate.training.task import Backward, Learner, MicroBatch

    to_input = ClipInput(config.mean, config.std, device=device)
    autocast = make_autocast(config.precision, device)
    schedule = make_schedule(config, per_epoch)

    class Classifier(Learner):
        def __init__(self) -> None:
            self.model = model
            self.optimizer, _ = make_optimizer(config, model)

        def rates(self, step: int) -> float:
            return set_rates(self.optimizer, schedule(step))

        def loss(
            self, model: torch.nn.Module, batches: Sequence[MicroBatch], backward: Backward
        ) -> dict[str, torch.Tensor]:
            losses = []
            for clips, labels in batches:
                with autocast():
                    logits = model(to_input(clips)).logits
                    value = torch.nn.functional.cross_entropy(logits.float(), labels)
                backward(value / len(batches))
                losses.append(value.detach())
            return {"loss": torch.stack(losses).mean()}

    return Classifier()


def _evaluations(config: Config, train: ClipSource, device: torch.device) -> tuple[Evaluation, ...]:
    clips = _judged(config, train)
    if clips is None:
        return ()
    from ablate.training.evaluations.clip_accuracy import ClipAccuracy

    return (
        ClipAccuracy(
            clips,
            classify=_classifier(config, device),
            device=device,
            due=make_due(config.eval_period, config.max_epoch),
        ),
    )


def _judged(config: Config, train: ClipSource) -> EvalClips | None:
    from ablate.training.data.frames import FrameChoice, ViewCut
    from ablate.training.evaluations.clips import EvalClips

    source = open_val(config, train)
    if source is None:
        return None
    return EvalClips(
        source,
        choice=FrameChoice(config.num_frames, config.sampling_rate, config.frame_order),
        cut=ViewCut(config.test_crop_size, config.num_spatial_crops),
        views=config.num_ensemble_views,
        cache_gib=config.cache_gib,
    )


def _classifier(
    config: Config, device: torch.device
) -> Callable[[Any, torch.Tensor], torch.Tensor]:
    from ablate.training.arithmetic import make_autocast
    from ablate.training.data.frames import ClipInput

    to_input = ClipInput(config.mean, config.std, device=device)
    autocast = make_autocast(config.precision, device)

    def classify(model: Any, clips: torch.Tensor) -> torch.Tensor:
        with autocast():
            logits: torch.Tensor = model(to_input(clips)).logits
        return logits

    return classify


def specimen(config: Config, *, data: str | None, device: torch.device) -> Specimen:
    """The model with its initial weights in eval mode, and clips to look at it with: `data`, else
    those of val_data. Its features are those of the class token.

    Raises:
        DataError: the clips cannot be used.
    """
    import numpy as np
    import torch

    from ablate.training.arithmetic import make_autocast
    from ablate.training.data.frames import ClipInput
    from ablate.training.evaluations.clip_accuracy import CLIPS_PER_BATCH
    from ablate.training.inspection.specimen import Specimen

    train = open_train(config)
    model, _ = create_model(config, len(train.classes), device)
    if data is not None:
        config = config.model_copy(update={"val_data": data})
    clips = _judged(config, train)
    to_input = ClipInput(config.mean, config.std, device=device)
    autocast = make_autocast(config.precision, device)

    def features(net: Any, rows: npt.NDArray[np.int64]) -> torch.Tensor:
        assert clips is not None
        found = []
        with torch.inference_mode(), autocast():
            for first in range(0, len(rows), CLIPS_PER_BATCH):
                chosen = rows[first : first + CLIPS_PER_BATCH].tolist()
                views = torch.stack([clips.views_of(row)[clips.views // 2] for row in chosen])
                seen = net.timesformer(to_input(views.to(device))).last_hidden_state[:, 0]
                found.append(seen.float().cpu())
        return torch.cat(found).clone()

    return Specimen(
        model=model.eval(),
        frozen=(),
        labels=np.zeros(0, np.int64) if clips is None else clips.source.labels,
        class_names=train.classes,
        features=features,
    )
