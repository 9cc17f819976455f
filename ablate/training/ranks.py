"""The gang: process group, and the few collectives that the loop needs.

Read from the environment, as torchrun, srun wrappers and our clusters set it: RANK, WORLD_SIZE,
LOCAL_RANK, MASTER_ADDR, MASTER_PORT. ABLATE_STORE_FD may hold a listening socket already bound to
MASTER_PORT, which rank 0 serves the rendezvous on, so that no other process can take the port.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch.nn.parallel import DistributedDataParallel

from ablate.training.arithmetic import repeat_itself, require_gpus
from ablate.trial.pulse import START_PATIENCE, START_PATIENCE_S
from ablate.trial.session import Session

COLLECTIVE, COLLECTIVE_S = "ABLATE_COLLECTIVE_S", 600.0
"""Environment variable: seconds that a collective waits for the other ranks. Watchdogs outside are
faster; a batch system that suspends a gang for longer needs more."""


@dataclass(frozen=True, slots=True)
class Gang:
    """This process among its ranks."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device
    hosts: dist.ProcessGroup | None = None
    """What CPU tensors travel by beside NCCL's group; None: there is but one group."""

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which alone writes the trial's records."""
        return self.rank == 0


def enter(session: Session) -> Gang:
    """Join the gang of a trial, with this rank's share of the machine, and arithmetic that repeats
    itself; every rank then knows the attempt's number."""
    wanted = session.trial["gang"]
    gang = join(gpus_per_worker=int(wanted.get("gpus_per_worker", 0)))
    _set_up_torch(gang, cpus=float(wanted.get("cpus_per_worker") or 0))
    session.attempt = broadcast(session.attempt, gang)
    return gang


def join(*, gpus_per_worker: int, timeout: timedelta | None = None) -> Gang:
    """Join the gang; a single process needs no process group.

    CPU tensors travel by gloo, also beside nccl.
    """
    timeout = timeout or timedelta(seconds=float(os.environ.get(COLLECTIVE, COLLECTIVE_S)))
    rank = int(os.environ.get("RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", str(world_size)))
    device = torch.device("cpu")
    if gpus_per_worker:
        require_gpus()
        # A rank sees all devices of its gang on this node; its own are a run of equal length.
        # One device is a rank's own, as srun --gpus-per-task gives it.
        seen, wanted = torch.cuda.device_count(), local_world_size * gpus_per_worker
        if 1 < seen < wanted:
            raise RuntimeError(
                f"{local_world_size} ranks on this node want {gpus_per_worker} GPUs each, and see "
                f"{seen} together. Show each rank its own alone, or all of them {wanted}"
            )
        share = max(seen // max(local_world_size, 1), 1)
        device = torch.device("cuda", local_rank * share % seen)
        torch.cuda.set_device(device)
    hosts: Any = None
    if world_size > 1:
        among: dict[str, Any] = {
            "store": _store(rank, world_size, timeout),
            "rank": rank,
            "world_size": world_size,
            "timeout": timeout,
        }
        if gpus_per_worker:
            # By the name "nccl" torch's gather of features knows its way back, the peer's: under
            # "cpu:gloo,cuda:nccl" it takes one that needs more memory and rounds otherwise.
            dist.init_process_group("nccl", device_id=device, **among)
            hosts = dist.new_group(backend="gloo", timeout=timeout)
        else:
            dist.init_process_group("gloo", **among)
    return Gang(rank, world_size, local_rank, local_world_size, device, hosts)


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
    dist.broadcast_object_list(box, src=source, group=gang.hosts, device=torch.device("cpu"))
    return box[0]


def gather(value: Any, gang: Gang) -> list[Any]:
    """Every rank's `value` (plain JSON-like data), by rank, on every rank."""
    if gang.world_size == 1:
        return [value]
    return [broadcast(value, gang, source=rank) for rank in range(gang.world_size)]


def sum_over_ranks(tensor: torch.Tensor, gang: Gang) -> torch.Tensor:
    """`tensor` added up over the ranks, in place."""
    if gang.world_size > 1:
        dist.all_reduce(tensor, group=_group_of(tensor, gang))
    return tensor


def _group_of(tensor: torch.Tensor, gang: Gang) -> dist.ProcessGroup | None:
    return gang.hosts if tensor.device.type == "cpu" else None


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
    broadcast_tensors(model.buffers(), gang)


def broadcast_tensors(tensors: Iterable[torch.Tensor], gang: Gang) -> None:
    """Give every rank rank 0's values of these tensors, in place."""
    if gang.world_size > 1:
        for tensor in tensors:
            dist.broadcast(tensor, src=0, group=_group_of(tensor, gang))


def keep_apart(model: torch.nn.Module, parameters: Iterable[str] = ()) -> None:
    """Have DDP leave `parameters` and BatchNorm's running statistics alone, before `model` is
    handed to it.

    It would broadcast rank 0's statistics before every forward pass, each by itself. A training
    step does not read them, nobody overwrites rank 0's, and :func:`broadcast_buffers` comes before
    all that reads them; so no number changes. Other buffers are broadcast as ever.
    """
    ours = [
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)
        for name, _ in module.named_buffers(recurse=False)
    ]
    ours += parameters
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ours)  # type: ignore[no-untyped-call]


def barrier(gang: Gang) -> None:
    """Wait until every rank is here."""
    sum_over_ranks(torch.zeros(1), gang)


def meet(gang: Gang) -> None:
    """Wait for ranks that are still building, for as long as a rank may take to its first step.

    One node may decode a whole data set meanwhile, and a collective would not wait so long.
    """
    if gang.world_size > 1:
        patience = timedelta(seconds=float(os.environ.get(START_PATIENCE, START_PATIENCE_S)))
        dist.monitored_barrier(gang.hosts, timeout=patience)


def take_over(gang: Gang) -> None:
    """Compute with the cores of all this machine's ranks of the gang, once the others have left."""
    _compute_with(torch.get_num_threads() * gang.local_world_size)


def _set_up_torch(gang: Gang, *, cpus: float) -> None:
    """Threads for this rank's share of the machine, and arithmetic that repeats itself."""
    _compute_with(int(cpus) or len(os.sched_getaffinity(0)) // gang.local_world_size)
    if gang.device.type == "cpu":
        keep_freed_memory()
    repeat_itself(gang.device)


def _compute_with(threads: int) -> None:
    """As many threads, or those that this process may use, where that are fewer."""
    torch.set_num_threads(max(1, min(threads, len(os.sched_getaffinity(0)))))


def keep_freed_memory() -> None:
    """Have glibc keep what is freed, up to 2 GiB, for the next step.

    Each step allocates the same activations and gradients. glibc gives large blocks back to the
    kernel, which hands out zeroed pages anew: a tenth of a small model's step. Changes no number.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc alone has it
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the largest that it takes
        mallopt(_M_TRIM_THRESHOLD, (2 << 30) - 1)


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Parameters of mallopt(3), from glibc's malloc.h."""
