"""The model with its initial weights, and what proves that they are the file's."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ablate.errors import LoadError
from ablate.recipes.video_retrieval.config import Config
from ablate.training.exported import check_features, fixed_images, record_features

if TYPE_CHECKING:
    import torch

    from ablate.training.weights import LoadReport

MODELS = Path(__file__).parent
_OTHER_SEED = 1_234_567_891


def create_model(config: Config, device: torch.device) -> tuple[Any, dict[str, Any]]:
    """The model with its initial weights and frozen parts, and facts for the record.

    Raises:
        LoadError: the weights do not fit, or two loads of them are not one model.
    """
    model = _make(config, seed=config.seed)
    facts: dict[str, Any] = {}
    if config.init_from is not None:
        report = _load(config, model)
        facts["init_from"] = report.to_dict() | _compare_loads(config, model, report)
    _freeze(config, model)
    return model.to(device).train(), facts


def _make(config: Config, *, seed: int, device: str = "cpu") -> Any:
    """A new model; its temperature is the configuration's. On ``meta`` it has no memory."""
    import open_clip
    import torch

    from ablate.training.data.augment import seed_globals

    for path in MODELS.glob("*.json"):
        if open_clip.get_model_config(path.stem) is None:
            open_clip.add_model_config(path)
    seed_globals(seed)
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)  # that no pretrained weights are loaded, where none are meant
    try:
        model: Any = open_clip.create_model(
            config.model,
            device=device,
            force_image_size=config.image_res,
            force_context_length=config.max_txt_l,
            output_dict=True,
        )
    finally:
        logging.disable(disabled)
    with torch.no_grad():
        model.logit_scale.fill_(math.log(1 / config.temp))
    return model


def _load(config: Config, model: Any) -> LoadReport:
    from ablate.training.init_from import load_initial

    assert config.init_from is not None
    report = load_initial(config.init_from, model)
    if not model.logit_scale.is_meta:
        import torch

        with torch.no_grad():  # the temperature is this run's, not the file's
            model.logit_scale.fill_(math.log(1 / config.temp))
    return report


def _compare_loads(config: Config, model: Any, report: LoadReport) -> dict[str, Any]:
    """A second load under another seed: what differs between the two was not in the file.

    Gives the cosines of the two models' features of the same frames and texts, the lowest of four
    each. 1 does not prove a load: missing buffers are initialised alike each time.

    Raises:
        LoadError: the file is to be loaded whole, and the two models are not one.
    """
    import torch

    other = _make(config, seed=_OTHER_SEED)
    _load(config, other)
    ours, theirs = _probe(model), _probe(other)
    cosines = {
        f"reload_cosine_{name}": float(torch.sum(ours[name] * theirs[name], dim=1).min())
        for name in ours
    }
    whole = not (report.at_random or report.unexpected or report.resized)
    if whole and min(cosines.values()) < 0.999:
        raise LoadError(
            f"{report.path} was loaded twice, and the models are not the same: {cosines}"
        )
    return cosines


def _probe(model: Any) -> dict[str, torch.Tensor]:
    """Normalised features of four fixed frames and texts; the model is left in eval mode."""
    import numpy as np
    import torch

    from ablate.training.data.augment import uniforms

    size = model.visual.image_size
    side = size if isinstance(size, int) else size[0]
    numbers = uniforms(np.arange(4, dtype=np.uint64), 3 * side * side)
    frames = torch.from_numpy(numbers.astype(np.float32) * 4 - 2).view(4, 3, side, side)
    texts = torch.arange(4 * model.context_length).view(4, -1) * 997 % 40000 + 1
    texts[:, -1] = model.vocab_size - 1  # the largest number ends a text
    model.eval()
    with torch.no_grad():
        return {
            "video": model.encode_image(frames, normalize=True),
            "text": model.encode_text(texts, normalize=True),
        }


_LAST_OF_VISION = ("visual.attnpool.c_proj.", "visual.proj", "visual.head.")


def _freeze(config: Config, model: Any) -> None:
    """Freeze the towers as asked for; the temperature is always learnt."""
    from open_clip.utils import freeze_batch_norm_2d

    for name, parameter in model.named_parameters():
        if name in ("logit_scale", "logit_bias"):
            continue
        if name.startswith("visual."):
            open_ = config.open_vision_clip_projector and name.startswith(_LAST_OF_VISION)
            parameter.requires_grad = not config.freeze_vision or open_
        else:
            open_ = config.open_text_projection and "text_projection" in name
            parameter.requires_grad = not config.freeze_text or open_
    if config.freeze_vision:
        freeze_batch_norm_2d(model.visual)


def encode_clips(model: Any, clips: torch.Tensor) -> torch.Tensor:
    """Normalised features of clips (N x T x 3 x S x S floats)."""
    return mean_of_frames(model.encode_image(clips.flatten(0, 1), normalize=True), len(clips))


def mean_of_frames(features: torch.Tensor, clips: int) -> torch.Tensor:
    """Normalised features of so many clips from those of their frames, frame after frame."""
    import torch

    means = features.float().reshape(clips, -1, features.shape[-1]).mean(dim=1)
    return torch.nn.functional.normalize(means, dim=-1)


def make_tokenizer(config: Config) -> tuple[Callable[[list[str]], torch.Tensor], str]:
    """The model's tokenizer, and what tells it from others."""
    import open_clip

    tokenizer = open_clip.get_tokenizer(config.model, context_length=config.max_txt_l)
    return tokenizer, f"{type(tokenizer).__name__} {open_clip.__version__} {config.max_txt_l}"


def make_optimizer(config: Config, model: torch.nn.Module) -> tuple[torch.optim.Optimizer, Any]:
    """AdamW, and its groups: tensors of one dimension are not decayed."""
    import torch

    from ablate.training import optim

    groups = optim.group_parameters(model, rule="timm", weight_decay=config.weight_decay)
    optim.refuse_uneven(model, groups)
    return torch.optim.AdamW(
        [group.for_optimizer() for group in groups if group.parameters],
        lr=config.lr,
        betas=config.opt_betas,
    ), groups


def make_schedule(config: Config, per_epoch: int) -> Callable[[int], float]:
    """Learning rate of a step (from 0): linear warm-up, then half a cosine to min_lr_multi."""
    total = per_epoch * config.epochs
    warmup = round(config.warmup_epochs * per_epoch)

    def rate(step: int) -> float:
        if step < warmup:
            return config.lr * (step + 1) / warmup
        share = (step - warmup) / max(1, total - warmup)
        cosine = (math.cos(math.pi * share) + 1) / 2
        return config.lr * (config.min_lr_multi + (1 - config.min_lr_multi) * cosine)

    return rate


def sketch(config: Config) -> tuple[dict[str, Any], int]:
    """What the optimizer decays, and the bytes of one checkpoint, without memory for values."""
    import torch

    from ablate.training.optim import describe, state_bytes

    with torch.device("meta"):
        model = _make(config, seed=0, device="meta")
    _freeze(config, model)
    optimizer, groups = make_optimizer(config, model)
    return describe(groups), state_bytes(model, optimizer)


def describe_start(config: Config) -> str | None:
    """What init_from brings, tried on a model without memory; None where nothing is loaded.

    Raises:
        LoadError: the file does not fit the model.
    """
    from ablate.training.init_from import describe_initial

    def fit() -> LoadReport:
        import torch

        with torch.device("meta"):
            model = _make(config, seed=0, device="meta")
        return _load(config, model)

    return describe_initial(config.init_from, fit)


def export_model(config: Config, weights: Path, folder: Path) -> None:
    """Write `folder` so that open_clip loads it as ``local-dir:FOLDER``.

    Features of a clip are the mean of its frames' normalised features, normalised again.
    """
    import open_clip
    import safetensors.torch

    model = _make(config, seed=0)  # makes models that ship beside this file known
    described = open_clip.get_model_config(config.model)
    if described is None:
        raise ValueError(f"open_clip knows no model {config.model!r}")
    described["vision_cfg"]["image_size"] = config.image_res
    described["text_cfg"]["context_length"] = config.max_txt_l
    preprocess = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
    folder.mkdir(parents=True, exist_ok=True)
    content = {"model_cfg": described, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(content, indent=2) + "\n")
    shutil.copyfile(weights, folder / "open_clip_model.safetensors")
    model.load_state_dict(safetensors.torch.load_file(weights))
    record_features(folder, _features_of(model, config.image_res, config.max_txt_l))


def check_model(folder: str) -> str:
    """Load an exported folder by open_clip's public call alone; what was found, in a sentence.

    Raises:
        LoadError: the model does not give the features that were recorded with it.
    """
    import open_clip

    written = json.loads((Path(folder) / "open_clip_config.json").read_text())["model_cfg"]
    model = open_clip.create_model(f"local-dir:{folder}")
    sizes = (written["vision_cfg"]["image_size"], written["text_cfg"]["context_length"])
    return check_features(Path(folder), _features_of(model, *sizes), loader="open_clip")


def _features_of(model: Any, side: int, length: int) -> dict[str, torch.Tensor]:
    """Normalised features of four fixed frames and texts, in eval mode."""
    import torch

    tokens = torch.zeros(4, length, dtype=torch.long)
    tokens[:, 0] = torch.arange(1, 5)
    model.eval()
    with torch.no_grad():
        image = model.encode_image(fixed_images(4, 3, side, side), normalize=True)
        return {"image": image, "text": model.encode_text(tokens, normalize=True)}
