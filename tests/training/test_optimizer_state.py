"""An optimizer that comes back from a checkpoint goes on as the one that never went away."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from timm.optim import create_optimizer_v2, list_optimizers
from torch import nn

from ablate.training import checkpoint, optim

SHARP = ("adamw", "fused", "timm/lamb", "timm/adan", "timm/adafactorbv", "timm/lookahead_adamw")
"""Moments side by side with weights, counters of whole groups, factors of another element type,
state of an optimizer within."""

IMPOSSIBLE = ("adahessian", "bnb", "fused", "kron")
"""Beginnings of timm's names: what needs second derivatives, a GPU's library, or keeps its own
random numbers."""


def make(
    opt: str, *, dtype: torch.dtype, channels_last: bool
) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 32, 3), nn.Flatten(2), nn.Linear(4, 24), nn.LayerNorm(24))
    layers.register_parameter("scale", nn.Parameter(torch.ones([])))
    model = layers.to(dtype)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    if opt.startswith("timm/"):
        return model, create_optimizer_v2(model, opt.removeprefix("timm/"), lr=0.01)
    return model, torch.optim.AdamW(model.parameters(), lr=0.01, fused=opt == "fused")


def take_steps(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    dtype = model.scale.dtype
    for step in steps:
        images = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(step)).to(dtype)
        optimizer.zero_grad()
        (model(images) * model.scale).square()[..., 1:].mean().backward()
        optimizer.step()


def check(opt: str, folder: Path, *, dtype: torch.dtype, channels_last: bool) -> None:
    model, optimizer = make(opt, dtype=dtype, channels_last=channels_last)
    take_steps(model, optimizer, range(4))
    tensors, numbers = optim.named_state(model, optimizer)
    weights = checkpoint.copy_to_host(model.state_dict())
    safetensors.torch.save_file(checkpoint.copy_to_host(tensors), folder / "state")

    again, restored = make(opt, dtype=dtype, channels_last=channels_last)
    again.load_state_dict(weights)
    loaded = safetensors.torch.load_file(folder / "state")
    optim.load_named_state(again, restored, loaded, json.loads(json.dumps(numbers)))
    for one in ((model, optimizer), (again, restored)):
        take_steps(*one, range(4, 10))
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), f"{opt}: {name}"


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("opt", SHARP)
def test_a_restored_optimizer_takes_the_same_steps(
    tmp_path: Path, opt: str, channels_last: bool
) -> None:
    """Bit by bit, whatever it keeps and however the weights lie in memory."""
    check(opt, tmp_path, dtype=torch.float32, channels_last=channels_last)


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("opt", [n for n in list_optimizers() if not n.startswith(IMPOSSIBLE)])
def test_every_optimizer_of_timm_takes_the_same_steps(
    tmp_path: Path, opt: str, dtype: torch.dtype
) -> None:
    """A study may name any of them."""
    for channels_last in (False, True):
        check(f"timm/{opt}", tmp_path, dtype=dtype, channels_last=channels_last)


def test_state_that_no_checkpoint_can_hold_is_refused() -> None:
    """Before a run is lost to it, with the optimizer's name and what it keeps."""

    class Listing(torch.optim.SGD):
        def step(self, closure: object = None) -> None:  # type: ignore[override]
            for p in self.param_groups[0]["params"]:
                self.state[p]["past"] = [p.grad]

    model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="Listing keeps past as a list"):
        optim.state_bytes(model, Listing(model.parameters()))
