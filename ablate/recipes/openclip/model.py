"""The model with its initial weights, as open_clip_train makes it."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

from ablate.recipes.openclip.config import Config
from ablate.recipes.openclip.weights import load_initial_weights


def create_model(config: Config, device: torch.device) -> tuple[Any, Any, Any, dict[str, Any]]:
    """The model with its initial weights and frozen parts, both transforms, facts."""
    import warnings

    import open_clip
    import torch

    register_models()
    _seed_everything(config.seed)
    with warnings.catch_warnings(), _called(config.model, qk_norm=config.qk_norm) as name:
        # It also comes for colour jitter that is applied; Augmentation refuses what is not.
        warnings.filterwarnings("ignore", "Unused augmentation cfg items")
        model, train_transform, eval_transform = open_clip.create_model_and_transforms(
            name,
            precision=config.precision,
            device=device,
            image_mean=config.image_mean,
            image_std=config.image_std,
            image_interpolation=config.image_interpolation,
            image_resize_mode=config.image_resize_mode,
            aug_cfg=_augmentation(config),
            **_architecture(config),
        )
    facts: dict[str, Any] = {}
    if config.init_from is not None:
        facts["init_from"] = load_initial_weights(config, model)
    _lock(model, _locks(config))
    if config.grad_checkpointing:
        model.set_grad_checkpointing()
    if config.channels_last:
        model.to(memory_format=torch.channels_last)
    return model, train_transform, eval_transform, facts


def sketch_model(config: Config) -> torch.nn.Module:
    """The model's parameters, frozen ones too, without memory for their values."""
    options = {"precision": config.precision, **_architecture(config)}
    locks = tuple(_locks(config).items())
    return _sketch(config.model, config.qk_norm, tuple(options.items()), locks)


def describe_model(name: str, *, qk_norm: bool) -> dict[str, Any]:
    """open_clip's description of a model by name, with QK-norm in both transformers if asked.

    Raises:
        ValueError: open_clip knows no such model.
    """
    import open_clip

    register_models()
    found: dict[str, Any] | None = open_clip.get_model_config(name)
    if found is None:
        raise ValueError(f"open_clip knows no model {name!r}")
    if qk_norm:
        for tower in ("vision_cfg", "text_cfg"):
            found[tower]["qk_norm"] = True
    return found


@contextmanager
def _called(name: str, *, qk_norm: bool) -> Iterator[str]:
    """The model as open_clip is asked for it: by name, or by a description that says more.

    What the description says cannot be an argument: one for a whole tower undoes force_image_size
    and the like.
    """
    if not qk_norm:
        yield name
        return
    with TemporaryDirectory() as folder:
        content = {"model_cfg": describe_model(name, qk_norm=True)}
        file = Path(folder) / "open_clip_config.json"
        file.write_text(json.dumps(content), encoding="utf-8")
        yield f"local-dir:{folder}"


@contextmanager
def no_warnings() -> Iterator[None]:
    """Without open_clip's warning that a model has no pretrained weights, where none are meant."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(disabled)


@lru_cache(maxsize=8)
def _sketch(
    name: str,
    qk_norm: bool,
    options: tuple[tuple[str, Any], ...],
    locks: tuple[tuple[str, Any], ...],
) -> torch.nn.Module:
    import open_clip
    import torch

    register_models()
    with no_warnings(), torch.device("meta"), _called(name, qk_norm=qk_norm) as asked:
        model: Any = open_clip.create_model(asked, device="meta", **dict(options))
        _lock(model, dict(locks))
    sketched: torch.nn.Module = model
    return sketched


def _architecture(config: Config) -> dict[str, Any]:
    """What decides which parameters a model of that name has, as open_clip's arguments."""
    start = {"init_logit_scale": math.log(10), "init_logit_bias": -10} if config.siglip else {}
    if config.logit_scale_init is not None:
        start["init_logit_scale"] = math.log(config.logit_scale_init)
    return {
        "force_quick_gelu": config.force_quick_gelu,
        "force_custom_text": config.force_custom_text,
        "force_patch_dropout": config.force_patch_dropout,
        "force_image_size": config.force_image_size,
        "force_context_length": config.force_context_length,
        "output_dict": True,
        **start,
    }


def _locks(config: Config) -> dict[str, Any]:
    return {name: value for name, value in config if name.startswith("lock_")}


def _lock(model: Any, locks: Mapping[str, Any]) -> None:
    if locks["lock_image"]:
        model.lock_image_tower(
            unlocked_groups=locks["lock_image_unlocked_groups"],
            freeze_bn_stats=locks["lock_image_freeze_bn_stats"],
        )
    if locks["lock_text"]:
        model.lock_text_tower(
            unlocked_layers=locks["lock_text_unlocked_layers"],
            freeze_layer_norm=locks["lock_text_freeze_layer_norm"],
        )


def _seed_everything(seed: int) -> None:
    import random

    import numpy as np
    import torch

    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def _augmentation(config: Config) -> dict[str, Any]:
    return {key: item for key, item in config.aug_cfg if item is not None}


def register_models() -> None:
    """Make the models that ship beside this file known to open_clip."""
    import open_clip

    for path in sorted(Path(__file__).parent.glob("*.json")):
        if open_clip.get_model_config(path.stem) is None:
            open_clip.add_model_config(path)
