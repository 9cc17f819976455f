"""How often things happen in a run, from its lengths: steps, evaluations.

Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable


def steps_per_epoch(num_samples: int, *, batch_size: int, accum_freq: int, world_size: int) -> int:
    """Optimizer steps of an epoch, as open_clip_train counts with at most one loader process.

    Batches are rounded up (the last is filled from the epoch's beginning), then divided by
    accum_freq and rounded down.
    """
    return math.ceil(num_samples / (batch_size * world_size)) // accum_freq


def make_due(every: int, epochs: int) -> Callable[[int], bool]:
    """After every so many epochs and after the last, as open_clip_train's zeroshot_frequency."""
    return lambda epoch: epoch % every == 0 or epoch == epochs


def count_evaluations(schedules: Iterable[int], *, epochs: int) -> int:
    """Epochs after which something is evaluated; of each evaluation, every how many epochs."""
    due = [make_due(every, epochs) for every in schedules]
    return sum(any(is_due(epoch) for is_due in due) for epoch in range(1, epochs + 1))
