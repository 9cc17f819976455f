"""The way back to facebookresearch/mae: its command line, and weights that transformers loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ablate.recipes.mae.config import OF_FINETUNE, PEER, SCRIPTS, Config
from ablate.training.exported import check_features, fixed_images, record_features

if TYPE_CHECKING:
    import torch

COMMON = (
    "batch_size",
    "accum_iter",
    "model",
    "weight_decay",
    "blr",
    "lr",
    "min_lr",
    "epochs",
    "warmup_epochs",
    "data_path",
    "seed",
    "num_workers",
)
FLAGS: dict[str, tuple[str, ...]] = {
    "pretrain": ("input_size", "mask_ratio", "norm_pix_loss"),
    "finetune": ("input_size", *OF_FINETUNE),
    "linprobe": (),
}
"""Fields that are flags of each script beside the common ones, by the same name."""
IN_ITS_CODE: dict[str, dict[str, Any]] = {
    "pretrain": {
        "betas": (0.9, 0.95),
        "crop_scale": (0.2, 1.0),
        "precision": "amp",
        "param_groups": "mae",
        "init": "mae",
        "interruption": None,
    },
    "finetune": {
        "betas": (0.9, 0.999),
        "crop_scale": (0.08, 1.0),
        "precision": "amp",
        "interruption": None,
    },
    "linprobe": {
        "input_size": 224,
        "crop_scale": (0.08, 1.0),
        "precision": "amp",
        "interruption": None,
    },
}
"""What is no flag of a script, with the value that it has in its code."""


def command(config: Config, *, workers: int) -> list[str]:
    """The line of the stage's script, every value resolved; it wants timm 0.3.2 (it asserts that).

    Its epochs have no part of a batch at their end, where ours are filled from their beginning.

    Raises:
        ValueError: the peer cannot do what this asks for.
    """
    script = SCRIPTS[config.stage]
    for name, value in IN_ITS_CODE[config.stage].items():
        if getattr(config, name) != value:
            raise ValueError(
                f"{name} {getattr(config, name)!r} is no flag of {PEER}'s {script}, which "
                f"has {value!r} in its code; the exported run would differ. Set {name}: {value}"
            )
    if config.model == "tiny":
        raise ValueError(f"model tiny is our own; {PEER} has mae_vit_base_patch16 and larger ones")
    if config.warmup_epochs != int(config.warmup_epochs):
        raise ValueError(
            f"warmup_epochs {config.warmup_epochs:g} is no whole number, as {PEER} asks for"
        )
    data = Path(config.data_path or "")
    if data.name != "train":
        raise ValueError(
            f"{PEER} trains on the folder 'train' of --data_path, an image folder; data_path is "
            f"{config.data_path!r}. Name the folder train"
        )
    values: dict[str, Any] = {
        name: getattr(config, name) for name in (*COMMON, *FLAGS[config.stage])
    }
    values |= {"data_path": str(data.parent), "warmup_epochs": int(config.warmup_epochs)}
    if config.lr is not None:
        del values["blr"]
    if config.stage != "pretrain":
        values |= {"model": config.model.removeprefix("mae_"), **_weights(config)}
    flags = [word for name, value in values.items() for word in _flag(name, value)]
    return ["torchrun", "--nproc_per_node", str(workers), script, *flags]


def _weights(config: Config) -> dict[str, Any]:
    """Where a later stage takes its encoder from, as its script reads it: torch.load, ``model``.

    Raises:
        ValueError: a file of another kind.
    """
    source = config.init_from
    if source is None:
        return {}
    if source.path.endswith(".safetensors") or source.key != "model":
        raise ValueError(
            f"init_from {source.path} is no file as {PEER} reads it: a torch file with the encoder "
            "under 'model', in its names (init_from: {path: mae_pretrain_vit_base.pth, key: model})"
        )
    return {"finetune": source.path}


def _flag(name: str, value: Any) -> list[str]:
    if value is None or value is False:
        return []
    return [f"--{name}"] if value is True else [f"--{name}", str(value)]


def export_model(config: Config, weights: Path, folder: Path) -> None:
    """Write `folder` so that ``ViTMAEForPreTraining.from_pretrained(FOLDER)`` loads it, or of the
    later stages ``timm.create_model("local-dir:FOLDER", pretrained=True)``.

    `weights` is a checkpoint's model.safetensors.
    """
    import safetensors.torch
    import torch

    stored = safetensors.torch.load_file(weights)
    if config.stage != "pretrain":
        _export_classifier(config, stored, folder)
        return
    from transformers.utils import logging

    from ablate.recipes.mae.model import create_model

    logging.disable_progress_bar()  # one of its own, for a single file

    model: Any = create_model(config, torch.device("cpu"))
    model.load_state_dict(stored)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    record_features(folder, {"image": _probe(model)})


def _export_classifier(config: Config, stored: dict[str, torch.Tensor], folder: Path) -> None:
    """A plain ViT of timm's: a linear probe's BatchNorm becomes part of its head."""
    import torch
    from timm.models import save_for_hf

    from ablate.recipes.mae import classifier
    from ablate.recipes.mae.model import MEAN, STD

    head = "head.1.bias" if config.stage == "linprobe" else "head.bias"
    alone, classes = config.model_copy(update={"init_from": None}), len(stored[head])
    model, _ = classifier.create_classifier(alone, classes, torch.device("cpu"))
    model.load_state_dict(stored)
    model.eval()
    plain = classifier.make_encoder(config, classes=classes)
    plain.load_state_dict(classifier.without_statistics(model))
    size = (3, config.input_size, config.input_size)
    save_for_hf(
        plain,
        str(folder),
        model_args=classifier.describe_encoder(config),
        data_config={"input_size": size, "mean": MEAN, "std": STD, "crop_pct": 224 / 256},
        safe_serialization=True,
    )
    record_features(folder, {"logits": _logits(model, config.input_size)})


def check_model(folder: str) -> str:
    """Load an exported folder by its library's public call alone; what was found, in a sentence.

    Raises:
        LoadError: the model does not give the features that were recorded with it.
    """
    described = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    if "architecture" in described:
        import timm

        plain = timm.create_model(f"local-dir:{folder}", pretrained=True)
        found = {"logits": _logits(plain, described["pretrained_cfg"]["input_size"][-1])}
        return check_features(Path(folder), found, loader="timm")
    from transformers import ViTMAEForPreTraining

    model = ViTMAEForPreTraining.from_pretrained(folder)
    return check_features(Path(folder), {"image": _probe(model)}, loader="transformers")


def _logits(model: Any, side: int) -> torch.Tensor:
    """Logits of four fixed images, in eval mode, of norm 1; shape (4, classes)."""
    import torch

    model.eval()
    with torch.no_grad():
        logits: torch.Tensor = model(fixed_images(4, 3, side, side))
    return torch.nn.functional.normalize(logits, dim=-1)


def _probe(model: Any) -> torch.Tensor:
    """Features of four fixed images, in eval mode; shape (4, width)."""
    import torch

    from ablate.recipes.mae.model import encode

    side = model.config.image_size
    images = fixed_images(4, 3, side, side)
    model.eval()
    with torch.no_grad():
        return encode(model, images)
