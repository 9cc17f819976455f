"""SwAV on two ranks: assignments, queue and gradients are those of the whole batch."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from picture_data import make_pictures
from test_swav import CPU, config

from ablate.recipes.swav.crops import make_views
from ablate.recipes.swav.learner import Swapped
from ablate.recipes.swav.model import create_model, make_input
from ablate.training import ranks
from ablate.training.data.augment import sample_seeds
from ablate.training.data.picture_files import open_pictures
from ablate.training.data.pictures import Pictures

STEPS = 4


def teach(
    gang: ranks.Gang, crops: tuple[torch.Tensor, ...], **changes: Any
) -> tuple[list[float], torch.Tensor, torch.Tensor]:
    """Losses of a few steps on this rank's part of `crops`, the queue, and all weights; gradients
    are averaged over the ranks, as DDP does. BatchNorm keeps to its statistics, for it would see
    each rank's samples apart."""
    setting = config(batch_size=16 // gang.world_size, **changes)
    model = create_model(setting, CPU, workers=gang.world_size).eval()
    mine = Swapped(setting, model, gang=gang, steps_per_epoch=STEPS, to_input=make_input(CPU))
    part = slice(*ranks_share(16, gang))
    losses = []
    for step in range(STEPS):
        mine.rates(step)
        mine.optimizer.zero_grad()
        shown = tuple(crop[part].roll(step, 2) for crop in crops)
        found = mine.loss(mine.model, [shown], lambda loss: loss.backward())
        for p in model.parameters():
            if p.grad is not None:
                p.grad = ranks.sum_over_ranks(p.grad, gang) / gang.world_size
        mine.optimizer.step()
        mine.settle()
        losses.append(float(ranks.sum_over_ranks(found["loss"].clone(), gang)) / gang.world_size)
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    return losses, model.queue.clone(), weights


def ranks_share(total: int, gang: ranks.Gang) -> tuple[int, int]:
    """First and last of this rank's rows."""
    return total * gang.rank // gang.world_size, total * (gang.rank + 1) // gang.world_size


def on_a_rank(rank: int, port: int, crops: tuple[torch.Tensor, ...], out: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    os.environ.update(MASTER_PORT=str(port))
    gang = ranks.join(gpus_per_worker=0)
    ranks.meet(gang)
    made = {scope: teach(gang, crops, sinkhorn_scope=scope) for scope in ("global", "local")}
    torch.save(made, f"{out}/{rank}.pt")
    ranks.leave()


def test_two_ranks_balance_and_queue_as_one(tmp_path: Path) -> None:
    """With assignments balanced over all workers, loss, weights and queue of two ranks with half of
    the batch each are those of one with the whole, but for rounding: the queue takes part from the
    third step on. Balanced by each worker they are not, which is lightly's default."""
    root = make_pictures(tmp_path / "data")
    pictures = Pictures(open_pictures(str(root / "train")), views=make_views(config()))
    ids = np.arange(0, 48, 3)
    crops, _ = pictures.batch(ids, sample_seeds(1, 0, ids))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    torch.multiprocessing.start_processes(  # type: ignore[no-untyped-call]
        on_a_rank, (port, crops, str(tmp_path)), nprocs=2, start_method="fork"
    )
    one = teach(ranks.Gang(0, 1, 0, 1, CPU), crops)
    here, there = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for made in (here, there):
        losses, queue, weights = made["global"]
        assert losses == pytest.approx(one[0], rel=1e-5)
        assert torch.allclose(queue, one[1], atol=1e-5)
        assert torch.allclose(weights, one[2], atol=1e-5)
        assert made["local"][0] != pytest.approx(one[0], rel=1e-3)
    assert torch.equal(here["global"][1], there["global"][1])
    assert torch.equal(here["global"][2], there["global"][2])
