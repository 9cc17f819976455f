"""What torch may do with a device is set before its first operation, or refused with the reason."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ablate.training import arithmetic
from ablate.training.evaluations import scores


@pytest.fixture
def as_before():
    """Put torch's global switches back."""
    strict = torch.are_deterministic_algorithms_enabled()
    tf32 = torch.backends.cuda.matmul.allow_tf32
    yield
    torch.use_deterministic_algorithms(strict)
    torch.backends.cuda.matmul.allow_tf32 = tf32


def test_cuda_is_held_to_algorithms_that_repeat_themselves(
    as_before: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scatter, embeddings, attention and cuBLAS too, not convolutions alone; and fp32 is named for
    what it is there. A CPU is left as it is."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    arithmetic.repeat_itself(cpu)
    assert not torch.are_deterministic_algorithms_enabled()
    arithmetic.repeat_itself(cuda)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert not torch.backends.cudnn.benchmark
    assert arithmetic.name_float32(cuda).startswith("TF32")
    assert arithmetic.name_float32(cpu) == "IEEE fp32"


def test_what_was_never_tried_or_cannot_be_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """AMD's GPUs, and several ranks on slices of one, before NCCL says it in its own words."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1,MIG-2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="slices of GPUs.*gang.workers: 1"):
        arithmetic.require_gpus()
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with pytest.raises(RuntimeError, match="AMD"):
        arithmetic.require_gpus()


def test_a_fork_of_a_process_that_used_the_gpu_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """With what to do, and not as a GPU that is missing."""
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    with pytest.raises(RuntimeError, match="imported ahead.*PRELOAD"):
        arithmetic.require_gpus()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_gpus_that_are_not_there_are_refused_with_torchs_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A driver that is missing, or too old, is not told as a wrong CUDA_VISIBLE_DEVICES alone."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    why = arithmetic.why_no_gpu()
    assert why is not None and "driver" in why
    with pytest.raises(RuntimeError, match="CUDA_VISIBLE_DEVICES='0'. .*driver"):
        arithmetic.require_gpus()


class Products(TorchDispatchMode):
    """Whether each product of matrices may round its inputs to TF32."""

    def __init__(self) -> None:
        super().__init__()
        self.rounded: list[bool] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.rounded.append(torch.backends.cuda.matmul.allow_tf32)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "measure",
    [
        lambda x: scores.knn_correct(x, torch.arange(len(x)) % 2),
        lambda x: scores.linear_correct(x, torch.arange(len(x)) % 2),
        lambda x: scores.recalls(x, x),
    ],
    ids=["neighbours", "linear probe", "recalls"],
)
def test_what_is_measured_is_not_rounded_as_training_is(
    as_before: None, measure: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """Ties are judged by fp32's rounding; training goes on with TF32 as before."""
    torch.backends.cuda.matmul.allow_tf32 = True
    with Products() as products:
        measure(torch.nn.functional.normalize(torch.randn(64, 8), dim=1))
    assert products.rounded and not any(products.rounded)
    assert torch.backends.cuda.matmul.allow_tf32
