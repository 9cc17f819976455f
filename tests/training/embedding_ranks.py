"""One rank of tests/training/test_embeddings.py: a model with a vocabulary, learnt by DDP alone and
with the embedding's rows summed apart."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ablate.training.embeddings import large_embeddings, sum_rows
from ablate.training.ranks import Gang, broadcast_tensors, keep_apart

WORDS, WIDTH = 8192, 65  # a row of an odd number of values


class Reader(nn.Module):
    """Reads words; `tied`: and also asks its vocabulary what comes next, so each row counts."""

    def __init__(self, *, tied: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH, dtype=dtype)
        self.few = nn.Embedding(16, WIDTH, dtype=dtype)
        self.out = nn.Linear(WIDTH, 4, dtype=dtype)
        self.tied = tied

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        read = (self.words(words) + self.few(words % 16)).mean(dim=1)
        loss = self.out(read).square().mean()
        return loss + (read @ self.words.weight.T).square().mean() if self.tied else loss


def learn(rank: int, ranks: int, port: int, folder: str, case: str) -> None:
    """Five steps of AdamW."""
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, ranks, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    gang = Gang(rank, ranks, rank, ranks, torch.device("cpu"))
    dtype = torch.bfloat16 if case == "bf16" else torch.float32
    for name in ("theirs", "ours"):
        torch.manual_seed(0)
        model = Reader(tied=case == "tied", dtype=dtype)
        apart = large_embeddings(model, gang) if name == "ours" else {}
        assert list(apart) == (["words.weight"] if name == "ours" else [])
        if name == "ours" and rank == 1:
            nn.init.zeros_(model.words.weight)  # what DDP would mend
        broadcast_tensors([weight.detach() for weight in apart.values()], gang)
        keep_apart(model, apart)
        ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        drawn = torch.Generator().manual_seed(rank)
        for _ in range(5):
            optimizer.zero_grad()
            ddp(torch.randint(0, WORDS, (4, 7), generator=drawn)).backward()
            sum_rows(apart.values(), gang)
            optimizer.step()
        torch.save(model.state_dict(), Path(folder) / f"{name}-{rank}")
    dist.destroy_process_group()
