"""Out of memory, by whatever name it comes, and what to try instead."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from ablate.errors import InfeasibleError

if TYPE_CHECKING:
    from ablate.training.task import Task

_SAID = ("out of memory", "can't allocate memory", "alloc_failed", "allocation_failed")
"""In the messages of torch's CPU allocator, CUDA's runtime, NCCL, cuBLAS and cuDNN, none of which
raises torch.OutOfMemoryError: torch's cache fills the card first, and they ask the driver."""


@contextmanager
def fitting(task: Task | None = None) -> Iterator[None]:
    """Say so where what runs inside does not fit the memory, with what to try.

    Raises:
        InfeasibleError: it did not.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise InfeasibleError(advise(task, error)) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether something did not fit into this machine's memory, or its accelerator's."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    told = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in told for words in _SAID)


def advise(task: Task | None, error: BaseException) -> str:
    """What did not fit, and the batch size to try, where the global batch stays as it is; `task`
    is None where not even the model with its initial weights fitted."""
    said = (str(error) or type(error).__name__).splitlines()[0]
    if task is None:
        return f"the model does not fit in memory: {said}"
    batch, accum = task.length.batch_size, task.length.accum_freq
    given = f"batch_size {batch} with accum_freq {accum} does not fit in memory"
    if batch % 2 == 0:
        given += (
            f"; try batch_size {batch // 2} with accum_freq {accum * 2}: the "
            "loss then sees the same global batch, BatchNorm one of half the size"
        )
    elif batch > 1:
        given += f"; try batch_size {batch // 2}"
    return f"{given}. {said}"
