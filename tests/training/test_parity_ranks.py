"""Two ranks against two ranks of open_clip_train.main 3.3.0, and zero-shot accuracy on both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peer_runs import SMALL, cases, follow, run_peer
from small_trials import draw_classes, run, write_trial

from ablate.records.answers import unpack

pytest.importorskip("open_clip_train")

COOLDOWN = {"lr_scheduler": "const-cooldown", "epochs_cooldown": 1, "lr_cooldown_end": 1e-5}
VIT = {"model": "tiny-test-vit"}

TWO_RANKS: dict[str, dict[str, Any]] = {
    **{
        f"local_loss {local}, gather_with_grad {gather}, accum_freq {accum}": {
            "local_loss": local, "gather_with_grad": gather, "accum_freq": accum,
            # Clipping where the four losses differ in the length of their gradient.
            "grad_clip_norm": 0.5 if accum == 2 else None,
        }
        for local in (False, True)
        for gather in (False, True)
        for accum in (1, 2)
    },
    "const": {"lr_scheduler": "const", "grad_clip_norm": 0.5},
    "cooldown": COOLDOWN,
    "siglip": {"siglip": True},
    "siglip, gathered": {**VIT, "siglip": True, "loss_dist_impl": "gather", "accum_freq": 2},
    "vit": {**VIT, "local_loss": True, "gather_with_grad": True},
    "amp": {"precision": "amp", "batch_size": 4, "train_num_samples": 26 * 8},
    "amp_bf16, accumulated": {"precision": "amp_bf16", "accum_freq": 2, "gather_with_grad": True},
    "pure_bf16": {"precision": "pure_bf16"},
}  # fmt: skip


IN_THE_SUITE = ("local_loss True, gather_with_grad True, accum_freq 1",)
"""Of the ways to share the loss the one that large runs want; the others on demand."""


@pytest.mark.parametrize("changes", cases(TWO_RANKS, IN_THE_SUITE))
def test_two_ranks_follow_the_peer_on_our_batches_with_ddp_for_cpus(
    tmp_path: Path, data: Path, changes: dict[str, Any]
) -> None:
    """The same for two ranks, with all four ways to share the softmax loss."""
    follow(tmp_path, data, 2, changes)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("use_bn_sync", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "amp", "amp_bf16"])
def test_two_gpus_follow_the_peer_on_our_batches(
    tmp_path: Path, data: Path, use_bn_sync: bool, precision: str
) -> None:
    """Over nccl, with BatchNorm statistics of each rank or of both; kernels may differ between the
    two processes (the peer autotunes), so within 1e-3."""
    changes = {"use_bn_sync": use_bn_sync, "precision": precision}
    follow(tmp_path, data, 2, changes, gpus=1, tolerance=1e-3)


def test_torch_has_no_batch_norm_over_cpu_ranks() -> None:
    """Why use_bn_sync is refused without GPUs; the day torch can, this fails and we allow it."""
    with pytest.raises(NotImplementedError, match="batch_norm_stats"):
        torch.batch_norm_stats(torch.ones(2, 3, 4, 4), 1e-5)


@pytest.mark.parametrize(
    "precision", ["fp32", pytest.param("amp_bf16", marks=pytest.mark.exhaustive)]
)
def test_zero_shot_accuracy_is_the_peers_with_our_class_names(
    tmp_path: Path, data: Path, precision: str
) -> None:
    """Top-1 and top-5 of every epoch equal open_clip_train's, which evaluates on one rank."""
    val = draw_classes(tmp_path / "val", "abcdef")  # the peer's top-5 wants five classes
    fields = {
        **SMALL, "imagenet_val": str(val), "train_num_samples": 96, "epochs": 3,
        "zeroshot_frequency": 1, "batch_size": 8, "precision": precision,
    }  # fmt: skip
    trial = write_trial(tmp_path / "ours", data, gang=2, **fields)
    run_peer(tmp_path / "peer", data, workers=2, fields=fields)
    assert run(trial.folder, workers=2) == [0, 0]
    for row, told in zip(trial.evaluations(), trial.answers(), strict=True):
        found = told["of"]["imagenet_top1"]
        assert unpack(found["right"], found["images"]).mean() == row["imagenet_top1"]
    text = (tmp_path / "peer" / "logs" / "peer" / "checkpoints" / "results.jsonl").read_text()
    theirs = [json.loads(line) for line in text.splitlines()]
    assert [(row["imagenet_top1"], row["imagenet_top5"]) for row in trial.evaluations()] == [
        (row["imagenet-zeroshot-val-top1"], row["imagenet-zeroshot-val-top5"]) for row in theirs
    ]
