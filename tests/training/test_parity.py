"""Our loop against open_clip_train.main 3.3.0: same command, same batches, same numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from peer_runs import RESULT, run_peer
from small_trials import run, write_trial

from ablate.records import TrialRecord

pytest.importorskip("open_clip_train")

STEPS = 52

SMALL: dict[str, Any] = {
    "model": "tiny-test-rn",
    "train_num_samples": 26 * 16,
    "epochs": 2,
    "zeroshot_frequency": 0,
}
"""2 epochs of 26 steps of 16 samples."""

COOLDOWN = {"lr_scheduler": "const-cooldown", "epochs_cooldown": 1, "lr_cooldown_end": 1e-5}
COLOUR = {"color_jitter": (0.4, 0.4, 0.4, 0.1), "color_jitter_prob": 0.8, "gray_scale_prob": 0.2}
TIMM = {"use_timm": True, "scale": (0.4, 1.0), "re_prob": 0.3, "color_jitter": 0.4}
VIT = {"model": "tiny-test-vit"}

ONE_RANK: dict[str, dict[str, Any]] = {
    "cosine": {},
    "constant, clipped": {"lr_scheduler": "const", "grad_clip_norm": 1.0},
    "cooldown, accumulated": {**COOLDOWN, "accum_freq": 2},
    "accumulated, clipped": {"accum_freq": 2, "grad_clip_norm": 0.5},
    "no schedule, other betas": {
        "skip_scheduler": True, "lr": 3e-4, "beta1": 0.8, "beta2": 0.95, "eps": 1e-5, "wd": 0.5
    },
    "power, seed": {**COOLDOWN, "lr_cooldown_power": 2.0, "seed": 5, "warmup": 0},
    "colour": {"aug_cfg": COLOUR},
    "timm augmentation": {"aug_cfg": TIMM},
    "timm optimizer": {"opt": "timm/lamb", "beta2": None, "eps": 1e-6},
    "amp": {"precision": "amp", "batch_size": 4, "train_num_samples": 26 * 4},
    "amp, accumulated, clipped": {
        **VIT, "precision": "amp", "accum_freq": 2, "grad_clip_norm": 1.0
    },
    "amp_bf16": {"precision": "amp_bf16"},
    "amp_bf16, accumulated, clipped": {
        "precision": "amp_bf16", "accum_freq": 2, "grad_clip_norm": 1.0
    },
    "bf16": {"precision": "bf16"},
    "fp16": {**VIT, "precision": "fp16", "eps": 1e-6},
    "pure_bf16": {"precision": "pure_bf16", "accum_freq": 2},
    "pure_fp16": {**VIT, "precision": "pure_fp16", "eps": 1e-4, "lr": 1e-4},
    "vit": {**VIT, "grad_clip_norm": 1.0},
    "vit, patch dropout, checkpointing": {
        **VIT, "force_patch_dropout": 0.5, "grad_checkpointing": True
    },
    "vit, siglip": {**VIT, "siglip": True, "accum_freq": 2},
    "locked towers": {"lock_image": True, "lock_image_freeze_bn_stats": True, "lock_text": False},
}  # fmt: skip

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

TOLERANCE = 1e-6
"""Relative, for every precision: ours are the peer's operations in its order, on one machine."""


@pytest.mark.parametrize("changes", ONE_RANK.values(), ids=ONE_RANK.keys())
def test_one_rank_follows_the_peer(tmp_path: Path, data: Path, changes: dict[str, Any]) -> None:
    """52 steps: loss and logit scale of every one, and every weight after the last."""
    follow(tmp_path, data, 1, changes)


@pytest.mark.parametrize("changes", TWO_RANKS.values(), ids=TWO_RANKS.keys())
def test_two_ranks_follow_the_peer(tmp_path: Path, data: Path, changes: dict[str, Any]) -> None:
    """The same for two ranks, with all four ways to share the softmax loss."""
    follow(tmp_path, data, 2, changes)


def follow(
    folder: Path, data: Path, workers: int, changes: dict[str, Any], *, gpus: int = 0
) -> None:
    accum_freq = changes.get("accum_freq", 1)
    fields = {**SMALL, "batch_size": 16 // workers // accum_freq, **changes}
    trial = write_trial(folder / "ours", data, gang=workers, gpus=gpus, **fields)
    run_peer(folder / "peer", data, workers=workers, fields=fields, gpus=gpus)
    assert run(trial.folder, workers=workers) == [0] * workers, log_of(trial)
    rows = trial.trace()

    ranks = [
        json.loads((folder / "peer" / RESULT.format(rank=rank)).read_text())
        for rank in range(workers)
    ]
    # With accumulation the loss is called once for each micro-batch; the last one is the step's.
    last = slice(accum_freq - 1, None, accum_freq)
    losses = np.mean([rank["losses"][last] for rank in ranks], axis=0)
    scales = ranks[0]["scales"][last]
    assert len(rows) == len(losses) == STEPS
    assert [row["loss"] for row in rows] == pytest.approx(losses.tolist(), rel=TOLERANCE)
    # The peer's scale is the one before the step, ours the one after it; with pure_* the peer also
    # takes the exponential in 16 bits.
    bits = {"pure_bf16": 2**-8, "pure_fp16": 2**-10}.get(fields.get("precision", ""), TOLERANCE)
    assert [row["logit_scale"] for row in rows[:-1]] == pytest.approx(scales[1:], rel=bits)

    theirs = torch.load(
        folder / "peer" / "logs" / "peer" / "checkpoints" / f"epoch_{fields['epochs']}.pt",
        weights_only=True,
    )["state_dict"]
    newest = sorted((trial.folder / "checkpoints").glob("step-*"))[-1]
    ours = safetensors.torch.load_file(newest / "model.safetensors")
    for name, value in ours.items():
        expected = theirs[("module." if workers > 1 else "") + name]
        difference = (value.double() - expected.double()).norm()
        assert difference <= TOLERANCE * expected.double().norm() + 1e-12, name


def log_of(trial: TrialRecord) -> str:
    return "\n".join(path.read_text() for path in sorted(trial.folder.glob("log-*.txt")))


@pytest.mark.parametrize("precision", ["fp32", "amp_bf16"])
def test_zero_shot_accuracy_is_the_peers(tmp_path: Path, data: Path, precision: str) -> None:
    """Top-1 and top-5 of every epoch equal open_clip_train's, which evaluates on one rank."""
    fields = {
        **SMALL, "train_num_samples": 96, "epochs": 3, "zeroshot_frequency": 1, "batch_size": 8,
        "precision": precision,
    }  # fmt: skip
    trial = write_trial(tmp_path / "ours", data, gang=2, **fields)
    run_peer(tmp_path / "peer", data, workers=2, fields=fields)
    assert run(trial.folder, workers=2) == [0, 0]
    text = (tmp_path / "peer" / "logs" / "peer" / "checkpoints" / "results.jsonl").read_text()
    theirs = [json.loads(line) for line in text.splitlines()]
    assert [(row["imagenet_top1"], row["imagenet_top5"]) for row in trial.evaluations()] == [
        (row["imagenet-zeroshot-val-top1"], row["imagenet-zeroshot-val-top5"]) for row in theirs
    ]
