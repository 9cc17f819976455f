"""The gang: process group, and the few collectives that the loop needs.

Read from the environment, as torchrun, srun wrappers and our clusters set it: RANK, WORLD_SIZE,
LOCAL_RANK, MASTER_ADDR, MASTER_PORT. ABLATE_STORE_FD may hold a listening socket already bound to
MASTER_PORT, which rank 0 serves the rendezvous on, so that no other process can take the port.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

TIMEOUT = timedelta(minutes=10)
"""How long a collective waits for the other ranks; watchdogs outside are faster."""


@dataclass(frozen=True, slots=True)
class Gang:
    """This process among its ranks."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which alone writes the trial's records."""
        return self.rank == 0


def join(*, gpus_per_worker: int, timeout: timedelta = TIMEOUT) -> Gang:
    """Join the gang; a single process needs no process group.

    CPU tensors travel by gloo, also beside nccl.
    """
    rank = int(os.environ.get("RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", str(world_size)))
    device = torch.device("cpu")
    if gpus_per_worker:
        if not torch.cuda.is_available():
            raise RuntimeError(
                "the trial asks for GPUs, and torch sees none here: "
                f"CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES')!r}"
            )
        # A rank sees all devices of its gang on this node; its own are a run of equal length.
        share = max(torch.cuda.device_count() // max(local_world_size, 1), 1)
        device = torch.device("cuda", local_rank * share % torch.cuda.device_count())
        torch.cuda.set_device(device)
    if world_size > 1:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if gpus_per_worker else "gloo",
            store=_store(rank, world_size, timeout),
            rank=rank,
            world_size=world_size,
            timeout=timeout,
        )
    return Gang(rank, world_size, local_rank, local_world_size, device)


def _store(rank: int, world_size: int, timeout: timedelta) -> Store:
    listening = os.environ.get("ABLATE_STORE_FD") if rank == 0 else None
    options: dict[str, Any] = {"master_listen_fd": int(listening)} if listening else {}
    # torchrun's agent already serves a store on MASTER_PORT; its workers are all clients of it.
    served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        world_size,
        is_master=rank == 0 and not served,
        timeout=timeout,
        wait_for_workers=False,
        **options,
    )
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(f"ablate-{restarts}", store)


def leave() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def broadcast(value: Any, gang: Gang, *, source: int = 0) -> Any:
    """Rank `source`'s `value` (plain JSON-like data) on every rank."""
    if gang.world_size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=source, device=torch.device("cpu"))
    return box[0]


def gather(value: Any, gang: Gang) -> list[Any]:
    """Every rank's `value` (plain JSON-like data), by rank, on every rank."""
    if gang.world_size == 1:
        return [value]
    return [broadcast(value, gang, source=rank) for rank in range(gang.world_size)]


def sum_over_ranks(tensor: torch.Tensor, gang: Gang) -> torch.Tensor:
    """`tensor` added up over the ranks, in place."""
    if gang.world_size > 1:
        dist.all_reduce(tensor)
    return tensor


def gather_rows(mine: torch.Tensor, first: int, total: int, gang: Gang) -> torch.Tensor:
    """The rows of all ranks, this one's from row `first` on; exact, as each is added to zeros."""
    if gang.world_size == 1:
        return mine
    whole = torch.zeros(total, *mine.shape[1:], dtype=mine.dtype, device=mine.device)
    whole[first : first + len(mine)] = mine
    return sum_over_ranks(whole, gang)


def broadcast_buffers(model: torch.nn.Module, gang: Gang) -> None:
    """Give every rank rank 0's buffers: running statistics differ between ranks after a step.

    The peer evaluates and saves on rank 0, so rank 0's are the model's.
    """
    if gang.world_size > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def barrier(gang: Gang) -> None:
    """Wait until every rank is here."""
    if gang.world_size > 1:
        dist.all_reduce(torch.zeros(1))
