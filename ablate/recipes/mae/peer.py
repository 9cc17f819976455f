"""The way back to facebookresearch/mae: its command line, and weights that transformers loads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ablate.recipes.mae.config import PEER, Config
from ablate.training.exported import check_features, fixed_images, record_features

if TYPE_CHECKING:
    import torch

FLAGS = (
    "batch_size",
    "accum_iter",
    "model",
    "input_size",
    "mask_ratio",
    "norm_pix_loss",
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
"""Fields that are flags of main_pretrain.py, by the same name."""
LIKE_THE_PEER: dict[str, Any] = {
    "betas": (0.9, 0.95),
    "crop_scale": (0.2, 1.0),
    "precision": "amp",
    "param_groups": "mae",
    "init": "mae",
    "interruption": None,
}
"""What is no flag of its, with the value that it has in its code."""


def command(config: Config, *, workers: int) -> list[str]:
    """The line of main_pretrain.py, every value resolved; it wants timm 0.3.2 (it asserts that).

    Its epochs have no part of a batch at their end, where ours are filled from their beginning.

    Raises:
        ValueError: the peer cannot do what this asks for.
    """
    for name, value in LIKE_THE_PEER.items():
        if getattr(config, name) != value:
            raise ValueError(
                f"{name} {getattr(config, name)!r} is no flag of {PEER}'s main_pretrain.py, which "
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
    values: dict[str, Any] = {name: getattr(config, name) for name in FLAGS}
    values |= {"data_path": str(data.parent), "warmup_epochs": int(config.warmup_epochs)}
    if config.lr is not None:
        del values["blr"]
    flags = [word for name, value in values.items() for word in _flag(name, value)]
    return ["torchrun", "--nproc_per_node", str(workers), "main_pretrain.py", *flags]


def _flag(name: str, value: Any) -> list[str]:
    if value is None or value is False:
        return []
    return [f"--{name}"] if value is True else [f"--{name}", str(value)]


def export_model(config: Config, weights: Path, folder: Path) -> None:
    """Write `folder` so that ``ViTMAEForPreTraining.from_pretrained(FOLDER)`` loads it.

    `weights` is a checkpoint's model.safetensors.
    """
    import safetensors.torch
    import torch

    from ablate.recipes.mae.model import create_model

    model: Any = create_model(config, torch.device("cpu"))
    model.load_state_dict(safetensors.torch.load_file(weights))
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    record_features(folder, {"image": _probe(model)})


def check_model(folder: str) -> str:
    """Load an exported folder by transformers' public call alone; what was found, in a sentence.

    Raises:
        LoadError: the model does not give the features that were recorded with it.
    """
    from transformers import ViTMAEForPreTraining

    model = ViTMAEForPreTraining.from_pretrained(folder)
    return check_features(Path(folder), {"image": _probe(model)}, loader="transformers")


def _probe(model: Any) -> torch.Tensor:
    """Features of four fixed images, in eval mode; shape (4, width)."""
    import torch

    from ablate.recipes.mae.model import encode

    side = model.config.image_size
    images = fixed_images(4, 3, side, side)
    model.eval()
    with torch.no_grad():
        return encode(model, images)
