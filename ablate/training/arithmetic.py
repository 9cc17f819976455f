"""Arithmetic that repeats itself, and what a device makes of ``fp32``."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

_AUTOCAST = {"amp": torch.float16, "amp_bf16": torch.bfloat16}


def repeat_itself(device: torch.device) -> None:
    """Have `device` give the same bits for the same inputs; before its first operation.

    On a CPU torch does so as it is. On CUDA cuDNN chooses kernels by time, cuBLAS shares a
    workspace between streams, and scatter, embeddings and memory-efficient attention add up in the
    order in which their blocks end (torch.use_deterministic_algorithms lists them all). An
    operation that has no other way raises RuntimeError and says so.
    """
    if device.type != "cuda":
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
    # As the peer: products of fp32 round their inputs to TF32's 10 bits.
    torch.backends.cuda.matmul.allow_tf32 = True


@contextmanager
def full_float32() -> Iterator[None]:
    """Products of fp32 keep all 24 bits of their inputs on a GPU too: for what is measured, whose
    bounds on rounding are fp32's."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def name_float32(device: torch.device) -> str:
    """What products and convolutions of ``precision: fp32`` are on `device`, for the record."""
    if device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32:
        return "TF32 (inputs of products rounded to 10 bits)"
    return "IEEE fp32"


def name_device(device: torch.device) -> str:
    """The make of `device`, whose kernels its numbers are of: ``NVIDIA H100 80GB HBM3``."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.backends.cpu.get_cpu_capability()})"


def make_autocast(
    precision: str, device: torch.device
) -> Callable[[], AbstractContextManager[Any]]:
    """A context for forward passes: ``amp`` is fp16, ``amp_bf16`` bf16; others change nothing."""
    dtype = _AUTOCAST.get(precision)
    if dtype is None:
        return nullcontext
    return lambda: torch.autocast(device.type, dtype=dtype)


def require_gpus() -> None:
    """Refuse to go on where a trial that asks for GPUs cannot have them.

    Raises:
        RuntimeError: torch is built for another make, sees no GPU and says why, or sees a slice of
            one for each of several ranks.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if torch.version.hip is not None:
        raise RuntimeError(
            "this torch is built for AMD GPUs (ROCm), which were never tried here: devices are "
            "given out by CUDA_VISIBLE_DEVICES and watched by nvidia-smi. Use a build for CUDA"
        )
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if several and visible is not None and visible.startswith("MIG-"):
        raise RuntimeError(
            f"several ranks on slices of GPUs (CUDA_VISIBLE_DEVICES={visible!r}): NCCL connects "
            "whole GPUs only. Set gang.workers: 1, or give whole GPUs"
        )
    if torch.cuda._is_in_bad_fork():
        raise RuntimeError(
            "a module that was imported ahead asked for the GPUs, and a process that is forked "
            "from one that did can use none. Take it off the recipe's PRELOAD"
        )
    why = why_no_gpu()
    if why is not None:
        raise RuntimeError(
            "the trial asks for GPUs, and torch sees none here: "
            f"CUDA_VISIBLE_DEVICES={visible!r}. {why}"
        )


def why_no_gpu() -> str | None:
    """What torch says of a machine whose GPUs it cannot use; None where it can."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            return None
        if torch.version.cuda is None:
            return f"torch {torch.__version__} is built without CUDA"
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:
        said_first = str(error)
    else:
        said_first = str(said[0].message) if said else "torch gives no reason"
    return said_first.splitlines()[0]
