"""The evaluations that a configuration asks for, and the looks inside the model."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ablate.errors import DataError
from ablate.recipes.openclip import evaluation_fields as specs

if TYPE_CHECKING:
    import torch

    from ablate.recipes import Evaluation
    from ablate.training.data import ImageTextSamples
    from ablate.training.evaluate import Encoder, EvalImages, ImageSource, OnFeatures
    from ablate.training.health import Look
from ablate.recipes.openclip.classes import class_folders, zero_shot_classes
from ablate.recipes.openclip.config import Config
from ablate.recipes.openclip.data import open_index
from ablate.recipes.openclip.encode import encode_image, encode_prompts, name_tokenizer
from ablate.recipes.openclip.plan import make_due, zero_shot_runs
from ablate.recipes.openclip.step import make_autocast


def make_evaluations(
    config: Config,
    model: Any,
    samples: ImageTextSamples,
    num_samples: int,
    transform: Any,
    tokenizer: Any,
    device: torch.device,
    to_input: Any,
) -> tuple[Evaluation, ...]:
    """The peer's zero-shot evaluation, those of `evaluations`, and the model's health with any."""
    from ablate.training.evaluate import Retrieval, ZeroShot, captioned_shards
    from ablate.training.health import Health

    encoder = make_encoder(config, device, to_input)
    words = {"tokenizer": tokenizer, "tokenizer_name": name_tokenizer(tokenizer)}
    open_images = cache(lambda path: open_labelled_images(config, path, model, transform))
    found: list[Evaluation] = []
    if zero_shot_runs(config):
        assert config.imagenet_val is not None
        images = open_images(config.imagenet_val)
        prompts = make_prompts(config.imagenet_val, images)
        due = make_due(config.zeroshot_frequency, config.epochs)
        found.append(ZeroShot(images, prompts, encoder=encoder, due=due, **words))
    found += _on_features(config, open_images, encoder)
    for spec in config.evaluations:
        due, path = make_due(spec.every, config.epochs), _data_of(spec, config)
        if isinstance(spec, specs.RetrievalEvaluation):
            pairs = captioned_shards(open_index(path))
            images = _eval_images(config, pairs, model, transform)
            found.append(Retrieval(images, encoder=encoder, due=due, label=spec.label, **words))
        elif isinstance(spec, specs.ZeroShotEvaluation):
            images = open_images(path)
            found.append(
                ZeroShot(
                    images,
                    make_prompts(path, images),
                    encoder=encoder,
                    due=due,
                    name=f"zero_shot{spec.label}",
                    measures=spec.measures(),
                    counts=None,
                    clock=f"eval_time_s/zero_shot{spec.label}",
                    **words,
                )
            )
    if not found:
        return ()
    health = Health(
        samples,
        num_samples=num_samples,
        seed=config.seed,
        look=_look(config, device, to_input),
        due=lambda epoch: any(evaluation.due(epoch) for evaluation in found),
        device=device,
        arbiter=found[0] if zero_shot_runs(config) else None,
    )
    return *found, health


def _data_of(spec: specs.Evaluation, config: Config) -> str:
    path = spec.path or config.imagenet_val
    assert path is not None, "Config refuses an evaluation without data"
    return path


def _on_features(
    config: Config, open_images: Callable[[str], EvalImages], encoder: Encoder
) -> list[OnFeatures]:
    """Neighbours and linear probes: one evaluation for all that have the same schedule."""
    from ablate.training.evaluate import LinearProbe, Neighbours, OnFeatures

    readers: dict[int, list[Neighbours | LinearProbe]] = {}
    for spec in config.evaluations:
        if not isinstance(spec, specs.KnnEvaluation | specs.LinearEvaluation):
            continue
        common: dict[str, Any] = {
            "images": open_images(_data_of(spec, config)),
            "reference": None if spec.train_path is None else open_images(spec.train_path),
            "label": spec.label,
        }
        readers.setdefault(spec.every, []).append(
            Neighbours(**common, neighbours=spec.neighbours, temperature=spec.temperature)
            if isinstance(spec, specs.KnnEvaluation)
            else LinearProbe(**common, penalty=spec.penalty)
        )
    return [
        OnFeatures(readers=tuple(together), encoder=encoder, due=make_due(every, config.epochs))
        for every, together in readers.items()
    ]


def make_encoder(config: Config, device: torch.device, to_input: Any) -> Encoder:
    """How evaluations compute features: in the precision of training."""
    from ablate.training.evaluate import Encoder

    return Encoder(
        encode_image=encode_image,
        encode_text=encode_prompts,
        autocast=make_autocast(config, device),
        to_input=to_input,
        device=device,
        batch_size=config.batch_size,
    )


def open_labelled_images(config: Config, path: str, model: Any, transform: Any) -> EvalImages:
    """Images of a folder of class folders, or of shards with class numbers."""
    from ablate.training import evaluate

    if path.endswith(".tar"):
        source = evaluate.labelled_shards(path)
    else:
        class_folders(Path(path))
        source = evaluate.image_folder(Path(path))
    return _eval_images(config, source, model, transform)


def _eval_images(config: Config, source: ImageSource, model: Any, transform: Any) -> EvalImages:
    from open_clip.utils import to_2tuple
    from torchvision.transforms import Compose

    from ablate.training.evaluate import EvalImages

    # The peer's list ends in: to RGB (done at decoding), to tensor, normalise (both in to_input).
    to_bytes = Compose(transform.transforms[:-3])
    return EvalImages(
        source,
        transform=to_bytes,
        transform_name=repr(to_bytes),
        size=to_2tuple(model.visual.image_size),
        cache_gib=config.cache_gib,
    )


def make_prompts(path: str, images: EvalImages) -> list[list[str]]:
    """The texts of each class: of the data's own names and templates, or ImageNet's.

    Raises:
        DataError: an image's class number has no name.
    """
    import open_clip

    names, templates = zero_shot_classes(path)
    if templates is None:
        prompts = [
            [template(name) for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
            for name in open_clip.IMAGENET_CLASSNAMES
        ]
    else:
        prompts = [[template.format(name) for template in templates] for name in names]
    largest = int(images.labels.max())
    if largest >= len(prompts):
        whose = "ImageNet" if templates is None else "classnames.json"
        raise DataError(f"{path} has class number {largest}, and {whose} names {len(prompts)}")
    return prompts


def make_look_inside(
    config: Config, model: torch.nn.Module, device: torch.device, to_input: Any
) -> Callable[[tuple[torch.Tensor, ...]], dict[str, torch.Tensor]]:
    """Largest attention logits of each layer, on eight samples in eval mode."""
    from ablate.training.attention import attention_logits

    autocast = make_autocast(config, device)

    def look_inside(batch: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
        images, texts = (tensor[:8] for tensor in batch)

        def run() -> None:
            with autocast():
                model(to_input(images), texts)

        model.eval()
        try:
            return attention_logits(model, run)
        finally:
            model.train()

    return look_inside


def _look(config: Config, device: torch.device, to_input: Any) -> Look:
    """Loss and features of a batch on its own, for the health of the model."""
    from open_clip.loss import ClipLoss, SigLipLoss

    loss: torch.nn.Module = SigLipLoss() if config.siglip else ClipLoss()
    autocast = make_autocast(config, device)

    def look(model: Any, batch: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
        images, texts = batch
        with autocast():
            outputs = model(to_input(images), texts)
            value = loss(**outputs)
        return {
            "loss": value,
            "image_feature": outputs["image_features"],
            "text_feature": outputs["text_features"],
        }

    return look
