"""How much of a card's peak a run uses: what is counted, and over what."""

from __future__ import annotations

import pytest
import torch
from test_learner import Queued
from torch import nn

from ablate.training.flops import flops_per_sample, peak_flops


def test_training_takes_three_forward_passes_a_sample() -> None:
    """Of a matrix product 2 operations a weight and sample; nothing is learnt by counting."""
    learner = Queued()
    before = {name: value.clone() for name, value in learner.model.state_dict().items()}
    batch = (torch.randn(8, 4), torch.zeros(8))
    assert flops_per_sample(learner, batch) == 3 * 2 * 4 * 4
    assert learner.model.training
    assert all(parameter.grad is None for parameter in learner.model.parameters())
    assert all(torch.equal(before[n], v) for n, v in learner.model.state_dict().items())


def test_counting_leaves_batch_norm_statistics() -> None:
    """They are the run's own; a convolution is counted as its products."""
    learner = Queued()
    norm = nn.BatchNorm2d(1)
    learner.model = nn.Sequential(  # type: ignore[assignment]
        nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 1, 1, bias=False), norm, nn.Flatten()
    )
    kept = norm.running_mean.clone()
    counted = flops_per_sample(learner, (torch.randn(8, 4), torch.zeros(8)))
    assert counted == 3 * 2 * 4
    assert torch.equal(norm.running_mean, kept) and norm.num_batches_tracked == 0


@pytest.mark.parametrize(
    ("card", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("Tesla K80", None),
    ],
)
def test_a_card_is_known_by_its_name(card: str, peak: float | None) -> None:
    """Dense bf16 by the data sheets; of an unknown card nothing is said."""
    assert peak_flops(card) == peak
