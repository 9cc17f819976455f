"""The mission's own model takes a real step here."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from small_trials import run, write_trial

from ablate.training import checkpoint


@pytest.mark.slow
@pytest.mark.parametrize(
    "precision", ["fp32", pytest.param("amp_bf16", marks=pytest.mark.exhaustive)]
)
def test_rn50_takes_a_step_at_full_size(tmp_path: Path, data: Path, precision: str) -> None:
    """RN50 at 224 px: finite measurements, BatchNorm statistics and attention pool move."""
    if "bf16" in precision and torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("convolutions in bf16 take minutes on a processor without AVX-512")
    if "bf16" in precision and os.environ.get("ATEN_CPU_CAPABILITY", "avx512") != "avx512":
        pytest.skip("torch 2.14 packs bf16 for AVX-512 where the processor has it, told or not")
    trial = write_trial(
        tmp_path / "t", data, model="RN50", precision=precision, batch_size=4, accum_freq=1,
        train_num_samples=4, epochs=1, warmup=0, imagenet_val=None,
    )  # fmt: skip
    try:
        assert run(trial.folder) == [0], (trial.folder / "log-0.txt").read_text()
        (row,) = trial.trace()
        assert abs(row["loss"] - math.log(4)) < 1.5
        assert 0 < row["grad_norm"] < 1e3 and 0 < row["rms/visual.conv1.weight"]
        result = trial.result(1)
        assert result is not None and result["status"] == "completed"
        assert result["num_parameters"] == 102_007_137
        assert result["parameter_groups"]["decay"]["tensors"] == 111
        assert result["parameter_groups"]["no_decay"]["tensors"] == 213
        after = safetensors.torch.load_file(
            checkpoint.path_of(trial.folder / "checkpoints", 1) / "model.safetensors"
        )
        statistics = [name for name in after if name.endswith("running_mean")]
        assert len(statistics) == 55
        assert all(bool(after[name].any()) for name in statistics)
        moments = safetensors.torch.load_file(
            checkpoint.path_of(trial.folder / "checkpoints", 1) / "optimizer.safetensors"
        )
        for name in ("visual.attnpool.q_proj.weight", "visual.conv1.weight", "text_projection"):
            assert float(moments[f"{name}/exp_avg"].abs().max()) > 0
        assert all(bool(torch.isfinite(value).all()) for value in after.values())
    finally:
        shutil.rmtree(trial.folder / "checkpoints", ignore_errors=True)
