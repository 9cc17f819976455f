"""What does not fit is told from what is broken."""

from __future__ import annotations

import pytest
import torch

from ablate.training import memory


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        torch.AcceleratorError("CUDA error: out of memory"),
        torch.distributed.DistBackendError(
            "NCCL error: unhandled cuda error, NCCL version 2.30.7\nLast error:\n"
            "Failed to CUDA calloc async 608 bytes; Cuda failure 2 'out of memory'"
        ),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError(),
    ],
    ids=lambda error: str(error)[:40],
)
def test_out_of_memory_has_many_names(error: BaseException) -> None:
    """As CUDA, NCCL, cuBLAS, cuDNN, torch's own allocators and Python say it."""
    assert memory.is_out_of_memory(error)
    assert memory.advise(None, error).startswith("the model does not fit in memory: ")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("Connection closed by peer [10.0.0.2]:40312"),
        torch.distributed.DistBackendError("NCCL error: remote process exited or network error"),
        ValueError("out of memory is a topic, not an error of the machine"),
    ],
    ids=lambda error: str(error)[:40],
)
def test_other_failures_are_none(error: BaseException) -> None:
    """A lost peer or a broken kernel says nothing about what fits."""
    assert not memory.is_out_of_memory(error)
