"""Ranks meet, and what each kind of tensor travels by."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from ablate.training import ranks
from ablate.training.exchange import Exchange

PATIENCE_S = 4.0


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def enter(rank: int, port: int) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    os.environ.update(MASTER_PORT=str(port))


def come_late(rank: int, port: int) -> None:
    """Rank 1 is building for longer than a collective waits."""
    enter(rank, port)
    # Both are here before the short patience counts.
    store = dist.TCPStore("127.0.0.1", port + 1, 2, is_master=rank == 0, timeout=timedelta(60))
    store.wait(["go"] if rank else [], timedelta(seconds=60))
    store.set("go", "")
    os.environ[ranks.COLLECTIVE] = str(PATIENCE_S)
    gang = ranks.join(gpus_per_worker=0)
    if rank:
        time.sleep(PATIENCE_S + 1)
    ranks.meet(gang)
    assert ranks.gather(rank, gang) == [0, 1]
    if rank:
        store.wait(["over"], timedelta(seconds=60))
    else:
        began = time.monotonic()
        with pytest.raises(RuntimeError, match=r"(?i)timed? ?out"):
            ranks.barrier(gang)  # rank 1 never comes
        store.set("over", "")
        assert PATIENCE_S - 1 < time.monotonic() - began < PATIENCE_S + 60


def travel(rank: int, port: int) -> None:
    """Among ranks whose first group knows accelerators alone, as NCCL's."""
    enter(rank, port)

    def group_for_cards(store: dist.Store, rank: int, size: int, timeout: timedelta) -> object:
        return dist.ProcessGroupGloo(store, rank, size, timeout)

    dist.Backend.register_backend("cards", group_for_cards, devices=["cuda"])
    store = dist.TCPStore("127.0.0.1", port, 2, is_master=rank == 0)
    dist.init_process_group("cards", store=store, rank=rank, world_size=2)
    cpu = torch.device("cpu")
    gang = ranks.Gang(rank, 2, rank, 2, cpu, hosts=dist.new_group(backend="gloo"))
    with pytest.raises(RuntimeError, match="(?i)backend"):
        dist.all_reduce(torch.ones(1))
    ranks.meet(gang)
    ranks.barrier(gang)
    assert ranks.broadcast({"attempt": 3 + rank}, gang) == {"attempt": 3}
    assert ranks.gather(rank, gang) == [0, 1]
    assert ranks.gather_rows(torch.full((1, 2), rank + 1.0), rank, 2, gang)[1].tolist() == [2, 2]
    model = torch.nn.BatchNorm1d(2)
    model.running_mean.fill_(rank + 1.0)  # type: ignore[union-attr]
    ranks.broadcast_buffers(model, gang)
    assert model.running_mean.tolist() == [1.0, 1.0]  # type: ignore[union-attr]
    [(_, numbers)] = Exchange(gang).push({"loss": torch.tensor(1.0 + rank)}, (0, 0, 0, 0, 0), {})
    assert numbers["loss"] == 1.5
    ranks.leave()


@pytest.mark.parametrize("what", [come_late, travel], ids=["meeting", "travelling"])
def test_ranks(port: int, what: Callable[[int, int], None]) -> None:
    """A rank that builds longer than collectives wait is waited for, and no longer afterwards;
    CPU tensors never go by the accelerators' group."""
    torch.multiprocessing.start_processes(what, (port,), nprocs=2, start_method="fork")  # type: ignore[no-untyped-call]


def test_the_rank_that_goes_on_alone_has_the_cores_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the ranks on this machine, not of the gang's others, and none that it may not use."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        ranks.take_over(ranks.Gang(0, 6, 0, 3, torch.device("cpu")))
        assert torch.get_num_threads() == 6
        ranks.take_over(ranks.Gang(0, 6, 0, 3, torch.device("cpu")))
        assert torch.get_num_threads() == 8
    finally:
        torch.set_num_threads(threads)
