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

pytest.importorskip("open_clip_train")

EPOCHS = 3  # of 6 steps each; two cases run for 54 steps

RUNS: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank": (1, {"epochs": 9}),
    "clipped": (1, {"grad_clip_norm": 1.0, "lr_scheduler": "const"}),
    "accumulated": (1, {"accum_freq": 2, "batch_size": 8}),
    "cooldown": (
        1,
        {"lr_scheduler": "const-cooldown", "epochs_cooldown": 2, "lr_cooldown_end": 1e-5},
    ),
    "two ranks": (2, {"batch_size": 8}),
    "local": (2, {"batch_size": 8, "local_loss": True}),
    "gather": (2, {"batch_size": 8, "gather_with_grad": True, "grad_clip_norm": 0.5}),
    "local gather accumulated": (
        2,
        {
            "batch_size": 4,
            "local_loss": True,
            "gather_with_grad": True,
            "accum_freq": 2,
            "epochs": 9,
        },
    ),
    "siglip of two": (2, {"siglip": True, "batch_size": 8}),
    "timm augmentation": (1, {"aug_cfg": {"use_timm": True, "re_prob": 0.3}}),
    "amp clipped": (1, {"precision": "amp", "grad_clip_norm": 1.0}),
    "amp of two": (2, {"precision": "amp", "batch_size": 8}),
    "amp_bf16": (1, {"precision": "amp_bf16"}),
    "bf16": (1, {"precision": "bf16"}),
    "pure_bf16 accumulated": (
        2,
        {"precision": "pure_bf16", "batch_size": 4, "accum_freq": 2},
    ),
}

TOLERANCE = {"fp32": 1e-6, "amp": 1e-6, "amp_bf16": 1e-6, "bf16": 1e-6, "pure_bf16": 1e-6}


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "changes"), RUNS.values(), ids=RUNS.keys())
def test_the_loop_follows_the_peer(
    tmp_path: Path, data: Path, workers: int, changes: dict[str, Any]
) -> None:
    """Loss and logit scale of every step, the weights after the last, and zero-shot accuracy."""
    fields = {"epochs": EPOCHS, "zeroshot_frequency": 0, **changes}
    accum_freq = fields.get("accum_freq", 1)
    trial = write_trial(tmp_path / "ours", data, gang=workers, **fields)
    run_peer(tmp_path / "peer", data, workers=workers, fields=fields)
    assert run(trial.folder, workers=workers) == [0] * workers
    rows = trial.trace()

    ranks = [
        json.loads((tmp_path / "peer" / RESULT.format(rank=rank)).read_text())
        for rank in range(workers)
    ]
    # With accumulation the loss is called once for each micro-batch; the last one is the step's.
    last = slice(accum_freq - 1, None, accum_freq)
    losses = np.mean([rank["losses"][last] for rank in ranks], axis=0)
    scales = ranks[0]["scales"][last]
    tolerance = TOLERANCE[fields.get("precision", "fp32")]
    assert len(rows) == len(losses) >= 18
    assert [row["loss"] for row in rows] == pytest.approx(losses.tolist(), rel=tolerance)
    # The peer's scale is the one before the step, ours the one after it; with pure_bf16 the peer
    # also takes the exponential in bf16, which has 8 bits.
    bits = 2**-8 if fields.get("precision") == "pure_bf16" else tolerance
    assert [row["logit_scale"] for row in rows[:-1]] == pytest.approx(scales[1:], rel=bits)

    theirs = torch.load(
        tmp_path / "peer" / "logs" / "peer" / "checkpoints" / f"epoch_{fields['epochs']}.pt",
        weights_only=True,
    )["state_dict"]
    newest = sorted((trial.folder / "checkpoints").glob("step-*"))[-1]
    ours = safetensors.torch.load_file(newest / "model.safetensors")
    for name, value in ours.items():
        expected = theirs[("module." if workers > 1 else "") + name]
        difference = (value.double() - expected.double()).norm()
        assert difference <= tolerance * expected.double().norm() + 1e-12, name


@pytest.mark.parametrize("precision", ["fp32", "amp_bf16"])
def test_zero_shot_accuracy_is_the_peers(tmp_path: Path, data: Path, precision: str) -> None:
    """Top-1 and top-5 of every epoch equal open_clip_train's, which evaluates on one rank."""
    fields = {"epochs": 3, "batch_size": 8, "precision": precision}
    trial = write_trial(tmp_path / "ours", data, gang=2, **fields)
    run_peer(tmp_path / "peer", data, workers=2, fields=fields)
    assert run(trial.folder, workers=2) == [0, 0]
    text = (tmp_path / "peer" / "logs" / "peer" / "checkpoints" / "results.jsonl").read_text()
    theirs = [json.loads(line) for line in text.splitlines()]
    assert [(row["imagenet_top1"], row["imagenet_top5"]) for row in trial.evaluations()] == [
        (row["imagenet-zeroshot-val-top1"], row["imagenet-zeroshot-val-top5"]) for row in theirs
    ]
