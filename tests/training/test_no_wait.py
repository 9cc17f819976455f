"""A step hands its measurements over without waiting for the device that computes them.

torch's meta device has no numbers: whatever would read one there (item, tolist, a condition on a
tensor), and so wait for a GPU, raises. What is copied to it must be copied without blocking.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sessions import alone
from small_trials import config
from torch.utils._python_dispatch import TorchDispatchMode

from ablate.recipes import openclip
from ablate.training import loop
from ablate.training.exchange import FLUSH_STEPS, Exchange
from ablate.training.ranks import Gang
from ablate.training.task import Task
from ablate.trial.recipe import absolute


class BlockingCopies(TorchDispatchMode):
    """Names of the operations that copy from the host to the device and wait for it."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.found: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        sources = [item for item in args if isinstance(item, torch.Tensor)]
        copies = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        if copies and result.device == self.device and sources[-1].device.type == "cpu":
            waits = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
            if waits and sources[-1].ndim:  # a scalar travels in the kernel's arguments
                self.found.append(f"{func} {tuple(sources[-1].shape)}")
        return result


def build(data: Path, device: torch.device, **changes: Any) -> Task:
    chosen = config(epochs=50, train_num_samples=96, zeroshot_frequency=0, **changes)
    chosen = absolute(chosen, root=data)
    return openclip.build(chosen, rank=0, world_size=1, device=device)


def run_from(
    task: Task, device: torch.device, folder: Path, *, first: int, number: int
) -> loop.Run:
    """A run of `number` steps from `first` (counted from 0) on, none of which ends an epoch."""
    gang = Gang(0, 1, 0, 1, device)
    run = loop.Run(task, gang, alone(folder))
    run.exchange = Exchange(gang, interval=FLUSH_STEPS)
    run.per_epoch, run.progress.step, run.total = 10**6, first, first + number
    return run


@pytest.mark.parametrize(
    ("first", "clip"), [(45, 1.0), pytest.param(195, None, marks=pytest.mark.exhaustive)]
)
def test_no_step_reads_from_the_device(
    tmp_path: Path, data: Path, first: int, clip: float | None
) -> None:
    """Ten steps, those with samples of updates and a look inside among them, read nothing."""
    meta = torch.device("meta")
    task = build(data, meta, grad_clip_norm=clip)
    with BlockingCopies(meta) as copies:
        run = run_from(task, meta, tmp_path, first=first, number=10)
        run.run_steps(task.learner.model)
    assert copies.found == []
    rows = [set(names) for names in run.exchange.waiting]
    assert len(rows) == 10
    assert all({"loss", "grad_norm", "rms/visual.conv1.weight"} < names for names in rows)
    assert any("update_ratio/visual.conv1" in names for names in rows)
    looked = "attention_logits/visual.attnpool"
    assert any(looked in names for names in rows) == (first == 195)


def test_a_reading_step_is_found_out(tmp_path: Path, data: Path) -> None:
    """The same steps with a measurement that is read at once do not pass."""
    meta = torch.device("meta")
    task = build(data, meta)
    loss = task.learner.loss

    def reads(*given: Any) -> dict[str, torch.Tensor]:
        values = loss(*given)
        float(values["loss"])
        return values

    task.learner.loss = reads  # type: ignore[method-assign]
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        run_from(task, meta, tmp_path, first=0, number=1).run_steps(task.learner.model)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "changes",
    [{}, {"precision": "amp_bf16"}, {"precision": "amp", "fused": True}],
    ids=lambda changes: ", ".join(map(str, changes.values())) or "fp32",
)
def test_no_step_waits_for_a_gpu(tmp_path: Path, data: Path, changes: dict[str, Any]) -> None:
    """CUDA itself reports no synchronising call in steps between two copies."""
    device = torch.device("cuda", 0)
    task = build(data, device, **changes)
    # First uses allocate and compile; a run's own tensors are made when it is.
    run_from(task, device, tmp_path, first=0, number=3).run_steps(task.learner.model)
    run = run_from(task, device, tmp_path, first=45, number=10)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run.run_steps(task.learner.model)
    finally:
        torch.cuda.set_sync_debug_mode("default")
