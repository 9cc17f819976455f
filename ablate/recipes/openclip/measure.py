"""A model that is finished, wherever it comes from, measured as it would be in training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ablate.errors import DataError, LoadError, suggest
from ablate.recipes.openclip.classes import zero_shot_classes
from ablate.recipes.openclip.config import Config
from ablate.recipes.openclip.encode import make_tokenizer
from ablate.recipes.openclip.evaluations import make_measurements
from ablate.recipes.openclip.model import create_model, no_warnings, register_models
from ablate.records.files import find_json
from ablate.training.evaluations.kinds import ON_FEATURES
from ablate.trial.recipe import absolute

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

_ON_FEATURES = tuple(kind.kind_name() for kind in ON_FEATURES)
KINDS = ("zero_shot", *_ON_FEATURES, "retrieval")


def choose_evaluations(
    *, images: str | None, train_images: str | None, pairs: str | None, kinds: Sequence[str]
) -> dict[str, Any]:
    """Fields of a Config that measures on these data.

    `images` are labelled: a folder of class folders, or shards with class numbers; `train_images`
    are those that neighbours and linear probes learn from, else the others of `images`; `pairs`
    are shards of images and captions. Of no `kinds`, all that the data allow.

    Raises:
        ValueError: there is no such kind, or it has no data.
    """
    needs = dict.fromkeys(KINDS[:-1], (images, "labelled images: --images FOLDER"))
    needs["retrieval"] = (pairs, "shards of images and captions: --pairs SHARDS")
    for kind in kinds:
        if kind not in KINDS:
            raise ValueError(f"{kind!r} is no evaluation; {suggest(kind, KINDS)}")
        if needs[kind][0] is None:
            raise ValueError(f"{kind} needs {needs[kind][1]}")
    wanted = list(kinds) or [kind for kind in KINDS if needs[kind][0] is not None]
    if images is not None and not kinds and not _has_names(images):
        wanted.remove("zero_shot")
    learned = {"train_path": train_images} if train_images is not None else {}
    data: dict[str, dict[str, Any]] = {
        "zero_shot": {"path": images},
        **{kind: {"path": images, **learned} for kind in _ON_FEATURES},
        "retrieval": {"path": pairs},
    }
    evaluations = [{"kind": kind, **data[kind]} for kind in wanted]
    return {"imagenet_val": None, "evaluations": evaluations}


def _has_names(images: str) -> bool:
    try:
        zero_shot_classes(images)
    except DataError:
        return False
    return True


def evaluate(
    source: str, config: Config | None = None, *, fields: Mapping[str, Any]
) -> dict[str, float]:
    """Measurements of a model on the data that `config` and `fields` name (absolute paths).

    `source` is a trial's folder, one of its checkpoints, a checkpoint of open_clip (.pt) or a
    .safetensors file, a folder that open_clip loads as local-dir, or one of open_clip's models
    with pretrained weights, NAME/TAG. What is measured, and in which precision, is `config`'s,
    `fields` going before it; a trial's own configuration where none is given.

    Raises:
        LoadError: the model cannot be loaded, or its architecture is not known.
        DataError: the data cannot be used, or nothing is asked.
    """
    import open_clip
    import torch
    from open_clip.transform import PreprocessCfg

    from ablate.training.data.augment import ToInput
    from ablate.training.ranks import Gang

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config, model, transform = _open_model(source, config, fields, device)
    model.eval()
    preprocess = PreprocessCfg(**model.visual.preprocess_cfg)
    dtype = open_clip.get_input_dtype(config.precision) or torch.float32
    to_input = ToInput(preprocess.mean, preprocess.std, device=device, dtype=dtype)
    measurements = make_measurements(
        config, model, transform, make_tokenizer(config), device, to_input
    )
    if not measurements:
        raise DataError(
            "nothing is to be measured. Give labelled images (--images FOLDER), pairs (--pairs "
            "SHARDS), or a setting that evaluates (--like config.yaml)"
        )
    gang = Gang(rank=0, world_size=1, local_rank=0, local_world_size=1, device=device)
    found: dict[str, float] = {}
    with torch.no_grad():
        for measurement in measurements:
            found |= measurement.run(model, gang)
    return found


def _open_model(
    source: str, config: Config | None, fields: Mapping[str, Any], device: torch.device
) -> tuple[Config, Any, Any]:
    """What to measure with, the model, and its transform for evaluation."""
    register_models()
    weights, own = _find_weights(source)
    known = config or own
    if weights is not None and known is None and "model" not in fields:
        raise LoadError(
            f"{source} holds weights, and not which model they are of. Give the setting that "
            "trained it (--like config.yaml), or the name of the model (--model NAME)"
        )
    settings: dict[str, Any] = {"precision": "fp32"}
    if known is not None:
        settings = known.model_dump()
    settings |= {**fields, "init_from": None, "channels_last": False}
    if weights is None:
        name, tag = _pretrained_name(source)
        model, transform = _open_pretrained(name, tag, settings["precision"], device)
        return Config(**{**settings, "model": name}), model, transform
    chosen = Config(**settings)
    with no_warnings():
        model, _, transform, _ = create_model(chosen, device)
    _load(model, weights)
    return chosen, model, transform


def _find_weights(source: str) -> tuple[Path | None, Config | None]:
    """The file with the weights, and the configuration of the trial that they are of.

    No file for what open_clip finds by itself.
    """
    path = Path(source)
    if path.is_file():
        return path, None
    if (path / "trial.json").is_file():
        steps = sorted((path / "checkpoints").glob("step-*"))
        if not steps:
            raise LoadError(f"{path} has no checkpoint. Give a trial that has trained")
        path = steps[-1]
    if not (path / "manifest.json").is_file():
        return None, None
    content = find_json(path.resolve().parents[1] / "trial.json")
    if content is None or content.get("recipe") != "openclip":
        return path / "model.safetensors", None
    config = Config(**content["config"])
    placed = absolute(config, root=Path(content["root"]))
    return path / "model.safetensors", placed


def _pretrained_name(source: str) -> tuple[str, str | None]:
    """Model and tag as open_clip takes them.

    Raises:
        LoadError: there is no such folder, model or tag; says which there are.
    """
    import open_clip

    if source.startswith("hf-hub:"):
        return source, None
    path = Path(source)
    if (path / "open_clip_config.json").is_file():
        return f"local-dir:{path.resolve()}", None
    if (path / "study.json").is_file():
        raise LoadError(
            f"{source} is a whole study; give one of its trials, {source}/trials/ID, or the model "
            f"that `ablate export {source}` writes, {source}/best/model"
        )
    model, _, tag = source.partition("/")
    tags = open_clip.list_pretrained_tags_by_model(model)
    if path.exists() or not tags:
        raise LoadError(
            f"{source} is no model: neither a checkpoint (.pt, .safetensors, or a trial's), nor a "
            "folder with open_clip_config.json, nor one of open_clip's NAME/TAG, such as "
            "ViT-B-32/openai"
        )
    if tag not in tags:
        raise LoadError(f"{model} has no weights {tag!r}; {suggest(tag, tags)}")
    return model, tag


def _open_pretrained(
    name: str, tag: str | None, precision: str, device: torch.device
) -> tuple[Any, Any]:
    import open_clip

    try:
        model, _, transform = open_clip.create_model_and_transforms(
            name, tag, precision=precision, device=device, output_dict=True,
            require_pretrained=True,
        )  # fmt: skip
    except Exception as error:  # of the hub, of the file, of the architecture
        raise LoadError(
            f"open_clip cannot open {name}{f'/{tag}' if tag else ''}: "
            f"{type(error).__name__}: {str(error).splitlines()[0]}"
        ) from error
    return model, transform


def _load(model: Any, weights: Path) -> None:
    """Load a file strictly; nothing is unpickled.

    Raises:
        LoadError: it is no checkpoint, or of another model.
    """
    import open_clip

    try:
        open_clip.load_checkpoint(model, str(weights), strict=True)
    except Exception as error:  # of torch, safetensors, pickle, the keys
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise LoadError(
            f"{weights} does not load into the model: {' '.join(lines[:3])[:400]}. Give the "
            "setting that trained it with --like, or its name with --model"
        ) from error
