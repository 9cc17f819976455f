"""One step of fine-tuning or of a linear probe, as engine_finetune.py takes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ablate.recipes.mae.config import Config
from ablate.recipes.mae.learner import peak_rate, rate_at
from ablate.training.arithmetic import make_autocast
from ablate.training.optim import set_rates
from ablate.training.task import Backward, Learner, MicroBatch

TRUST, MOMENTUM = 0.001, 0.9
"""Of LARS, in util/lars.py."""


class Classifier(Learner):
    """The encoder with its head, and their optimizer."""

    def __init__(
        self,
        config: Config,
        model: Any,
        *,
        classes: int,
        workers: int,
        steps_per_epoch: int,
        to_input: Callable[[torch.Tensor], torch.Tensor],
        device: torch.device,
    ) -> None:
        self.model = model
        self.peak = peak_rate(config, workers=workers)
        self.optimizer = make_optimizer(config, model, lr=self.peak)
        self._config = config
        self._steps_per_epoch = steps_per_epoch
        self._to_input = to_input
        self._autocast = make_autocast(config.precision, device)
        self._disturb = make_disturbance(config, classes=classes, device=device)
        tuned = config.stage == "finetune"
        self._loss = torch.nn.CrossEntropyLoss(label_smoothing=config.smoothing if tuned else 0.0)
        self._soft = torch.nn.CrossEntropyLoss()  # smoothing is in the mixed labels

    def rates(self, step: int) -> float:
        epoch = step / self._steps_per_epoch
        return set_rates(self.optimizer, rate_at(self._config, epoch, peak=self.peak))

    def loss(
        self, model: torch.nn.Module, batches: Sequence[MicroBatch], backward: Backward
    ) -> dict[str, torch.Tensor]:
        losses = []
        for images, labels in batches:
            pixels, wanted = self._disturb(self._to_input(images), labels)
            with self._autocast():
                logits = model(pixels)
            measure = self._soft if wanted.is_floating_point() else self._loss
            value = measure(logits.float(), wanted)
            backward(value / len(batches))
            losses.append(value.detach())
        return {"loss": torch.stack(losses).mean()}

    def look(
        self, model: torch.nn.Module, batch: tuple[torch.Tensor, ...]
    ) -> dict[str, torch.Tensor]:
        """Loss and features of a batch as it is, for the model's health."""
        from ablate.recipes.mae.classifier import encode

        images, labels = batch
        pixels = self._to_input(images)
        with self._autocast():
            found = {"encoder": encode(model, pixels)}
            logits = model(pixels)
        return {"loss": self._loss(logits.float(), labels.to(logits.device)), **found}


Disturb = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def make_disturbance(config: Config, *, classes: int, device: torch.device) -> Disturb:
    """Erased rectangles, mixup and CutMix by timm's own, of normalised images on the device.

    They draw from the global generators, which each step seeds.
    """
    if config.stage != "finetune":
        return lambda pixels, labels: (pixels, labels)
    from timm.data import Mixup
    from timm.data.random_erasing import RandomErasing

    erase = RandomErasing(config.reprob, mode="pixel", device=device)
    mix = None
    if config.mixup or config.cutmix:
        mix = Mixup(
            mixup_alpha=config.mixup,
            cutmix_alpha=config.cutmix,
            label_smoothing=config.smoothing,
            num_classes=classes,
        )

    def disturb(pixels: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        erased = erase(pixels) if config.reprob else pixels
        return (erased, labels) if mix is None else mix(erased, labels)

    return disturb


def make_optimizer(config: Config, model: Any, *, lr: float) -> torch.optim.Optimizer:
    """AdamW with a rate for each layer, or LARS of the head alone.

    timm's LARS is util/lars.py's: with weight decay it divides by |gradient| + decay x |weights|
    where that has the norm of their sum.
    """
    from timm.optim import Lars, param_groups_layer_decay

    if config.stage == "linprobe":
        weight, bias = model.head.parameters()
        decay = {"name": "decay", "weight_decay": config.weight_decay, "always_adapt": True}
        named = [{"params": [weight], **decay}, {"params": [bias], "name": "no_decay"}]
        made: torch.optim.Optimizer = Lars(named, lr=lr, momentum=MOMENTUM, trust_coeff=TRUST)
        return made
    groups = param_groups_layer_decay(
        model, 1.0, no_weight_decay_list=model.no_weight_decay(), layer_decay=config.layer_decay
    )
    # Two a layer, from the patches up: first what is not decayed.
    kinds = ("no_decay", "decay")
    return torch.optim.AdamW(
        [
            {
                **group,
                "weight_decay": group["weight_decay"] * config.weight_decay,
                "name": f"layer {number // 2} x{group['lr_scale']:.3g} {kinds[number % 2]}",
            }
            for number, group in enumerate(groups)
        ],
        lr=lr,
        betas=config.betas,
    )
