"""The way back to upstream: its command line, and weights that transformers loads."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ablate.recipes.timesformer.config import UPSTREAM, Config
from ablate.recipes.timesformer.model import describe_model, make_model
from ablate.training.exported import check_features, fixed_images, record_features

if TYPE_CHECKING:
    import torch

FILES = {
    "divided_space_time": "configs/Kinetics/TimeSformer_divST_8x32_224.yaml",
    "joint_space_time": "configs/Kinetics/TimeSformer_jointST_8x32_224.yaml",
    "space_only": "configs/Kinetics/TimeSformer_spaceOnly_8x32_224.yaml",
}
"""Upstream's file for each kind of attention; values of the line go before those in it."""

LIKE_UPSTREAM: dict[str, tuple[Any, ...]] = {
    "frame_order": ("kept",),
    "epoch_clips": (None,),
    "accum_freq": (1,),
    "grad_clip_norm": (None,),
    "precision": ("fp32",),
    "drop_path_rate": (0.1,),
    "zero_temporal": (True,),
    "model_name": ("vit_base_patch16_224",),
    "init_from": (None,),
    "interruption": (None,),
}
"""Fields of our own, with the values under which a run is upstream's."""


def command(config: Config, *, workers: int) -> list[str]:
    """Upstream's line for this configuration, every value resolved.

    Raises:
        ValueError: a field of our own makes this run something that upstream cannot do.
    """
    for name, same in LIKE_UPSTREAM.items():
        if getattr(config, name) not in same:
            raise ValueError(
                f"{name} {getattr(config, name)!r} has no equal in TimeSformer's own trainer; "
                f"set {name}: {same[0]}"
            )
    place = Path(config.train_data or "")
    if place.suffix not in (".csv", ".txt"):
        raise ValueError(
            f"TimeSformer's own trainer reads train.csv and val.csv of 'path label' lines, not "
            f"{config.train_data}; write such lists and give them as train_data and val_data"
        )
    words = ["python", "tools/run_net.py", "--cfg", FILES[config.attention_type]]
    words += ["DATA.PATH_TO_DATA_DIR", str(place.parent), "NUM_GPUS", str(workers)]
    for name, key in UPSTREAM.items():
        words += [key, _word(getattr(config, name))]
    return words


def _word(value: Any) -> str:
    """A value as upstream's configuration reads it from a line: a Python literal."""
    return repr(list(value)) if isinstance(value, tuple) else str(value)


def export_model(config: Config, weights: Path, folder: Path) -> None:
    """Write `folder` so that ``TimesformerForVideoClassification.from_pretrained`` loads it."""
    import safetensors.torch

    tensors = safetensors.torch.load_file(weights)
    classes = len(tensors["classifier.bias"])
    folder.mkdir(parents=True, exist_ok=True)
    described = describe_model(config, classes)
    described.architectures = ["TimesformerForVideoClassification"]
    described.save_pretrained(folder)
    shutil.copyfile(weights, folder / "model.safetensors")
    model = make_model(config, classes)
    model.load_state_dict(tensors)
    record_features(folder, {"logits": _probe(model)})


def check_model(folder: str) -> str:
    """Load an exported folder by transformers' public call alone; what was found, in a sentence.

    Raises:
        LoadError: the model does not give what was recorded with it.
    """
    from transformers import TimesformerForVideoClassification

    model = TimesformerForVideoClassification.from_pretrained(folder)
    return check_features(Path(folder), {"logits": _probe(model)}, loader="transformers")


def _probe(model: Any) -> torch.Tensor:
    """Logits of two fixed clips, in eval mode, normalised; shape (2, classes)."""
    import torch

    known = model.config
    clips = fixed_images(2, known.num_frames, 3, known.image_size, known.image_size)
    model.eval()
    with torch.no_grad():
        logits: torch.Tensor = model(clips).logits
    return torch.nn.functional.normalize(logits, dim=-1)
