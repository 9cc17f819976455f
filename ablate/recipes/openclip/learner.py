"""A CLIP model and one step of it: forward and backward passes as open_clip_train has them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from open_clip.loss import ClipLoss, SigLipLoss
from timm.utils.model_ema import ModelEmaV3

from ablate.recipes.openclip.config import Config
from ablate.recipes.openclip.step import make_optimizer
from ablate.training.arithmetic import make_autocast
from ablate.training.optim import set_rates
from ablate.training.stable import ZClip
from ablate.training.task import Backward, Learner, MicroBatch

_NO_FEATURES = ("logit_scale", "logit_bias")


class Clip(Learner):
    """A CLIP model and one step of it, as the peer's train_one_epoch."""

    def __init__(
        self, config: Config, model: torch.nn.Module, schedule: Callable[[int], float], *,
        rank: int, world_size: int, device: torch.device, to_input: Any,
    ) -> None:  # fmt: skip
        self.model = model
        self.optimizer, _ = make_optimizer(config, model)
        self._schedule = schedule
        self._to_input = to_input
        self._criterion = make_criterion(config, rank=rank, world_size=world_size)
        self._autocast = make_autocast(config.precision, device)
        self._most = math.log(config.logit_scale_max)
        self._step = 0
        self._average = None
        if config.ema_decay is not None:
            self._average = ModelEmaV3(model, decay=config.ema_decay, use_warmup=True)
            self.averaged = self._average.module
        self.zclip = ZClip(config.grad_clip_z, device) if config.grad_clip_z is not None else None

    def rates(self, step: int) -> float:
        self._step = step
        return set_rates(self.optimizer, self._schedule(step))

    def loss(
        self, model: torch.nn.Module, batches: Sequence[MicroBatch], backward: Backward
    ) -> dict[str, torch.Tensor]:
        inputs = [(self._to_input(images), texts) for images, texts in batches]
        if len(inputs) == 1:
            images, texts = inputs[0]
            with self._autocast():
                outputs = model(images, texts)
                value = self._total(outputs)
            backward(value)
            return measure(value, outputs)
        cached = self._features(model, inputs)
        for j, (images, texts) in enumerate(inputs):
            with self._autocast():
                outputs = model(images, texts)
                whole = {
                    name: torch.cat([*features[:j], outputs[name], *features[j + 1 :]])
                    for name, features in cached.items()
                }
                for name in _NO_FEATURES:
                    if name in outputs:
                        whole[name] = outputs[name]
                value = self._total(whole)
            backward(value)
        return measure(value, outputs)

    def settle(self) -> dict[str, torch.Tensor]:
        """exp(logit_scale) stays within 1 and logit_scale_max, and its value is recorded; then the
        average takes up the weights."""
        scale = self.model.logit_scale
        assert isinstance(scale, torch.Tensor)
        with torch.no_grad():
            scale.clamp_(0, self._most)
        if self._average is not None:
            self._average.update(self.model, step=self._step + 1)
        return {"logit_scale": scale.detach().float().exp()}

    def state(self) -> dict[str, torch.Tensor]:
        return {} if self.zclip is None else {"zclip": self.zclip.past}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        if self.zclip is not None:
            past = self.zclip.past
            self.zclip.past = state["zclip"].to(past) if state else torch.zeros_like(past)

    def _features(
        self, model: torch.nn.Module, inputs: Sequence[tuple[torch.Tensor, torch.Tensor]]
    ) -> dict[str, list[torch.Tensor]]:
        """Features of all micro-batches, without gradient: each then goes through again with it,
        so that every sample has the whole step's samples as negatives."""
        cached: dict[str, list[torch.Tensor]] = {}
        with torch.no_grad():
            for images, texts in inputs:
                with self._autocast():
                    for name, feature in model(images, texts).items():
                        if name not in _NO_FEATURES:
                            cached.setdefault(name, []).append(feature)
        return cached

    def _total(self, outputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return torch.as_tensor(sum(self._criterion(**outputs, output_dict=True).values()))


def make_criterion(config: Config, *, rank: int, world_size: int) -> torch.nn.Module:
    """The peer's loss over the features of all ranks."""
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
    return loss


def measure(loss: torch.Tensor, outputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Scalars of one step, on the device; features are this rank's last micro-batch."""
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
