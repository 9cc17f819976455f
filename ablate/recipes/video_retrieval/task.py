"""Everything that a trial trains and evaluates, put together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ablate.recipes.video_retrieval.config import Config
from ablate.recipes.video_retrieval.model import (
    create_model,
    encode_clips,
    make_optimizer,
    make_schedule,
    make_tokenizer,
    mean_of_frames,
)
from ablate.recipes.video_retrieval.plan import open_captioned, steps_per_epoch
from ablate.training.counts import make_due

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    from ablate.training.data.frames import ClipInput
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
    steps = task.length.steps_per_epoch(gang.world_size)
    session.about(
        global_batch=config.batch_size * gang.world_size,
        warmup=round(config.warmup_epochs * steps),
        steps_total=steps * config.epochs,
    )
    return fit(
        session, task, gang, specimen=lambda: specimen(config, data=None, device=gang.device)
    )


def build(config: Config, *, rank: int, world_size: int, device: torch.device) -> Task:
    """The model with its initial weights, its data, optimizer, step and evaluations."""
    import open_clip

    from ablate.training.data.clip_samples import ClipSamples
    from ablate.training.data.frames import ClipInput, PartChoice, TrainCut
    from ablate.training.task import Data, Execution, Length, Task

    assert config.train_data is not None, "outline() refuses a configuration without train_data"
    source = open_captioned(config.train_data)
    model, facts = create_model(config, device)
    tokenizer, words = make_tokenizer(config)
    samples = ClipSamples(
        source,
        choice=PartChoice(config.num_frames, random=config.sample_type == "rand"),
        cut=TrainCut(
            config.image_res, scales=(config.image_res, config.image_res), flip=config.random_flip
        ),
        tokens=tokenizer(list(source.texts)),
        words=words,
        cache_gib=config.cache_gib,
    )
    to_input = ClipInput(open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD, device=device)
    per_epoch = steps_per_epoch(config, root=Path(), workers=world_size)
    return Task(
        learner=make_learner(
            config, model, to_input, device, per_epoch=per_epoch, rank=rank, world_size=world_size
        ),
        data=Data(
            samples,
            max_fault_share=config.max_fault_share,
            workers=config.num_workers,
            prefetch=config.prefetch,
        ),
        length=Length(
            num_samples=config.epoch_clips or len(source),
            batch_size=config.batch_size,
            epochs=config.epochs,
        ),
        seed=config.seed,
        evaluations=_evaluations(config, device),
        execution=Execution(
            grad_clip_norm=config.max_grad_norm if config.max_grad_norm > 0 else None
        ),
        keep=config.keep,
        interruption=config.interruption,
        facts=facts,
    )


def make_learner(
    config: Config,
    model: Any,
    to_input: ClipInput,
    device: torch.device,
    *,
    per_epoch: int,
    rank: int,
    world_size: int,
) -> Learner:
    """The model and how a step teaches it: the symmetric cross entropy over all workers' clips."""
    import torch
    from open_clip.loss import ClipLoss

    from ablate.training.arithmetic import make_autocast
    from ablate.training.optim import set_rates
    from ablate.training.task import Backward, Learner, MicroBatch

    several = world_size > 1
    loss = ClipLoss(
        local_loss=several, gather_with_grad=several, cache_labels=True, rank=rank,
        world_size=world_size,
    )  # fmt: skip
    autocast = make_autocast(config.precision, device)
    schedule = make_schedule(config, per_epoch)
    coldest = math.log(1 / config.temp_min)

    class Retriever(Learner):
        def __init__(self) -> None:
            self.model = model
            self.optimizer, _ = make_optimizer(config, self.model)

        def rates(self, step: int) -> float:
            return set_rates(self.optimizer, schedule(step))

        def loss(
            self, model: torch.nn.Module, batches: Sequence[MicroBatch], backward: Backward
        ) -> dict[str, torch.Tensor]:
            [(clips, tokens)] = batches
            with autocast():
                found = model(to_input(clips).flatten(0, 1), tokens)
            videos = mean_of_frames(found["image_features"], len(clips))
            value = loss(videos, found["text_features"].float(), found["logit_scale"].float())
            backward(value)
            return {"loss": value.detach()}

        def settle(self) -> dict[str, torch.Tensor]:
            with torch.no_grad():
                model.logit_scale.clamp_(max=coldest)
                return {"logit_scale": model.logit_scale.float().exp()}

    return Retriever()


def specimen(config: Config, *, data: str | None, device: torch.device) -> Specimen:
    """The model with its initial weights in eval mode, and clips to look at it with: `data`, else
    those of val_data. Each clip is a class of its own, which its caption has to find it by.

    Raises:
        DataError: the clips cannot be used.
    """
    import numpy as np
    import torch

    from ablate.training.evaluations.clip_retrieval import CLIPS_PER_BATCH
    from ablate.training.inspection.specimen import Specimen

    model, _ = create_model(config, device)
    judged = Judged(config.model_copy(update={"val_data": data}) if data else config, device)
    clips = judged.clips

    def features(net: Any, rows: npt.NDArray[np.int64]) -> torch.Tensor:
        assert clips is not None
        found = []
        with torch.inference_mode():
            for first in range(0, len(rows), CLIPS_PER_BATCH):
                chosen = rows[first : first + CLIPS_PER_BATCH].tolist()
                views = torch.stack([clips.views_of(row)[0] for row in chosen])
                found.append(judged.encode_clips(net, views).cpu())
        return torch.cat(found).clone()

    def are_found(
        net: Any, values: torch.Tensor, rows: npt.NDArray[np.int64], most: int | None
    ) -> torch.Tensor:
        with torch.inference_mode():
            texts = judged.encode_texts(net, judged.tokens[torch.from_numpy(rows)]).cpu()
        return (texts @ values.T).argmax(dim=1) == torch.arange(len(rows))

    return Specimen(
        model=model.eval(),
        frozen=tuple(name for name, p in model.named_parameters() if not p.requires_grad),
        labels=np.arange(0 if clips is None else len(clips)),
        class_names=() if clips is None else clips.source.texts,
        features=features,
        own={} if clips is None else {"text_to_video": are_found},
    )


class Judged:
    """The held-out clips and texts, and how a model reads them."""

    def __init__(self, config: Config, device: torch.device) -> None:
        import open_clip

        from ablate.training.arithmetic import make_autocast
        from ablate.training.data.frames import ClipInput, PartChoice, ViewCut
        from ablate.training.evaluations.clips import EvalClips

        self._to_input = ClipInput(
            open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD, device=device
        )
        self._autocast = make_autocast(config.precision, device)
        self._device = device
        self.clips: EvalClips | None = None
        if config.val_data is None:
            return
        source = open_captioned(config.val_data)
        self.clips = EvalClips(
            source,
            choice=PartChoice(config.num_frames_test, random=False),
            cut=ViewCut(config.image_res, crops=1),
            cache_gib=config.cache_gib,
        )
        tokenizer, _ = make_tokenizer(config)
        self.tokens = tokenizer(list(source.texts))

    def encode_clips(self, model: Any, views: torch.Tensor) -> torch.Tensor:
        """Features of norm 1 of clips N x T x S x S x 3 bytes, on the device."""
        with self._autocast():
            return encode_clips(model, self._to_input(views.to(self._device)))

    def encode_texts(self, model: Any, tokens: torch.Tensor) -> torch.Tensor:
        """Features of norm 1 of texts, on the device."""
        with self._autocast():
            found: torch.Tensor = model.encode_text(tokens.to(self._device), normalize=True)
        return found.float()


def _evaluations(config: Config, device: torch.device) -> tuple[Evaluation, ...]:
    judged = Judged(config, device)
    if judged.clips is None:
        return ()
    from ablate.training.evaluations.clip_retrieval import ClipRetrieval

    return (
        ClipRetrieval(
            judged.clips,
            tokens=judged.tokens,
            encode_clips=judged.encode_clips,
            encode_texts=judged.encode_texts,
            due=make_due(config.eval_every, config.epochs),
        ),
    )
