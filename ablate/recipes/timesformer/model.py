"""The model with its initial weights, its optimizer and its learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ablate.recipes.timesformer.config import Config, patch_size

if TYPE_CHECKING:
    import torch

    from ablate.training.optim import Group
    from ablate.training.weights import LoadReport

_SIZES = {
    "vit_base_patch16_224": {
        "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
        "intermediate_size": 3072,
    },
    "tiny": {
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 256,
    },
}  # fmt: skip


def describe_model(config: Config, classes: int) -> Any:
    """transformers' configuration of the model; without drop path, whose rate it takes for a whole
    number."""
    from transformers import TimesformerConfig

    return TimesformerConfig(
        image_size=config.train_crop_size,
        patch_size=patch_size(config),
        num_frames=config.num_frames,
        attention_type=config.attention_type,
        num_labels=classes,
        **_SIZES[config.model_name],
    )


def create_model(
    config: Config, classes: int, device: torch.device
) -> tuple[torch.nn.Module, dict[str, Any]]:
    """The model in train mode, and facts for the record."""
    import torch

    from ablate.training.data.augment import seed_globals

    seed_globals(config.seed)
    model = make_model(config, classes)
    facts: dict[str, Any] = {}
    if config.init_from is not None:
        from ablate.training.init_from import load_initial

        facts["init_from"] = load_initial(config.init_from, model).to_dict()
    model = model.to(device)
    assert isinstance(model, torch.nn.Module)
    return model.train(), facts


def make_model(config: Config, classes: int) -> Any:
    """A new model with upstream's drop path and temporal branches."""
    import torch
    from transformers import TimesformerForVideoClassification

    described = describe_model(config, classes)
    vars(described)["drop_path_rate"] = config.drop_path_rate  # past its check of types
    model = TimesformerForVideoClassification(described)
    if config.zero_temporal and config.attention_type == "divided_space_time":
        with torch.no_grad():
            for layer in model.timesformer.encoder.layer[1:]:
                layer.temporal_dense.weight.zero_()
                layer.temporal_dense.bias.zero_()
    return model


def make_optimizer(
    config: Config, model: torch.nn.Module
) -> tuple[torch.optim.Optimizer, tuple[Group, ...]]:
    """The optimizer, and its one group: upstream decays all parameters of a transformer."""
    import torch

    from ablate.training.optim import Group

    named = tuple((name, p) for name, p in model.named_parameters() if p.requires_grad)
    group = Group("decay", config.weight_decay, named)
    given = [group.for_optimizer()]
    optimizer: torch.optim.Optimizer
    if config.optimizing_method == "sgd":
        optimizer = torch.optim.SGD(
            given,
            lr=config.base_lr,
            momentum=config.momentum,
            dampening=config.dampening,
            nesterov=config.nesterov,
        )
    else:
        kind = torch.optim.AdamW if config.optimizing_method == "adamw" else torch.optim.Adam
        optimizer = kind(given, lr=config.base_lr, betas=(0.9, 0.999), eps=1e-8)
    return optimizer, (group,)


def make_schedule(config: Config, per_epoch: int) -> Callable[[int], float]:
    """Learning rate of a step (from 0), a function of the epoch and the part of it that is past."""

    def policy(epoch: float) -> float:
        if config.lr_policy == "cosine":
            half = (math.cos(math.pi * epoch / config.max_epoch) + 1) / 2
            return config.cosine_end_lr + (config.base_lr - config.cosine_end_lr) * half
        place = sum(epoch >= start for start in config.steps) - 1
        return config.base_lr * config.lrs[place]

    def rate(step: int) -> float:
        epoch = step / per_epoch
        if epoch >= config.warmup_epochs:
            return policy(epoch)
        top = policy(config.warmup_epochs)
        share = epoch / config.warmup_epochs
        return config.warmup_start_lr + (top - config.warmup_start_lr) * share

    return rate


def sketch(config: Config, classes: int) -> tuple[Mapping[str, Any], int]:
    """What the optimizer decays, and the bytes of one checkpoint, without memory for values."""
    import torch

    from ablate.training.optim import describe, refuse_uneven, state_bytes

    with torch.device("meta"):
        model = make_model(config, classes)
    optimizer, groups = make_optimizer(config, model)
    refuse_uneven(model, groups)
    return describe(groups), state_bytes(model, optimizer)


def describe_start(config: Config, classes: int) -> str | None:
    """What init_from brings, tried on a model without memory; None where nothing is loaded.

    Raises:
        LoadError: the file does not fit the model.
    """
    from ablate.training.init_from import describe_initial, load_initial

    def fit() -> LoadReport:
        import torch

        assert config.init_from is not None
        with torch.device("meta"):
            model = make_model(config, classes)
        return load_initial(config.init_from, model)

    return describe_initial(config.init_from, fit)
