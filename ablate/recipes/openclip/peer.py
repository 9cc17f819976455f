"""The way back to open_clip_train: its command line, and weights that open_clip loads."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    pass
from ablate.recipes.openclip.config import PEER, Augmentation, Config
from ablate.recipes.openclip.model import register_models
from ablate.recipes.openclip.weights import PROBE_FILE, compute_probe

OWN_FIELDS: Mapping[str, tuple[Any, ...]] = {
    "init_from": (None,),
    "param_groups": ("open_clip",),
    "evaluations": (),
    "fused": (),
    "cuda_graphs": (),
    "channels_last": (),
    "data_order": (),
    "fast_jpeg": (False,),
    "fast_resize": (False,),
    "max_fault_share": (),
    "cache_gib": (),
    "prefetch": (),
    "pin_memory": (),
    "checkpoint_frequency": (),
    "keep_every": (),
}
"""Fields that are no flags of the peer, each with the values under which our run is the peer's;
none: any value, the field has no influence on a sound run, or (fused, channels_last) on its
rounding only, or (data_order) on which of equally good orders is taken."""


def command(config: Config, *, workers: int) -> list[str]:
    """The command that trains this with the peer, every value resolved.

    Raises:
        ValueError: a field of our own makes this run something that the peer cannot do.
    """
    for name, same in OWN_FIELDS.items():
        if same and getattr(config, name) not in same:
            raise ValueError(
                f"{name} {getattr(config, name)!r} has no equal in {PEER}; "
                f"the exported run would differ. Set {name}: {same[0]}"
            )
    arguments: list[str] = []
    for name in Config.model_fields:
        if name not in OWN_FIELDS:
            arguments += _flag(name, getattr(config, name))
    # Without "--" torchrun takes the peer's --logs for an abbreviation of its own --logs-specs.
    launcher = ["torchrun", "--nproc_per_node", str(workers), "-m", "--", "open_clip_train.main"]
    return [*launcher, *arguments]


def _flag(name: str, value: Any) -> list[str]:
    flag = "--" + name.replace("_", "-")
    if value is None or value is False:
        return []
    if value is True:
        return [flag]
    if isinstance(value, Augmentation):
        given = {key: item for key, item in value if item is not None}
        return [flag, *(f"{key}={_compact(item)}" for key, item in given.items())]
    if isinstance(value, tuple):
        return [flag, *(repr(item) for item in value)]
    return [flag, value if isinstance(value, str) else repr(value)]


def _compact(value: Any) -> str:
    return repr(value).replace(" ", "")


def shell(arguments: Sequence[str]) -> str:
    """A command as one line that a POSIX shell reads back unchanged."""
    return shlex.join(arguments)


def export_model(config: Config, weights: Path, folder: Path) -> None:
    """Write `folder` so that open_clip loads it as ``local-dir:FOLDER``.

    `weights` is a checkpoint's model.safetensors. The weights are copied as they are.

    Raises:
        ValueError: the tokenizer is not open_clip's own, so its files cannot be written.
    """
    import shutil

    import open_clip

    register_models()
    model_config = open_clip.get_model_config(config.model)
    if model_config is None:
        raise ValueError(f"open_clip knows no model {config.model!r}")
    if model_config["text_cfg"].get("hf_tokenizer_name"):
        raise ValueError(f"{config.model} has a tokenizer of its own, which is not exported")
    if config.force_image_size is not None:
        model_config["vision_cfg"]["image_size"] = config.force_image_size
    if config.force_context_length is not None:
        model_config["text_cfg"]["context_length"] = config.force_context_length
    if config.force_quick_gelu:
        model_config["quick_gelu"] = True
    if config.force_custom_text:
        model_config["custom_text"] = True
    if config.siglip:
        model_config["init_logit_bias"] = -10
    folder.mkdir(parents=True, exist_ok=True)
    preprocess = {
        "mean": config.image_mean or open_clip.OPENAI_DATASET_MEAN,
        "std": config.image_std or open_clip.OPENAI_DATASET_STD,
        "interpolation": config.image_interpolation or "bicubic",
        "resize_mode": config.image_resize_mode or "shortest",
    }
    content = {"model_cfg": model_config, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(content, indent=2) + "\n")
    shutil.copyfile(weights, folder / "open_clip_model.safetensors")
    model = open_clip.create_model(f"local-dir:{folder}", output_dict=True)
    features = {name: value.tolist() for name, value in compute_probe(model).items()}
    (folder / PROBE_FILE).write_text(json.dumps(features) + "\n")
