"""The health of a model, measured on a fixed probe of training pairs at evaluations.

The probe is the first 1024 positions of the first epoch, augmented as they were then, so every
evaluation of every cell with the same seed looks at the same pixels. Each rank takes its share;
buffers are put back afterwards and no gradient is touched, so training goes on as if nothing
had happened.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from ablate.markers.rules.batch_norm import BatchNorm
from ablate.training.data.augment import sample_seeds
from ablate.training.data.order import Order, child_seeds, rounds_of
from ablate.training.ranks import Gang, gather_rows, sum_over_ranks

if TYPE_CHECKING:
    from ablate.training.data.samples import Samples
    from ablate.training.evaluations.evaluation import Evaluation

PROBE_SAMPLES = 1024
PROBE_BATCHES = 4
YOUNG_BATCHES = 100
"""Up to here the initial value may weigh in a layer's running statistics."""
LEAST_LOSS = 0.5
"""Losses below this many nat count as this in the relative gap: a gap of nothing is nothing."""

Look = Callable[[nn.Module, tuple[torch.Tensor, ...]], dict[str, torch.Tensor]]
"""(model, batch) -> the batch's loss as ``loss``, and named features (samples x dimensions)."""


class Health:
    """Finite parameters and statistics, BatchNorm drift and gap, effective rank of features.

    ``bn_drift_median``, ``bn_drift_max``
        over layers, of the median over channels of |ln(running variance / fresh variance)|; in
        the first 100 batches the initial value of 1 is taken out of the running variance
    ``bn_initial_share``
        what is left of that initial value, (1 - momentum)^batches; 0 after 100 batches
    ``bn_gap``
        (loss in eval mode - loss in train mode) / max(loss in train mode, 0.5 nat)
    ``recalibrated_top1``
        top-1 by `arbiter` with the statistics of the probe in place of the running ones; only
        where drift or gap are above the marker's limits. Accuracy that comes back says that the
        statistics are at fault, and not the weights
    ``<name>_feature_rank``
        exp of the entropy of the normalised singular values of the centred features
        (RankMe, arXiv 2210.02885); only with at least 1024 of them
    ``params_non_finite``, ``bn_non_finite``
        counts
    """

    name = "health"

    def __init__(
        self,
        samples: Samples,
        *,
        num_samples: int,
        seed: int,
        look: Look,
        due: Callable[[int], bool],
        device: torch.device,
        arbiter: Evaluation | None = None,
    ) -> None:
        self._arbiter = arbiter
        self._samples = samples
        self._size = min(PROBE_SAMPLES, num_samples)
        self._seed = seed
        self._look = look
        self.due = due
        self._device = device
        self._batches: list[tuple[torch.Tensor, ...]] | None = None

    def run(self, model: nn.Module, gang: Gang) -> dict[str, float]:
        """The measurements above, equal on all ranks; the model is and stays in eval mode."""
        if self._batches is None:
            self._batches = list(self._share(gang))
        measured = {"params_non_finite": _count_non_finite(list(model.parameters()))}
        norms = batch_norms(model)
        with torch.no_grad():
            eval_loss, features = self._pass(model, self._batches, gang)
            measured.update(_ranks(features, gang))
            if norms:
                tracked = [
                    (norm.running_mean, norm.running_var)
                    for norm in norms
                    if norm.running_mean is not None and norm.running_var is not None
                ]
                initial = [_initial_share(norm) for norm in norms if norm.running_var is not None]
                measured["bn_initial_share"] = max(initial, default=0.0)
                measured["bn_non_finite"] = _count_non_finite(
                    [buffer for pair in tracked for buffer in pair]
                )
                running = [
                    _without_initial(variance, share)
                    for (_, variance), share in zip(tracked, initial, strict=True)
                ]
                with _fresh_statistics(model, norms):
                    train_loss, _ = self._pass(model, self._batches, gang)
                    for pair in tracked:
                        for buffer in pair:
                            sum_over_ranks(buffer, gang).div_(gang.world_size)
                    drifts = [
                        _drift(old, new) for old, (_, new) in zip(running, tracked, strict=True)
                    ]
                    measured["bn_drift_median"] = float(np.median(drifts))
                    measured["bn_drift_max"] = float(np.max(drifts))
                    gap = (eval_loss - train_loss) / max(train_loss, LEAST_LOSS)
                    measured["bn_gap"] = gap
                    if self._arbiter is not None and _is_off(measured):
                        for norm in norms:
                            norm.training = False
                        again = self._arbiter.run(model, gang)
                        measured["recalibrated_top1"] = next(iter(again.values()))
        return measured

    def _share(self, gang: Gang) -> Iterator[tuple[torch.Tensor, ...]]:
        """This rank's batches; every rank has the same number of the same size."""
        order_key, augmentation_key, _ = child_seeds(self._seed)
        order = Order(self._samples.shard_sizes, key=order_key)
        each = -(-PROBE_BATCHES // gang.world_size)
        size = max(1, self._size // (each * gang.world_size))
        for number in range(gang.rank * each, (gang.rank + 1) * each):
            positions = np.arange(number * size, (number + 1) * size)
            rounds = rounds_of(0, positions, order.size)
            ids = order.ids(rounds, positions)
            tensors, _ = self._samples.batch(ids, sample_seeds(augmentation_key, rounds, ids))
            yield tensors

    def _pass(
        self, model: nn.Module, batches: list[tuple[torch.Tensor, ...]], gang: Gang
    ) -> tuple[float, dict[str, torch.Tensor]]:
        """Mean loss over all ranks' batches, and this rank's features."""
        losses, features = [], []
        for batch in batches:
            seen = self._look(model, tuple(t.to(self._device) for t in batch))
            losses.append(seen.pop("loss").double().reshape(()))
            features.append(seen)
        total = sum_over_ranks(torch.stack(losses).mean(), gang) / gang.world_size
        together = {
            name: torch.cat([each[name].float() for each in features]) for name in features[0]
        }
        return float(total), together


def with_health(
    found: Sequence[Evaluation],
    samples: Samples,
    *,
    num_samples: int,
    seed: int,
    look: Look,
    device: torch.device,
    arbiter: Evaluation | None = None,
) -> tuple[Evaluation, ...]:
    """These evaluations, and the model's health whenever one of them is due."""
    if not found:
        return ()
    health = Health(
        samples,
        num_samples=num_samples,
        seed=seed,
        look=look,
        due=lambda epoch: any(evaluation.due(epoch) for evaluation in found),
        device=device,
        arbiter=arbiter,
    )
    return *found, health


def _count_non_finite(tensors: list[torch.Tensor]) -> float:
    """How many numbers are not finite."""
    # One sum a tensor tells whether it has any; only then are they counted.
    sums = torch.stack([t.detach().sum(dtype=torch.float64) for t in tensors])
    if bool(torch.isfinite(sums).all()):
        return 0.0
    return float(sum(int((~torch.isfinite(t)).sum()) for t in tensors))


def _is_off(measured: dict[str, float]) -> bool:
    """Whether the statistics are so far off that the marker will speak."""
    limits = {
        "bn_drift_median": BatchNorm.drift_median,
        "bn_drift_max": BatchNorm.drift_max,
        "bn_gap": BatchNorm.gap,
    }
    if measured["bn_initial_share"] > BatchNorm.initial:
        del limits["bn_gap"]
    return any(not measured[name] <= limit for name, limit in limits.items())


def _initial_share(norm: nn.modules.batchnorm._BatchNorm) -> float:
    """What is left of the initial value in a layer's young statistics. A layer that has not left
    it after 100 batches does not follow its activations, which is no fault of its age."""
    batches = 0 if norm.num_batches_tracked is None else int(norm.num_batches_tracked)
    if norm.momentum is None or batches > YOUNG_BATCHES:
        return 0.0
    return float((1.0 - norm.momentum) ** batches)


def _without_initial(variance: torch.Tensor, share: float) -> torch.Tensor:
    """The running variance of the batches alone; as it is where there is next to none of them."""
    return (variance - share) / (1.0 - share) if share < 0.99 else variance.clone()


def _drift(running: torch.Tensor, fresh: torch.Tensor) -> float:
    ratio = running.float().clamp_min(1e-12) / fresh.float().clamp_min(1e-12)
    return float(ratio.log().abs().median())


BatchNorms = list[nn.modules.batchnorm._BatchNorm]


def batch_norms(model: nn.Module) -> BatchNorms:
    """The model's BatchNorm layers."""
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


@contextmanager
def averaging(norms: BatchNorms) -> Iterator[None]:
    """Train mode for these layers, with statistics that start anew and average all batches.

    Momenta and modes are put back after, the statistics stay.
    """
    before = [(norm.momentum, norm.training) for norm in norms]
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
            norm.training = True
        yield
    finally:
        for norm, (momentum, training) in zip(norms, before, strict=True):
            norm.momentum = momentum
            norm.training = training


@contextmanager
def _fresh_statistics(model: nn.Module, norms: BatchNorms) -> Iterator[None]:
    """As :func:`averaging`; the statistics are put back, too."""
    buffers = [buffer.clone() for buffer in model.buffers()]
    try:
        with averaging(norms):
            yield
    finally:
        for buffer, value in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(value)


def _ranks(features: dict[str, torch.Tensor], gang: Gang) -> dict[str, float]:
    """Effective rank of each kind of feature over all ranks."""
    measured = {}
    for name, mine in features.items():
        whole = gather_rows(mine, gang.rank * len(mine), gang.world_size * len(mine), gang)
        if len(whole) >= PROBE_SAMPLES:
            measured[f"{name}_rank"] = effective_rank(whole)
    return measured


def effective_rank(features: torch.Tensor) -> float:
    """exp of the entropy of the normalised singular values of centred features."""
    centred = (features - features.mean(dim=0)).double()
    if not bool(torch.isfinite(centred).all()):
        return float("nan")
    # Singular values from the d x d Gram matrix: d is small, samples are many.
    squares = torch.linalg.eigvalsh(centred.T @ centred).clamp_min(0)
    values = squares.sqrt()
    total = values.sum()
    if total == 0:
        return 1.0
    p = values / total
    p = p[p > 0]
    return float(torch.exp(-(p * p.log()).sum()))
