"""Optimizer, schedule and precision of a step, as open_clip_train has them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

from ablate.recipes.openclip.config import Config


def make_optimizer(config: Config, model: torch.nn.Module) -> tuple[torch.optim.Optimizer, Any]:
    """AdamW on our parameter groups, or timm's optimizer of that name; and the groups.

    Raises:
        ValueError: there is no such optimizer, or it refuses its settings; a trainable parameter
            is in no group, or in two.
    """
    import torch

    from ablate.training import optim
    from ablate.training.stable import StableAdamW

    if config.opt == "adamw":
        groups = optim.group_parameters(model, rule=config.param_groups, weight_decay=config.wd)
        optim.refuse_uneven(model, groups)
        assert config.beta1 is not None and config.beta2 is not None and config.eps is not None
        kind = StableAdamW if config.clip_updates else torch.optim.AdamW
        adamw = kind(
            [group.for_optimizer() for group in groups],
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            fused=True if config.fused else None,
        )
        return adamw, groups
    from timm.optim import create_optimizer_v2

    options: dict[str, Any] = dict(config.opt_kwargs)
    if config.beta1 is not None:
        options["betas"] = (config.beta1, config.beta2)
    if config.momentum is not None:
        options["momentum"] = config.momentum
    try:
        optimizer = create_optimizer_v2(
            model,
            config.opt.removeprefix("timm/"),
            lr=config.lr,
            weight_decay=config.wd,
            eps=config.eps,
            **options,
        )
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"opt: {config.opt} cannot be made with {handed_on(config)}: {error}"
        ) from error
    read = optim.read_groups(model, optimizer)
    optim.refuse_uneven(model, read)
    return optimizer, read


def refuse_idle(config: Config, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raise ValueError for a setting that this optimizer of timm takes and leaves unused."""
    if config.opt == "adamw":
        return
    for names, other in (
        (("beta1", "beta2"), {"beta1": 0.123, "beta2": 0.321}),
        (("eps",), {"eps": 0.123}),
        (("momentum",), {"momentum": 0.123}),
    ):
        if getattr(config, names[0]) is None:
            continue
        try:
            changed, _ = make_optimizer(config.model_copy(update=other), model)
        except ValueError:
            continue  # it looks at the setting, and this one is none of its own
        if changed.defaults == optimizer.defaults:
            raise ValueError(
                f"opt: {config.opt} takes no notice of {' and '.join(names)}, so all values are "
                "the same run; leave it out"
            )


def handed_on(config: Config) -> str:
    """What timm's optimizer is given beside rates, in words."""
    return (
        f"eps {config.eps}, beta1 {config.beta1}, momentum {config.momentum}, opt_kwargs "
        f"{config.opt_kwargs} (handed on as given, "
        "as the peer does)"
    )


def make_schedule(config: Config, steps_per_epoch: int) -> Callable[[int], float]:
    """Learning rate of optimizer step `step` (from 0), by the peer's formulas."""
    lr, warmup = config.lr, config.warmup
    steps = steps_per_epoch * config.epochs

    def warm(step: int) -> float:
        return lr * (step + 1) / warmup

    def constant(step: int) -> float:
        return warm(step) if step < warmup else lr

    def cosine(step: int) -> float:
        if step < warmup:
            return warm(step)
        # In the peer's order of operations, so that the rounding is the same too.
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) * lr

    def cooldown(step: int) -> float:
        if step < warmup:
            return warm(step)
        assert config.epochs_cooldown is not None
        start = steps - steps_per_epoch * config.epochs_cooldown
        if step < start:
            return lr
        left = float((1 - (step - start) / (steps - start)) ** config.lr_cooldown_power)
        return left * (lr - config.lr_cooldown_end) + config.lr_cooldown_end

    if config.skip_scheduler:
        return lambda step: lr
    return {"cosine": cosine, "const": constant, "const-cooldown": cooldown}[config.lr_scheduler]
