"""One step of pre-training: rates, loss, and what is measured after it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from ablate.recipes.mae.config import Config
from ablate.recipes.mae.groups import count_decayed_vectors, make_optimizer
from ablate.training.arithmetic import make_autocast
from ablate.training.optim import set_rates
from ablate.training.task import Backward, Learner, MicroBatch

NORM_STEPS = 50
"""Steps between two looks at the LayerNorms."""


class MaskedAutoencoder(Learner):
    """The model and its optimizer, as engine_pretrain.py steps them."""

    def __init__(
        self,
        config: Config,
        model: torch.nn.Module,
        *,
        workers: int,
        steps_per_epoch: int,
        to_input: Callable[[torch.Tensor], torch.Tensor],
        device: torch.device,
    ) -> None:
        self.model = model
        self.peak = peak_rate(config, workers=workers)
        self.optimizer = make_optimizer(config, model, lr=self.peak)
        self.decayed_vectors = count_decayed_vectors(self.optimizer.param_groups)
        self._config = config
        self._steps_per_epoch = steps_per_epoch
        self._to_input = to_input
        self._autocast = make_autocast(config.precision, device)
        self._norms = [m.weight for m in model.modules() if isinstance(m, torch.nn.LayerNorm)]
        self._step = 0

    def rates(self, step: int) -> float:
        self._step = step
        epoch = step / self._steps_per_epoch
        return set_rates(self.optimizer, rate_at(self._config, epoch, peak=self.peak))

    def loss(
        self, model: torch.nn.Module, batches: Sequence[MicroBatch], backward: Backward
    ) -> dict[str, torch.Tensor]:
        losses = []
        for (images,) in batches:
            with self._autocast():
                value = model(self._to_input(images)).loss
            backward(value / len(batches))
            losses.append(value.detach().float())
        return {"loss": torch.stack(losses).mean()}

    def settle(self) -> dict[str, torch.Tensor]:
        """Every now and then the smallest root mean square of a LayerNorm's scale: 1 at the start,
        exp(-lr * weight_decay * steps) of it where scales are decayed."""
        if (self._step + 1) % NORM_STEPS:
            return {}
        return {"ln_scale_min": smallest_scale(self._norms)}


def smallest_scale(norms: Sequence[torch.Tensor]) -> torch.Tensor:
    """Smallest root mean square of these scales."""
    with torch.no_grad():
        return torch.stack([w.float().square().mean().sqrt() for w in norms]).min()


def peak_rate(config: Config, *, workers: int) -> float:
    """lr as given, else blr for each 256 samples of a step."""
    if config.lr is not None:
        return config.lr
    return config.blr * config.batch_size * config.accum_iter * workers / 256


def rate_at(config: Config, epoch: float, *, peak: float) -> float:
    """Learning rate at a fractional epoch (util/lr_sched.py): from 0 up, then half a cosine."""
    if epoch < config.warmup_epochs:
        return peak * epoch / config.warmup_epochs
    rest = config.epochs - config.warmup_epochs
    done = (epoch - config.warmup_epochs) / rest if rest else 1.0
    return config.min_lr + (peak - config.min_lr) * 0.5 * (1.0 + math.cos(math.pi * done))
