"""Optimizer, schedule, forward and backward passes of one step, as open_clip_train has them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
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

    if config.opt == "adamw":
        groups = optim.group_parameters(model, rule=config.param_groups, weight_decay=config.wd)
        optim.refuse_uneven(model, groups)
        assert config.beta1 is not None and config.beta2 is not None and config.eps is not None
        adamw = torch.optim.AdamW(
            [group.for_optimizer() for group in groups],
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            fused=True if config.fused else None,
        )
        return adamw, groups
    from timm.optim import create_optimizer_v2

    options: dict[str, Any] = {}
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


def handed_on(config: Config) -> str:
    """What timm's optimizer is given beside rates, in words."""
    return (
        f"eps {config.eps}, beta1 {config.beta1}, momentum {config.momentum} (handed on as given, "
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


def make_autocast(
    config: Config, device: torch.device
) -> Callable[[], AbstractContextManager[Any]]:
    """A context in which the forward pass runs in the precision asked for."""
    import torch

    dtypes = {"amp": torch.float16, "amp_bf16": torch.bfloat16}
    dtype = dtypes.get(config.precision)
    if dtype is None:
        return nullcontext
    return lambda: torch.autocast(device.type, dtype=dtype)


def make_forward_backward(
    config: Config, rank: int, world_size: int, device: torch.device, to_input: Any
) -> Any:
    """One step's forward and backward passes, as the peer's train_one_epoch."""
    import torch
    from open_clip.loss import ClipLoss, SigLipLoss

    loss: torch.nn.Module
    if config.siglip:
        loss = SigLipLoss(rank=rank, world_size=world_size, dist_impl=config.loss_dist_impl)
    else:
        loss = ClipLoss(
            local_loss=config.local_loss,
            gather_with_grad=config.gather_with_grad,
            cache_labels=True,
            rank=rank,
            world_size=world_size,
        )
    autocast = make_autocast(config, device)
    no_features = ("logit_scale", "logit_bias")

    def total(outputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return torch.as_tensor(sum(loss(**outputs, output_dict=True).values()))

    def forward_backward(
        model: torch.nn.Module,
        batches: Sequence[tuple[torch.Tensor, ...]],
        backward: Callable[[torch.Tensor], None],
    ) -> dict[str, torch.Tensor]:
        inputs = [(to_input(images), texts) for images, texts in batches]
        if len(inputs) == 1:
            images, texts = inputs[0]
            with autocast():
                outputs = model(images, texts)
                value = total(outputs)
            backward(value)
            return _measure(value, outputs)
        # Features of all micro-batches first, without gradient; then each again with it, so that
        # every sample has the whole step's samples as negatives.
        cached: dict[str, list[torch.Tensor]] = {}
        with torch.no_grad():
            for images, texts in inputs:
                with autocast():
                    for name, feature in model(images, texts).items():
                        if name not in no_features:
                            cached.setdefault(name, []).append(feature)
        for j, (images, texts) in enumerate(inputs):
            with autocast():
                outputs = model(images, texts)
                whole = {
                    name: torch.cat([*features[:j], outputs[name], *features[j + 1 :]])
                    for name, features in cached.items()
                }
                for name in no_features:
                    if name in outputs:
                        whole[name] = outputs[name]
                value = total(whole)
            backward(value)
        return _measure(value, outputs)

    return forward_backward


def _measure(loss: torch.Tensor, outputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Scalars of one step, on the device; features are this rank's last micro-batch."""
    import torch

    with torch.no_grad():
        images = outputs["image_features"].float()
        texts = outputs["text_features"].float()
        scale = outputs["logit_scale"].float()
        cosines = images @ texts.T
        diagonal = torch.arange(len(images), device=images.device)
        return {
            "loss": loss.detach(),
            "in_batch_accuracy": (cosines.argmax(dim=1) == diagonal).float().mean(),
            "image_feature_std": _mean_deviation(images),
            "text_feature_std": _mean_deviation(texts),
            "alignment": 2 - 2 * cosines.diagonal().mean(),
            "logits_lse": torch.logsumexp(scale * cosines, dim=1).mean(),
        }


def _mean_deviation(features: torch.Tensor) -> torch.Tensor:
    """Mean over dimensions of the deviation over samples; on CPUs a quarter of std()'s time."""
    apart = features - features.mean(dim=0)
    return apart.square_().sum(dim=0).div_(len(features) - 1).sqrt_().mean()


def make_clamp(model: torch.nn.Module) -> Callable[[], dict[str, torch.Tensor]]:
    """What follows a step: exp(logit_scale) stays within 1 and 100; its value, for the record."""
    import torch

    scale = model.logit_scale
    assert isinstance(scale, torch.Tensor)

    def clamp() -> dict[str, torch.Tensor]:
        with torch.no_grad():
            scale.clamp_(0, math.log(100))
            return {"logit_scale": scale.float().exp()}

    return clamp
