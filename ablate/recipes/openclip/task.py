"""Everything that a trial trains and evaluates, put together; and a model to look at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ablate.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    from ablate.recipes.openclip.learner import Clip
    from ablate.training.data.pairs import ImageTextSamples
    from ablate.training.evaluations.features import Encoder
    from ablate.training.evaluations.images import EvalImages
    from ablate.training.inspection.specimen import Specimen
    from ablate.training.task import Data, Execution, Length, Task
    from ablate.trial.session import Ending, Session
from ablate.recipes.openclip.classes import zero_shot_classes
from ablate.recipes.openclip.config import Config
from ablate.recipes.openclip.data import (
    least_size,
    lost_samples,
    make_train_transform,
    num_steps,
    open_train_index,
)
from ablate.recipes.openclip.encode import CaptionTokenizer, make_tokenizer
from ablate.recipes.openclip.evaluations import (
    make_encoder,
    make_evaluations,
    make_look_inside,
    make_prompts,
    open_labelled_images,
)
from ablate.recipes.openclip.known_faults import READING
from ablate.recipes.openclip.model import create_model
from ablate.recipes.openclip.plan import IMAGENET, chance, measures
from ablate.recipes.openclip.reload import check_load
from ablate.recipes.openclip.step import make_schedule


def run(session: Session) -> Ending:
    """One rank of one attempt, from its checkpoint to its end."""
    from ablate.training import ranks
    from ablate.training.fit import fit
    from ablate.training.memory import fitting

    gang = ranks.enter(session)
    config: Config = session.config
    with fitting():
        task = build(config, rank=gang.rank, world_size=gang.world_size, device=gang.device)
    steps = num_steps(config, workers=gang.world_size, num_samples=task.length.num_samples)
    batch = config.batch_size * gang.world_size * config.accum_freq
    guess = chance(config, metric=IMAGENET[0].name, root=Path(session.trial["root"]))
    session.about(
        global_batch=None if config.siglip else batch,
        warmup=config.warmup,
        steps_total=steps,
        chance_top1=guess or None,
        feature_dim=int(getattr(task.learner.model.visual, "output_dim")),  # noqa: B009  # torch types it as a Tensor
    )
    return fit(
        session,
        task,
        gang,
        specimen=lambda: specimen(config, data=None, device=gang.device),
    )


def build(config: Config, *, rank: int, world_size: int, device: torch.device) -> Task:
    """The model with its initial weights, its data, optimizer, step and evaluations.

    The initial weights are the peer's for the same seed.
    """
    import open_clip
    import torch
    from open_clip.transform import PreprocessCfg

    from ablate.recipes.openclip.learner import Clip
    from ablate.training.data import augment
    from ablate.training.task import Task, Watch

    model, train_transform, eval_transform, facts = create_model(config, device)
    if config.init_from is not None:
        facts["init_from"] |= check_load(config, model, facts["init_from"])
    model.train()

    preprocess = PreprocessCfg(**model.visual.preprocess_cfg)
    tokenizer = make_tokenizer(config)
    index = open_train_index(config)
    samples = _open_samples(config, index, preprocess, train_transform, tokenizer)
    facts["tokenizer"] = tokenizer.fingerprint
    facts["reading"] = READING
    if index.faults:
        facts["shard_faults"] = {**index.num_faults, "lost_samples": lost_samples(index)}
    epoch_samples = config.train_num_samples or index.num_samples
    steps = num_steps(config, workers=world_size, num_samples=epoch_samples)
    dtype = open_clip.get_input_dtype(config.precision) or torch.float32
    to_input = augment.ToInput(
        preprocess.mean, preprocess.std, device=device, dtype=dtype,
        channels_last=config.channels_last,
    )  # fmt: skip
    learner = Clip(
        config, model, make_schedule(config, steps // config.epochs),
        rank=rank, world_size=world_size, device=device, to_input=to_input,
    )  # fmt: skip
    return Task(
        learner=learner,
        data=_data(config, samples),
        length=_length(config, epoch_samples),
        seed=config.seed,
        evaluations=make_evaluations(
            config, model, samples, epoch_samples, eval_transform, tokenizer, device, to_input
        ),
        execution=_execution(config, device, learner),
        keep=config.keep,
        interruption=config.interruption,
        watch=Watch(
            moments=_WATCHED, look_inside=make_look_inside(config, model, device, to_input)
        ),
        facts=facts,
    )


def _length(config: Config, epoch_samples: int) -> Length:
    from ablate.training.task import Length

    return Length(
        num_samples=epoch_samples,
        batch_size=config.batch_size,
        accum_freq=config.accum_freq,
        epochs=config.epochs,
    )


def _execution(config: Config, device: torch.device, learner: Clip) -> Execution:
    import torch

    from ablate.training.stable import clip_units
    from ablate.training.task import Execution

    clip: Callable[..., None] | None = learner.zclip
    if config.grad_clip_units is not None:
        clip = partial(clip_units, most=config.grad_clip_units)
    return Execution(
        scaler=torch.amp.GradScaler(device.type) if config.precision == "amp" else None,
        grad_clip_norm=config.grad_clip_norm,
        clip=clip,
        sync_batch_norm=config.use_bn_sync,
        compile=config.torchcompile,
        cuda_graphs=config.cuda_graphs,
        static_graph=config.ddp_static_graph,
    )


def _data(config: Config, samples: ImageTextSamples) -> Data:
    from ablate.training.task import Data

    return Data(
        samples,
        max_fault_share=config.max_fault_share,
        workers=config.workers,
        prefetch=config.prefetch,
        pin_memory=config.pin_memory,
    )


_WATCHED = ("visual.conv1.weight", "visual.attnpool.c_proj.weight", "*positional_embedding")
"""Whose second moments are watched; arXiv 2304.13013 saw them lag in the first layer."""


def _open_samples(
    config: Config, index: Any, preprocess: Any, transform: Any, tokenizer: CaptionTokenizer
) -> ImageTextSamples:
    from ablate.training.data.pairs import ImageTextSamples

    return ImageTextSamples(
        index,
        transform=make_train_transform(config, preprocess, transform),
        tokenizer=tokenizer,
        words=tokenizer.fingerprint if tokenizer.hugging_face else "",
        cache_gib=config.cache_gib,
        at_least=least_size(config, preprocess.size) if config.fast_jpeg else None,
    )


def specimen(config: Config, *, data: str | None, device: torch.device) -> Specimen:
    """The model with its initial weights in eval mode, and labelled images to look at it with.

    The images are `data` (a folder of class folders, or shards with class numbers), else those
    of imagenet_val or of the first evaluation that has any.

    Raises:
        DataError: the images cannot be used.
    """
    import numpy as np
    import open_clip
    import torch
    from open_clip.transform import PreprocessCfg

    from ablate.training.data import augment
    from ablate.training.image_models import make_features
    from ablate.training.inspection.specimen import Specimen

    model, _, transform, _ = create_model(config, device)
    model.eval()
    frozen = tuple(name for name, p in model.named_parameters() if not p.requires_grad)
    path = data or config.imagenet_val
    if path is None:
        labelled = [spec.path for spec in config.evaluations if spec.kind != "retrieval"]
        path = labelled[0] if labelled else None
    preprocess = PreprocessCfg(**model.visual.preprocess_cfg)
    dtype = open_clip.get_input_dtype(config.precision) or torch.float32
    to_input = augment.ToInput(preprocess.mean, preprocess.std, device=device, dtype=dtype)
    encoder = make_encoder(config, device, to_input)
    # The run's own evaluations have filled the cache; a look at a few images of others shall not.
    if data is not None or not measures(config):
        config = config.model_copy(update={"cache_gib": 0.0})
    images = open_labelled_images(config, path, model, transform) if path is not None else None

    own: dict[str, Any] = {}
    lacks: tuple[str, ...] = ()
    names: list[str] = []
    if path is not None and images is not None:
        try:
            names, _ = zero_shot_classes(path)
            names = names or list(open_clip.IMAGENET_CLASSNAMES)
            prompts = make_prompts(path, images)
            answers = _zero_shot_answers(prompts, images, encoder, make_tokenizer(config))
            own = {"zero_shot": answers}
        except DataError:
            lacks = ("zero-shot: the images have no class names and templates",)
    return Specimen(
        model=model,
        frozen=frozen,
        labels=images.labels if images is not None else np.zeros(0, np.int64),
        class_names=names,
        features=make_features(images, encoder),
        own=own,
        lacks=lacks,
    )


def _zero_shot_answers(
    prompts: Sequence[Sequence[str]],
    images: EvalImages,
    encoder: Encoder,
    tokenizer: CaptionTokenizer,
) -> Any:
    """Zero-shot classification of these images, for ``Specimen.own``."""
    import numpy as np
    import torch

    from ablate.training.evaluations.zero_shot import ZeroShot
    from ablate.training.ranks import Gang

    def answers(
        net: torch.nn.Module,
        features: torch.Tensor,
        rows: npt.NDArray[np.int64],
        most_prompts: int | None,
    ) -> torch.Tensor:
        classes, labels = np.unique(images.labels[rows], return_inverse=True)
        count = len(prompts[0])
        if most_prompts is not None:
            count = max(1, min(count, most_prompts // len(classes)))
        picked = np.linspace(0, len(prompts[0]) - 1, count).round().astype(int)
        classifier = ZeroShot(
            images,
            [[prompts[number][place] for place in picked] for number in classes],
            tokenizer=tokenizer,
            encoder=encoder,
            due=lambda epoch: True,
        ).classifier(net, Gang(0, 1, 0, 1, encoder.device))
        logits = features @ classifier.float().cpu()
        return logits.argmax(dim=1) == torch.from_numpy(labels)

    return answers
