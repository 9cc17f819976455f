"""What we switch off in DDP changes no number."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ablate.training.ranks import keep_apart


def network() -> nn.Module:
    """Two BatchNorms, and a buffer that a training step reads and writes."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3))
    return nn.Sequential(*layers, nn.BatchNorm2d(8), Drift())


class Drift(nn.Module):
    """Takes the mean of what it has seen away."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen = 0.5 * self.seen + x.detach().mean()
        return x - self.seen


def learn(rank: int, port: int, folder: str) -> None:
    """Six steps of two micro-batches each, as DDP is by default and as we have it."""
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, 2, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    for name in ("theirs", "ours"):
        model = network()
        if name == "ours":
            keep_apart(model)
        ddp = DistributedDataParallel(model, gradient_as_bucket_view=name == "ours")
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        images = torch.Generator().manual_seed(rank)
        for _ in range(6):
            optimizer.zero_grad()
            for _ in range(2):
                ddp(torch.randn(4, 3, 12, 12, generator=images)).square().mean().backward()
            optimizer.step()
        if rank == 0:
            torch.save(model.state_dict(), Path(folder) / name)
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
def test_rank_0_learns_the_same_to_the_last_bit(tmp_path: Path) -> None:
    """Weights, running statistics and other buffers, whether DDP broadcasts BatchNorm's statistics
    and copies gradients or not."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(learn, (port, str(tmp_path)), nprocs=2)
    theirs, ours = (torch.load(tmp_path / name) for name in ("theirs", "ours"))
    assert theirs.keys() == ours.keys() and len(ours) > 10
    for name, value in theirs.items():
        assert torch.equal(value, ours[name]), name
