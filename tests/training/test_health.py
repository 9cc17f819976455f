"""What the health evaluation measures, and that training does not notice it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ablate.training.evaluations.health import Health, effective_rank
from ablate.training.ranks import Gang

ALONE = Gang(0, 1, 0, 1, torch.device("cpu"))


class Noise:
    """Samples that are standard normal images of two channels."""

    shard_sizes = np.array([2048])
    fingerprint = "noise"

    def batch(self, ids: Any, seeds: Any) -> tuple[tuple[torch.Tensor, ...], Any]:
        rows = [torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(int(i))) for i in ids]
        return (torch.stack(rows),), np.zeros(len(ids), bool)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(2)
        self.head = nn.Linear(32, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.norm(x).flatten(1))
        return out


def look(model: nn.Module, batch: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    features = model(batch[0])
    return {"loss": features.square().mean(), "image_feature": features}


def health(**changes: Any) -> Health:
    options = {"num_samples": 2048, "seed": 1, "look": look, "due": lambda e: True, **changes}
    return Health(Noise(), device=torch.device("cpu"), **options)


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def test_true_statistics_show_no_drift(net: Net) -> None:
    """With the data's own statistics there is neither drift nor gap."""
    measured = health().run(net, ALONE)
    assert measured["bn_drift_max"] < 0.05 and abs(measured["bn_gap"]) < 0.05
    assert measured["params_non_finite"] == measured["bn_non_finite"] == 0
    assert 6 < measured["image_feature_rank"] <= 8


def test_wrong_statistics_show(net: Net) -> None:
    """Running variances e times too large are a drift of 1, and the loss changes with them."""
    net.norm.running_var.mul_(math.e)
    measured = health().run(net, ALONE)
    assert measured["bn_drift_median"] == pytest.approx(1.0, abs=0.1)
    assert measured["bn_gap"] < -0.05


class Judge:
    """An evaluation whose accuracy is right where the statistics are the data's own."""

    name = "judge"
    asked = 0

    def due(self, epoch: int) -> bool:
        return True

    def run(self, model: nn.Module, gang: Gang) -> dict[str, float]:
        self.asked += 1
        assert isinstance(model, Net) and not model.norm.training
        fits = bool((model.norm.running_var - 1).abs().max() < 0.2)
        return {"imagenet_top1": 0.5 if fits else 0.0}


@pytest.mark.parametrize(("factor", "asked"), [(1.0, 0), (math.e**2, 1), (math.nan, 1)])
def test_drift_is_judged_again_with_fresh_statistics(net: Net, factor: float, asked: int) -> None:
    """Wrong or broken statistics are replaced for one more evaluation, and put back after it."""
    assert net.norm.running_var is not None
    net.norm.running_var.mul_(factor)
    before, judge = net.norm.running_var.clone(), Judge()
    measured = health(arbiter=judge).run(net, ALONE)
    assert judge.asked == asked
    assert measured.get("recalibrated_top1") == (0.5 if asked else None)
    assert torch.equal(net.norm.running_var.nan_to_num(7), before.nan_to_num(7))


def test_training_does_not_notice(net: Net) -> None:
    """Buffers, momenta, modes and gradients are as they were."""
    net.norm.running_mean.add_(3)
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    health().run(net, ALONE)
    assert all(torch.equal(before[name], buffer) for name, buffer in net.named_buffers())
    assert net.norm.momentum == 0.1 and not net.norm.training
    assert all(p.grad is None for p in net.parameters())


def test_non_finite_numbers_are_counted(net: Net) -> None:
    """NaN and infinity in parameters and statistics, each where it is."""
    with torch.no_grad():
        net.head.weight[0, :3] = float("nan")
        net.head.bias[1] = float("-inf")
    net.norm.running_mean[1] = float("inf")
    measured = health().run(net, ALONE)
    assert measured["params_non_finite"] == 4 and measured["bn_non_finite"] == 1


def test_few_features_have_no_rank(net: Net) -> None:
    """Below 1024 features the rank would measure their number."""
    assert "image_feature_rank" not in health(num_samples=512).run(net, ALONE)


def test_effective_rank_counts_dimensions() -> None:
    """Isotropic features fill the space, features on a line one dimension, none of a point."""
    torch.manual_seed(0)
    isotropic = torch.randn(4096, 16)
    assert effective_rank(isotropic) == pytest.approx(16, rel=0.01)
    assert effective_rank(isotropic[:, :1] @ torch.randn(1, 16) + 5) == pytest.approx(1, rel=1e-3)
    assert effective_rank(torch.ones(100, 4)) == 1.0
    assert math.isnan(effective_rank(torch.full((10, 2), float("nan"))))
