"""Gradients of embeddings on CPUs: the ranks exchange the rows that a step has touched.

A step's batch holds a few hundred words of a vocabulary of fifty thousand, so nearly all rows of
the embedding's gradient are zeros, which DDP copies and sums all the same: of tiny-rn-a two
thirds of everything that is exchanged. Which rows they are is read from the gradient itself, so
the sum is right however the model uses its weight. A GPU would have to wait for that reading, and
has faster ways between ranks.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from ablate.training.ranks import Gang, sum_over_ranks

LEAST_VALUES = 1 << 19
"""Of a weight: below them, two exchanges cost more than they save."""


def large_embeddings(model: torch.nn.Module, gang: Gang) -> dict[str, torch.nn.Parameter]:
    """Trained weights of embeddings whose gradients :func:`sum_rows` sums, by name."""
    if gang.world_size == 1 or gang.device.type != "cpu":
        return {}
    modules = (module for module in model.modules() if isinstance(module, torch.nn.Embedding))
    weights = {id(module.weight) for module in modules if not module.sparse}
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if id(parameter) in weights
        and parameter.requires_grad
        and parameter.numel() >= LEAST_VALUES
    }


def sum_rows(weights: Iterable[torch.nn.Parameter], gang: Gang) -> None:
    """The mean of every rank's gradient on all of them, in place, as DDP computes it."""
    for weight in weights:
        touched = torch.from_numpy(_touched(weight.grad, len(weight)))
        dist.all_reduce(touched, op=dist.ReduceOp.MAX, group=gang.hosts)
        rows = touched.nonzero().squeeze(1)
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        mean = weight.grad[rows].mul_(1 / gang.world_size)
        weight.grad[rows] = sum_over_ranks(mean, gang)


def _touched(gradient: torch.Tensor | None, count: int) -> npt.NDArray[np.uint8]:
    """1 for each row that is not all zeros, by its bits: quicker than by its numbers."""
    if gradient is None:
        return np.zeros(count, np.uint8)
    rows = gradient.contiguous().view(torch.uint8).numpy()
    words = rows.view(np.uint64) if rows.shape[1] % 8 == 0 else rows
    found: npt.NDArray[np.uint8] = np.bitwise_or.reduce(words, axis=1).astype(bool).view(np.uint8)
    return found
