"""What the ranks of the drills do."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from pathlib import Path


def train() -> int:
    """Count to STEPS together, one all-reduce a step, from the last step that rank 0 wrote down.

    The process group's own patience is far above every bound, so what ends a hung step is the
    cluster.
    """
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        world,
        is_master=rank == 0,
        timeout=timedelta(minutes=10),
        master_listen_fd=int(os.environ["ABLATE_STORE_FD"]) if rank == 0 else None,
    )
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=world, timeout=timedelta(minutes=10)
    )
    trial = Path(os.environ["ABLATE_TRIAL"])
    steps = trial / "steps.txt"  # one line per step: attempt, step, time
    done = len(steps.read_text().splitlines()) if steps.exists() else 0
    agreed = torch.tensor([done])
    dist.broadcast(agreed, 0)
    for step in range(int(agreed) + 1, int(os.environ["STEPS"]) + 1):
        total = torch.ones(1)
        dist.all_reduce(total)
        assert total.item() == world
        if rank == 0:
            with open(steps, "a") as file:
                file.write(f"{os.environ['ABLATE_ATTEMPT']} {step} {time.time()}\n")
        time.sleep(0.05)
    dist.destroy_process_group()
    return 0
