"""Every precision, model family and loss that a study may name trains for real on this device."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from small_trials import add_models, config

from ablate.recipes import openclip
from ablate.training.data.batches import Batches
from ablate.trial.recipe import absolute

STEPS = 8

SIXTEEN_BITS = {
    "bf16": {torch.bfloat16, torch.float32},
    "fp16": {torch.float16, torch.float32},
    "pure_bf16": {torch.bfloat16},
    "pure_fp16": {torch.float16},
}
"""Types of the parameters; bf16 and fp16 leave normalisation layers in fp32, as open_clip does."""


@pytest.fixture(scope="module", autouse=True)
def models() -> None:
    add_models()


PRECISIONS = ("fp32", "amp", "amp_bf16", "bf16", "fp16", "pure_bf16", "pure_fp16")
CASES = [
    *((precision, "tiny-test-rn", False) for precision in PRECISIONS),
    *((precision, "tiny-test-vit", True) for precision in PRECISIONS),
    *((precision, "tiny-test-rn", True) for precision in ("fp32", "amp_bf16")),
    *((precision, "tiny-test-vit", False) for precision in ("fp32", "amp_bf16")),
]


IN_THE_SUITE = [
    *((precision, "tiny-test-rn", False) for precision in ("fp32", "amp", "amp_bf16", "pure_fp16")),
    *((precision, "tiny-test-vit", True) for precision in ("bf16", "fp16", "pure_bf16")),
]
"""Each precision once; the other cases on demand."""


@pytest.mark.parametrize(
    ("precision", "model", "siglip"),
    [
        pytest.param(*case, marks=() if case in IN_THE_SUITE else pytest.mark.exhaustive)
        for case in CASES
    ],
)
def test_a_batch_is_learnt(data: Path, precision: str, model: str, siglip: bool) -> None:
    """Steps on one batch make its loss fall, with the weights stored as the precision says."""
    chosen = config(
        model=model, precision=precision, siglip=siglip, batch_size=8, eps=1e-4, warmup=0,
        imagenet_val=None,
    )  # fmt: skip
    openclip.check(chosen, workers=1, gpus=0)  # refuses none of them on a CPU
    placed = absolute(chosen, root=data)
    task = openclip.build(placed, rank=0, world_size=1, device=torch.device("cpu"))
    found = {p.dtype for p in task.learner.model.parameters()}
    assert found == SIXTEEN_BITS.get(precision, {torch.float32})
    assert (task.execution.scaler is not None) == (precision == "amp")
    batch = Batches(
        task.data.samples, num_samples=96, batch_size=8, accum_freq=1, rank=0, world_size=1, seed=0
    )[0].tensors
    losses = []
    for _ in range(STEPS):
        task.learner.optimizer.zero_grad()
        values = task.learner.loss(task.learner.model, [batch], lambda loss: loss.backward())
        task.learner.optimizer.step()
        task.learner.settle()
        losses.append(float(values["loss"]))
    start = losses[0] if siglip else math.log(8)
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < 0.9 * start
