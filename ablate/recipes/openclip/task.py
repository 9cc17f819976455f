"""Everything that a trial trains and evaluates, put together; and a model to look at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ablate.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    from ablate.recipes import Specimen, Task
    from ablate.training.evaluate import Encoder, EvalImages
from ablate.recipes.openclip.classes import zero_shot_classes
from ablate.recipes.openclip.config import Config
from ablate.recipes.openclip.data import (
    least_size,
    lost_samples,
    make_stream,
    make_train_transform,
    num_steps,
    open_train_index,
)
from ablate.recipes.openclip.encode import name_tokenizer
from ablate.recipes.openclip.evaluations import (
    make_encoder,
    make_evaluations,
    make_look_inside,
    make_prompts,
    open_labelled_images,
)
from ablate.recipes.openclip.model import create_model
from ablate.recipes.openclip.plan import measures
from ablate.recipes.openclip.reload import check_load
from ablate.recipes.openclip.step import (
    make_clamp,
    make_forward_backward,
    make_optimizer,
    make_schedule,
)


def build(config: Config, *, rank: int, world_size: int, device: torch.device) -> Task:
    """The model with its initial weights, its data, optimizer, step and evaluations.

    The initial weights are the peer's for the same seed.
    """
    import open_clip
    import torch
    from open_clip.transform import PreprocessCfg

    from ablate.recipes import Task
    from ablate.training import augment, data, optim

    assert config.train_data is not None, "check() refuses a configuration without train_data"
    model, train_transform, eval_transform, facts = create_model(config, device)
    if config.init_from is not None:
        facts["init_from"] |= check_load(config, model, facts["init_from"])
    model.train()

    preprocess = PreprocessCfg(**model.visual.preprocess_cfg)
    tokenizer = open_clip.get_tokenizer(config.model, context_length=config.force_context_length)
    index = open_train_index(config)
    samples = data.ImageTextSamples(
        index,
        transform=make_train_transform(config, preprocess, train_transform),
        tokenizer=tokenizer,
        tokenizer_name=name_tokenizer(tokenizer),
        # A stream reads the shards itself; then only the probe of the health is read from here.
        cache_gib=0.0 if config.data_order == "stream" else config.cache_gib,
        at_least=least_size(config, preprocess.size) if config.fast_jpeg else None,
    )
    if index.faults:
        facts["shard_faults"] = {**index.num_faults, "lost_samples": lost_samples(index)}
    epoch_samples = config.train_num_samples or index.num_samples
    steps = num_steps(config, workers=world_size, num_samples=epoch_samples)
    steps_per_epoch = steps // config.epochs
    optimizer, groups = make_optimizer(config, model)
    to_input = augment.ToInput(
        preprocess.mean,
        preprocess.std,
        device=device,
        dtype=open_clip.get_input_dtype(config.precision) or torch.float32,
        channels_last=config.channels_last,
    )
    stream = None
    if config.data_order == "stream":
        stream = make_stream(
            config, index, epoch_samples, train_transform, tokenizer, world_size=world_size
        )
    facts["data_order"] = data.STREAMED if stream else data.BY_POSITION
    global_batch = config.batch_size * world_size * config.accum_freq
    return Task(
        model=model,
        samples=samples,
        num_samples=epoch_samples,
        batch_size=config.batch_size,
        accum_freq=config.accum_freq,
        epochs=config.epochs,
        optimizer=optimizer,
        schedule=make_schedule(config, steps_per_epoch),
        forward_backward=make_forward_backward(config, rank, world_size, device, to_input),
        after_step=make_clamp(model),
        scaler=torch.amp.GradScaler(device.type) if config.precision == "amp" else None,
        grad_clip_norm=config.grad_clip_norm,
        sync_batch_norm=config.use_bn_sync,
        compile=config.torchcompile,
        cuda_graphs=config.cuda_graphs,
        static_graph=config.ddp_static_graph,
        evaluations=make_evaluations(
            config, model, samples, epoch_samples, eval_transform, tokenizer, device, to_input
        ),
        seed=config.seed,
        stream=stream,
        loader_workers=config.workers,
        prefetch=config.prefetch,
        pin_memory=config.pin_memory,
        max_fault_share=config.max_fault_share,
        checkpoint_epochs=config.checkpoint_frequency,
        keep_every_epochs=config.keep_every,
        look_inside=make_look_inside(config, model, device, to_input),
        watched=(
            "visual.conv1.weight",
            "visual.attnpool.c_proj.weight",
            "*positional_embedding",
        ),
        warmup=config.warmup,
        global_batch=None if config.siglip else global_batch,
        feature_dim=model.visual.output_dim,
        parameter_groups=optim.describe(groups),
        facts=facts,
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

    from ablate.recipes import Specimen
    from ablate.training import augment

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

    def features(net: torch.nn.Module, rows: npt.NDArray[np.int64]) -> torch.Tensor:
        assert images is not None
        with torch.inference_mode(), encoder.autocast():
            parts = [
                encoder.images(net, pixels).float().cpu()
                for pixels in images.chosen(rows, encoder.batch_size)
            ]
        return torch.cat(parts).clone()

    zero_shot, names = None, list[str]()
    if path is not None and images is not None:
        try:
            names, _ = zero_shot_classes(path)
            names = names or list(open_clip.IMAGENET_CLASSNAMES)
            prompts = make_prompts(path, images)
            tokenizer = open_clip.get_tokenizer(
                config.model, context_length=config.force_context_length
            )
            zero_shot = _zero_shot_answers(prompts, images, encoder, tokenizer)
        except DataError:
            pass  # without names there is no zero-shot classification, and the rest stands
    return Specimen(
        model=model,
        frozen=frozen,
        labels=images.labels if images is not None else np.zeros(0, np.int64),
        class_names=names,
        features=features,
        zero_shot=zero_shot,
    )


def _zero_shot_answers(
    prompts: Sequence[Sequence[str]], images: EvalImages, encoder: Encoder, tokenizer: Any
) -> Any:
    """Specimen.zero_shot of these images."""
    import numpy as np
    import torch

    from ablate.training.distributed import Gang
    from ablate.training.evaluate import ZeroShot

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
            tokenizer_name=name_tokenizer(tokenizer),
            encoder=encoder,
            due=lambda epoch: True,
        ).classifier(net, Gang(0, 1, 0, 1, encoder.device))
        logits = features @ classifier.float().cpu()
        return logits.argmax(dim=1) == torch.from_numpy(labels)

    return answers
