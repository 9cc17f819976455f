"""The evaluations that a configuration asks for, and the looks inside the model."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ablate.errors import DataError
from ablate.recipes.openclip import evaluation_fields as specs
from ablate.recipes.openclip.classes import class_folders, refuse_other_labels, zero_shot_classes
from ablate.recipes.openclip.config import Config
from ablate.recipes.openclip.data import open_index
from ablate.recipes.openclip.encode import encode_image, encode_prompts
from ablate.recipes.openclip.plan import zero_shot_runs
from ablate.training.counts import make_due

if TYPE_CHECKING:
    import torch

    from ablate.recipes.openclip.encode import CaptionTokenizer
    from ablate.training.data.image_source import ImageSource
    from ablate.training.data.pairs import ImageTextSamples
    from ablate.training.evaluations.evaluation import Evaluation
    from ablate.training.evaluations.features import Encoder
    from ablate.training.evaluations.health import Look
    from ablate.training.evaluations.images import EvalImages


def make_evaluations(
    config: Config,
    model: Any,
    samples: ImageTextSamples,
    num_samples: int,
    transform: Any,
    tokenizer: CaptionTokenizer,
    device: torch.device,
    to_input: Any,
) -> tuple[Evaluation, ...]:
    """The peer's zero-shot evaluation, those of `evaluations`, and the model's health with any."""
    from ablate.training.evaluations.health import with_health

    found = make_measurements(config, model, transform, tokenizer, device, to_input)
    return with_health(
        found,
        samples,
        num_samples=num_samples,
        seed=config.seed,
        look=_look(config, device, to_input),
        device=device,
        arbiter=found[0] if zero_shot_runs(config) else None,
    )


def make_measurements(
    config: Config,
    model: Any,
    transform: Any,
    tokenizer: CaptionTokenizer,
    device: torch.device,
    to_input: Any,
) -> list[Evaluation]:
    """The peer's zero-shot evaluation and those of `evaluations`: what needs no training data."""
    from ablate.training.data.image_source import captioned_shards
    from ablate.training.evaluations.on_features import read_features
    from ablate.training.evaluations.retrieval import Retrieval
    from ablate.training.evaluations.zero_shot import ZeroShot

    encoder = make_encoder(config, device, to_input)
    open_images = cache(lambda path: open_labelled_images(config, path, model, transform))
    found: list[Evaluation] = []
    if zero_shot_runs(config):
        assert config.imagenet_val is not None
        images = open_images(config.imagenet_val)
        prompts = make_prompts(config.imagenet_val, images)
        due = make_due(config.zeroshot_frequency, config.epochs)
        found.append(ZeroShot(images, prompts, tokenizer=tokenizer, encoder=encoder, due=due))
    found += read_features(
        config.evaluations,
        open_images=open_images,
        default_path=config.imagenet_val,
        encoder=encoder,
        make_due=lambda every: make_due(every, config.epochs),
    )
    for spec in config.evaluations:
        due, path = make_due(spec.every, config.epochs), _data_of(spec, config)
        if isinstance(spec, specs.RetrievalEvaluation):
            pairs = captioned_shards(open_index(path))
            images = _eval_images(config, pairs, model, transform)
            found.append(
                Retrieval(images, tokenizer=tokenizer, encoder=encoder, due=due, label=spec.label)
            )
        elif isinstance(spec, specs.ZeroShotEvaluation):
            images = open_images(path)
            found.append(
                ZeroShot(
                    images,
                    make_prompts(path, images),
                    tokenizer=tokenizer,
                    encoder=encoder,
                    due=due,
                    name=f"zero_shot{spec.label}",
                    measures=spec.measures(),
                    counts=None,
                    clock=f"eval_time_s/zero_shot{spec.label}",
                )
            )
    return found


def _data_of(spec: specs.Evaluation, config: Config) -> str:
    path = spec.path or config.imagenet_val
    assert path is not None, "Config refuses an evaluation without data"
    return path


def make_encoder(config: Config, device: torch.device, to_input: Any) -> Encoder:
    """How evaluations compute features: in the precision of training."""
    from ablate.training.arithmetic import make_autocast
    from ablate.training.evaluations.features import Encoder

    return Encoder(
        encode_image=encode_image,
        encode_text=encode_prompts,
        autocast=make_autocast(config.precision, device),
        to_input=to_input,
        device=device,
    )


def open_labelled_images(config: Config, path: str, model: Any, transform: Any) -> EvalImages:
    """Images of a folder of class folders, or of shards with class numbers."""
    from ablate.training.data.image_source import image_folder, labelled_shards

    if path.endswith(".tar"):
        source = labelled_shards(path)
    else:
        class_folders(Path(path))
        source = image_folder(Path(path))
    return _eval_images(config, source, model, transform)


def _eval_images(config: Config, source: ImageSource, model: Any, transform: Any) -> EvalImages:
    from open_clip.utils import to_2tuple
    from torchvision.transforms import Compose

    from ablate.training.evaluations.images import EvalImages

    # The peer's list ends in: to RGB (done at decoding), to tensor, normalise (both in to_input).
    to_bytes = Compose(transform.transforms[:-3])
    return EvalImages(
        source,
        transform=to_bytes,
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
        if path.endswith(".tar"):
            refuse_other_labels(path, images.labels.tolist())
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
    from ablate.training.arithmetic import make_autocast
    from ablate.training.evaluations.attention import attention_logits

    autocast = make_autocast(config.precision, device)

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

    from ablate.training.arithmetic import make_autocast

    loss: torch.nn.Module = SigLipLoss() if config.siglip else ClipLoss()
    autocast = make_autocast(config.precision, device)

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
