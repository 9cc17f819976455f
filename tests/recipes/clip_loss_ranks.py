"""Trains two small towers on W gloo ranks with each combination of ClipLoss flags.

    python tests/clip_loss_ranks.py 2 4

Prints one JSON line per number of ranks: {"workers", "parameters": {"SETTING/LOCAL/GATHER":
[parameters after 4 AdamW steps]}, "gradients": {...first step's tower gradients...}}.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import tempfile
from multiprocessing.connection import Connection

import torch
import torch.distributed as dist
from open_clip.loss import ClipLoss
from torch import nn
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel

STEPS, BATCH = 4, 8


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = nn.Linear(16, 8), nn.Linear(12, 8)
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, image: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, ...]:
        one, two = normalize(self.image(image), dim=-1), normalize(self.text(text), dim=-1)
        return one, two, self.logit_scale.exp()


def train(
    rank: int, workers: int, *, local: bool, gather: bool, setting: str
) -> tuple[list[float], list[float]]:
    model = DistributedDataParallel(Towers())
    loss = ClipLoss(local_loss=local, gather_with_grad=gather, rank=rank, world_size=workers)
    if setting == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1, eps=1e-8)
    torch.manual_seed(1)
    first: list[float] = []
    for _ in range(STEPS):
        image, text = torch.randn(BATCH * workers, 16), torch.randn(BATCH * workers, 12)
        mine = slice(rank * BATCH, (rank + 1) * BATCH)
        optimizer.zero_grad()
        loss(*model(image[mine], text[mine])).backward()
        if not first:
            first = [float(x) for p in model.parameters() if p.ndim for x in p.grad.flatten()]
        if setting == "clip":
            nn.utils.clip_grad_norm_(model.parameters(), 0.2)
        optimizer.step()
    return [float(x) for p in model.parameters() for x in p.detach().flatten()], first


def work(rank: int, workers: int, store: str, out: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=workers)
    report: dict[str, object] = {"workers": workers}
    parameters, gradients = {}, {}
    for setting in ("adamw", "clip", "sgd"):
        for local in (False, True):
            for gather in (False, True):
                key = f"{setting}/{local}/{gather}"
                parameters[key], gradients[key] = train(
                    rank, workers, local=local, gather=gather, setting=setting
                )
    dist.destroy_process_group()
    if rank == 0:
        out.send({**report, "parameters": parameters, "gradients": gradients})


def main() -> None:
    torch.set_num_threads(1)
    fork = multiprocessing.get_context("fork")  # torch and open_clip are imported once
    for workers in map(int, sys.argv[1:]):
        receive, send = fork.Pipe(duplex=False)
        with tempfile.TemporaryDirectory() as folder:
            ranks = [
                fork.Process(target=work, args=(rank, workers, f"{folder}/store", send))
                for rank in range(workers)
            ]
            for process in ranks:
                process.start()
            print(json.dumps(receive.recv()), flush=True)
            for process in ranks:
                process.join()
            assert all(process.exitcode == 0 for process in ranks)


if __name__ == "__main__":
    main()
