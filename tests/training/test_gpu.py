"""What only a GPU can show: fp16 with its scaler, exact resuming there, pinned memory."""

from __future__ import annotations

import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from interruptions import SMALL, after_step, assert_same
from peer_runs import follow
from small_trials import log_of, run, start, write_trial
from test_data import Numbers, batches

from ablate.training.data.batches import load

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("precision", ["fp32", "amp", "amp_bf16"])
def test_one_gpu_follows_the_peer_on_our_batches(
    tmp_path: Path, data: Path, precision: str
) -> None:
    """The peer lets cuDNN choose its kernels by time, we do not: equal within 1e-3."""
    follow(tmp_path, data, 1, {"precision": precision}, gpus=1, tolerance=1e-3)


@pytest.mark.parametrize("precision", ["fp32", "amp", "amp_bf16"])
def test_a_killed_run_on_a_gpu_ends_as_the_whole_one(
    tmp_path: Path, data: Path, precision: str
) -> None:
    """Deterministic kernels: all losses bit-equal, all files equal, also with fp16's scaler."""
    fields = {**SMALL, "precision": precision, "batch_size": 16}
    whole = write_trial(tmp_path / "whole", data, gpus=1, **fields)
    assert run(whole.folder) == [0], log_of(whole)
    trial = write_trial(tmp_path / "trial", data, gpus=1, **fields)
    codes = start(trial.folder, prepare=partial(after_step, 6)).wait_for_a_death()
    assert codes == [-signal.SIGKILL]
    assert run(trial.folder) == [0], log_of(trial)
    assert_same(trial, whole)


def test_a_run_says_what_a_sample_takes(tmp_path: Path, data: Path) -> None:
    """What the report's share of the card's peak is made from; the peak only of a known card."""
    trial = write_trial(tmp_path / "t", data, gpus=1, **SMALL, batch_size=16)
    assert run(trial.folder) == [0], log_of(trial)
    result = trial.result(1)
    assert result is not None and result["flops_per_sample"] > 1e6
    assert (result["peak_flops_per_worker"] or 1e13) >= 1e13


def test_cuda_graphs_launch_what_was_compiled(tmp_path: Path, data: Path) -> None:
    """The losses are those of the compiled model, and inductor skipped no graph."""
    losses = {}
    for graphs in (False, True):
        fields = {**SMALL, "precision": "fp32", "batch_size": 16, "torchcompile": True}
        trial = write_trial(
            tmp_path / str(graphs), data, gpus=1, cuda_graphs=graphs, **fields
        )  # fmt: skip
        codes = run(trial.folder, prepare=_fail_on_a_skipped_graph if graphs else None)
        assert codes == [0], log_of(trial)
        losses[graphs] = [row["loss"] for row in trial.trace()]
    assert losses[True] == pytest.approx(losses[False], rel=1e-5)


def _fail_on_a_skipped_graph() -> None:
    import torch._inductor.config

    torch._inductor.config.triton.cudagraph_or_error = True


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_come_in_pinned_memory(workers: int) -> None:
    """So that the copy to the device can run beside the step."""
    source = batches(Numbers([100]))
    for batch in load(source, start=0, stop=3, workers=workers, prefetch=2, pin_memory=True):
        assert all(tensor.is_pinned() for tensor in batch.tensors)
        assert batch.substitutes == 0 and batch.unusable == ""
