"""What is decayed: the old helper of timm, and what people write in its place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ablate.recipes.mae.config import Config
from ablate.recipes.mae.model import CLASS_TOKEN

if TYPE_CHECKING:
    import torch


def make_groups(config: Config, model: torch.nn.Module) -> list[dict[str, Any]]:
    """Groups for the optimizer by the rule of `config.param_groups`, with names for the record."""
    from timm.optim import param_groups_weight_decay

    decay = config.weight_decay
    trainable = [p for p in model.parameters() if p.requires_grad]
    if config.param_groups == "none":
        groups: list[dict[str, Any]] = [{"params": trainable, "weight_decay": 0.0}]
    elif config.param_groups == "all":
        groups = [{"params": trainable, "weight_decay": decay}]
    elif config.param_groups == "renamed_positional":
        # The third place was a list of names to skip; since the new name it is a switch, off.
        groups = param_groups_weight_decay(model, decay, ())
    elif config.param_groups == "timm":
        groups = param_groups_weight_decay(model, decay, no_weight_decay_list=(CLASS_TOKEN,))
    else:
        groups = param_groups_weight_decay(model, decay)
    return [{**group, "name": "decay" if group["weight_decay"] else "no_decay"} for group in groups]


def count_decayed_vectors(groups: list[dict[str, Any]]) -> int:
    """Tensors of one dimension (norms and biases) under decay: 0 by the peer's rule."""
    return sum(p.ndim <= 1 for group in groups if group["weight_decay"] for p in group["params"])


def make_optimizer(config: Config, model: torch.nn.Module, *, lr: float) -> torch.optim.Optimizer:
    """AdamW as main_pretrain.py makes it."""
    import torch

    return torch.optim.AdamW(make_groups(config, model), lr=lr, betas=config.betas)
