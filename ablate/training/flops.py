"""Floating-point operations of training, and what a card could do in its time.

Their quotient is the model's FLOPs utilisation (MFU; Chowdhery et al. 2022, PaLM, appendix B): what
is computed again to save memory does not count, and a backward pass counts as two forward passes.
"""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from ablate.training.task import Learner, MicroBatch

_PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A100": 312e12,
    "A10G": 70e12,
    "RTX 4090": 165e12,
}
"""Dense bf16 (fp32 accumulation) operations per second by NVIDIA's data sheets, by a part of the
card's name; the first that fits."""


def peak_flops(card: str) -> float | None:
    """Dense bf16 operations per second of a card of this name; None where it is not known."""
    return next((peak for name, peak in _PEAKS.items() if name in card), None)


def flops_per_sample(learner: Learner, batch: MicroBatch) -> float:
    """Operations that training takes for one sample of `batch`: three times its forward pass.

    With several ranks all of them call this, as the loss may be of all their samples. Weights,
    gradients and BatchNorm statistics stay; what the learner keeps beside them may not.
    """
    model = learner.model
    was_training = model.training
    model.eval()
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        learner.loss(model, [batch], lambda loss: None)
    model.train(was_training)
    return 3.0 * counter.get_total_flops() / len(batch[0])
