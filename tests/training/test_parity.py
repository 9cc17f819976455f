"""Our loop against open_clip_train.main 3.3.0: same command, same batches, same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peer_runs import cases, follow

pytest.importorskip("open_clip_train")

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
    "vit, checkpointing": {**VIT, "grad_checkpointing": True},
    "vit, siglip": {**VIT, "siglip": True, "accum_freq": 2},
    "vit, normalised queries and keys": {**VIT, "qk_norm": True, "precision": "amp_bf16"},
    "another temperature": {"logit_scale_init": 5.0},
    "locked text": {"lock_text": True, "lock_text_freeze_layer_norm": True},
}  # fmt: skip


IN_THE_SUITE = ("cosine", "vit, siglip")
"""A ResNet with the softmax loss, a transformer with the other; the others on demand."""


@pytest.mark.parametrize("changes", cases(ONE_RANK, IN_THE_SUITE))
def test_one_rank_follows_the_peer_on_our_batches(
    tmp_path: Path, data: Path, changes: dict[str, Any]
) -> None:
    """52 steps: loss and logit scale of every one, and every weight after the last."""
    follow(tmp_path, data, 1, changes)
