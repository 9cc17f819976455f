"""The encoder with a head: timm's ViT, as models_vit.py extends it, and its first weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ablate.recipes.mae.config import SIZES, Config

if TYPE_CHECKING:
    import torch

    from ablate.training.weights import LoadReport

ARCHITECTURE = "vit_base_patch16_224"
"""timm's model with the peer's layers; its sizes are given."""
HEAD_STD = {"finetune": 2e-5, "linprobe": 0.01}
"""Deviation of a new head's weights, in the scripts' code."""
NEW = ("fc_norm.*",)
"""Of the encoder, what no pre-training has: the norm after the mean of the patches."""


def create_classifier(
    config: Config, classes: int, device: torch.device
) -> tuple[Any, LoadReport | None]:
    """The model in train mode, with the weights of `init_from` but for its head, and what was
    loaded. On ``meta`` it has no memory.

    Raises:
        LoadError: the weights do not fit.
    """
    import torch

    from ablate.training.data.augment import seed_globals

    seed_globals(config.seed)
    with torch.device(device):
        model: Any = make_encoder(config)
        report = None if config.init_from is None else _load(config, model)
        head = torch.nn.Linear(model.embed_dim, classes)
        if device.type != "meta":
            torch.nn.init.trunc_normal_(head.weight, std=HEAD_STD[config.stage])
            torch.nn.init.zeros_(head.bias)
        model.head, model.num_classes = head, classes
        if config.stage == "linprobe":
            norm = torch.nn.BatchNorm1d(model.embed_dim, affine=False, eps=1e-6)
            model.requires_grad_(False)
            model.head = torch.nn.Sequential(norm, head.requires_grad_(True))
    return model.train(), report


def describe_encoder(config: Config) -> dict[str, Any]:
    """What timm makes the encoder of."""
    patch, width, depth, heads, *_ = SIZES[config.model]
    return {
        "img_size": config.input_size,
        "patch_size": patch,
        "embed_dim": width,
        "depth": depth,
        "num_heads": heads,
        "global_pool": "avg" if config.stage == "finetune" else "token",
    }


def make_encoder(config: Config, *, classes: int = 0) -> torch.nn.Module:
    """timm's model with random weights; without a head unless `classes` are given."""
    import timm

    drop_path = config.drop_path if config.stage == "finetune" else 0.0
    made: torch.nn.Module = timm.create_model(
        ARCHITECTURE, num_classes=classes, drop_path_rate=drop_path, **describe_encoder(config)
    )
    return made


def _load(config: Config, model: torch.nn.Module) -> LoadReport:
    from ablate.training.init_from import load_initial

    assert config.init_from is not None
    pooled = config.stage == "finetune"
    source = config.init_from
    if pooled:
        source = source.model_copy(update={"reset": (*source.reset, *NEW)})
    return load_initial(source, model, convert=lambda stored: encoder_of(stored, pooled=pooled))


NAMES = (
    (r"^vit\.embeddings\.cls_token$", "cls_token"),
    (r"^vit\.embeddings\.position_embeddings$", "pos_embed"),
    (r"^vit\.embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^vit\.layers\.(\d+)\.attention\.o_proj\.", r"blocks.\1.attn.proj."),
    (r"^vit\.layers\.(\d+)\.attention\.([qkv])_proj\.", r"blocks.\1.attn.\2."),
    (r"^vit\.layers\.(\d+)\.layernorm_before\.", r"blocks.\1.norm1."),
    (r"^vit\.layers\.(\d+)\.layernorm_after\.", r"blocks.\1.norm2."),
    (r"^vit\.layers\.(\d+)\.mlp\.", r"blocks.\1.mlp."),
    (r"^vit\.layernorm\.", "norm."),
)
"""transformers' names of a masked autoencoder's encoder, and the peer's, which are timm's."""
DECODER = ("decoder", "mask_token")
"""How names begin that are not of the encoder, in transformers and in models_mae.py."""


def encoder_of(stored: Mapping[str, torch.Tensor], *, pooled: bool) -> dict[str, torch.Tensor]:
    """Tensors of a pre-training in timm's names, without its decoder; queries, keys and values,
    which transformers keeps apart, are one layer. A `pooled` encoder has no last norm."""
    import torch

    found: dict[str, torch.Tensor] = {}
    for name, value in stored.items():
        if name.startswith(DECODER) or name.endswith(".mask_token"):
            continue
        for pattern, replacement in NAMES:
            name = re.sub(pattern, replacement, name)
        if not (pooled and name.startswith("norm.")):
            found[name] = value
    for name in [name for name in found if re.search(r"\.attn\.q\.", name)]:
        parts = [name.replace(".attn.q.", f".attn.{part}.") for part in "qkv"]
        if all(part in found for part in parts):
            joined = torch.cat([found.pop(part) for part in parts])
            found[name.replace(".attn.q.", ".attn.qkv.")] = joined
    return found


def encode(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """What the head sees, of norm 1; N x width."""
    import torch

    seen = model.forward_head(model.forward_features(pixels), pre_logits=True)
    return torch.nn.functional.normalize(seen.float(), dim=1)


def without_statistics(model: Any) -> dict[str, torch.Tensor]:
    """The state dict of a plain ViT that gives what `model` gives in eval mode: a BatchNorm before
    the head becomes part of it."""
    import torch

    if not isinstance(model.head, torch.nn.Sequential):
        return dict(model.state_dict())
    norm: Any
    head: Any
    norm, head = model.head
    scale = (norm.running_var + norm.eps).rsqrt()
    weight = head.weight.detach() * scale
    bias = head.bias.detach() - weight @ norm.running_mean
    kept = {n: v for n, v in model.state_dict().items() if not n.startswith("head.")}
    return {**kept, "head.weight": weight, "head.bias": bias}
