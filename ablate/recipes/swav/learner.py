"""One step: rates, loss with balanced assignments, prototypes and queue after it."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch

from ablate.recipes.swav.config import Config
from ablate.recipes.swav.model import SwAV, encode
from ablate.training.arithmetic import make_autocast
from ablate.training.optim import set_rates
from ablate.training.ranks import Gang, gather_rows
from ablate.training.task import Backward, Learner, MicroBatch

MOMENTUM = 0.9
TRUST = 0.001
"""Both in main_swav.py's code."""


class Swapped(Learner):
    """The model and its optimizer, as main_swav.py steps them."""

    model: SwAV

    def __init__(
        self,
        config: Config,
        model: SwAV,
        *,
        gang: Gang,
        steps_per_epoch: int,
        to_input: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        self.model = model
        self.optimizer = make_optimizer(config, model)
        self._config = config
        self._gang = gang
        self._steps_per_epoch = steps_per_epoch
        self._to_input = to_input
        self._loss = make_loss(config)
        self._own_loss = make_loss(config.model_copy(update={"sinkhorn_scope": "local"}))
        self._autocast = make_autocast(config.precision, gang.device)
        self._step = 0
        self._assigned: torch.Tensor | None = None

    def rates(self, step: int) -> float:
        self._step = step
        return set_rates(self.optimizer, rate_at(self._config, step, self._steps_per_epoch))

    def loss(
        self, model: torch.nn.Module, batches: Sequence[MicroBatch], backward: Backward
    ) -> dict[str, torch.Tensor]:
        [batch] = batches
        config = self._config
        if config.normalize_prototypes:
            self.model.normalise_prototypes()
        with self._autocast():
            projected, scores = model([self._to_input(crop) for crop in batch])
        value = self._swapped(scores.float())
        backward(value)
        for name in self.frozen(self._step):
            self.model.get_parameter(name).grad = None
        size = len(batch[0])
        kept = [projected[size * crop : size * (crop + 1)] for crop in config.crops_for_assign]
        self._assigned = torch.stack(kept).detach()
        return {
            "loss": value.detach(),
            "loss_gap": math.log(config.nmb_prototypes) - value.detach(),
            **measure(kept[0].detach(), scores[:size].detach(), config.temperature),
        }

    def frozen(self, step: int) -> Collection[str]:
        """The prototypes, in the first steps."""
        if step >= self._config.freeze_prototypes_niters:
            return ()
        return [f"prototypes.{name}" for name, _ in self.model.prototypes.named_parameters()]

    def _swapped(self, scores: torch.Tensor) -> torch.Tensor:
        """The loss of scores of all crops, crop after crop."""
        config = self._config
        crops = scores.chunk(len(config.crops))
        high = [crops[number] for number in config.crops_for_assign]
        low = [crop for number, crop in enumerate(crops) if number not in config.crops_for_assign]
        value: torch.Tensor = self._loss(high, low, self._queued())
        return value.sum()

    def _queued(self) -> list[torch.Tensor] | None:
        """Scores of this worker's part of the queue, for each assigned crop."""
        model, gang = self.model, self._gang
        if self._step < self._config.epoch_queue_starts * self._steps_per_epoch:
            return None
        if not model.queue.shape[1] or not model.queue_is_full:
            return None
        each = model.queue.shape[1] // gang.world_size
        mine = model.queue[:, gang.rank * each : (gang.rank + 1) * each]
        with torch.no_grad():
            return list(model.prototypes(mine).float().unbind())

    def settle(self) -> dict[str, torch.Tensor]:
        """The step's features go into the queue, once it is to be used."""
        assert self._assigned is not None
        starts = self._config.epoch_queue_starts * self._steps_per_epoch
        if self.model.queue.shape[1] and self._step >= starts:
            mine, gang = self._assigned.transpose(0, 1), self._gang
            whole = gather_rows(mine, gang.rank * len(mine), gang.world_size * len(mine), gang)
            self.model.enqueue(whole.transpose(0, 1))
        return {}

    def look(
        self, model: torch.nn.Module, batch: tuple[torch.Tensor, ...]
    ) -> dict[str, torch.Tensor]:
        """Loss and features of a batch on its own, without the queue: for the model's health."""
        with self._autocast():
            crops = [self._to_input(crop) for crop in batch]
            projected, scores = model(crops)
            encoder = encode(model, crops[0])
        parts = scores.float().chunk(len(crops))
        high = [parts[number] for number in self._config.crops_for_assign]
        low = [p for n, p in enumerate(parts) if n not in self._config.crops_for_assign]
        return {
            "loss": self._own_loss(high, low).sum(),
            "encoder": encoder,
            "projection": projected[: len(batch[0])],
        }


def measure(
    projected: torch.Tensor, scores: torch.Tensor, temperature: float
) -> dict[str, torch.Tensor]:
    """What one crop of a batch says of collapse: spread of the projections over that of even ones
    (1: even, 0: one point), and the use of prototypes by the predictions."""
    with torch.no_grad():
        mean = (scores.float() / temperature).softmax(dim=1).mean(dim=0)
        entropy = -(mean * mean.clamp_min(1e-12).log()).sum()
        used = torch.zeros(scores.shape[1], device=scores.device)
        used.index_fill_(0, scores.argmax(dim=1), 1.0)
        spread = (projected - projected.mean(dim=0)).square().sum(dim=1).mean().sqrt()
        return {
            "prototype_perplexity": entropy.exp(),
            "prototypes_used": used.sum(),
            "projection_spread": spread,
        }


def make_loss(config: Config) -> torch.nn.Module:
    """lightly's loss; with `global` its Sinkhorn sums over all workers, as the peer's."""
    from lightly.loss.swav_loss import SwaVLoss

    loss: torch.nn.Module = SwaVLoss(
        temperature=config.temperature,
        sinkhorn_iterations=config.sinkhorn_iterations,
        sinkhorn_epsilon=config.epsilon,
        sinkhorn_gather_distributed=config.sinkhorn_scope == "global",
    )
    return loss


def make_optimizer(config: Config, model: torch.nn.Module) -> torch.optim.Optimizer:
    """SGD on all parameters alike, inside of LARC or alone.

    lightly's LARS is apex' LARC without its clipping, as long as everything is decayed.
    """
    from lightly.utils.lars import LARS

    groups: list[dict[str, Any]] = [{"params": list(model.parameters()), "name": "decay"}]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.base_lr, momentum=MOMENTUM, weight_decay=config.wd)
    made: torch.optim.Optimizer = LARS(
        groups,
        lr=config.base_lr,
        momentum=MOMENTUM,
        weight_decay=config.wd,
        trust_coefficient=TRUST,
    )
    return made


def rate_at(config: Config, step: int, steps_per_epoch: int) -> float:
    """Learning rate of a step, from 0: a line that reaches base_lr in the last step of the warmup
    (numpy.linspace), then half a cosine."""
    warm, total = config.warmup_epochs * steps_per_epoch, config.epochs * steps_per_epoch
    if step < warm:
        way = step / (warm - 1) if warm > 1 else 0.0
        return config.start_warmup + (config.base_lr - config.start_warmup) * way
    done = (step - warm) / (total - warm)
    return config.final_lr + 0.5 * (config.base_lr - config.final_lr) * (
        1 + math.cos(math.pi * done)
    )
