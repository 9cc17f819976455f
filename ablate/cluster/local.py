"""This machine alone, without Ray: for a laptop, for tests."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path

from ablate.cluster.contract import Capacity, Cluster, Shape
from ablate.cluster.gang import Gang, Seat
from ablate.cluster.gang_cluster import GangCluster
from ablate.cluster.keeper.client import Keeper
from ablate.cluster.seats import count_gangs, explain_shortage
from ablate.errors import ClusterError


class LocalCluster(GangCluster):
    """This machine alone, without Ray: for a laptop, for debugging, for tests.

    It counts seats, it does not reserve cores: ``num_cpus`` (default: all cores) and ``num_gpus``
    (None: all that this process may use) say how much may run at once. ``preload`` names modules
    to import once instead of in every rank (``module``, or ``module:NAME`` for a list of names).
    """

    def __init__(
        self,
        *,
        num_cpus: float | None = None,
        num_gpus: int | None = 0,
        preload: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self._cpus = float(num_cpus if num_cpus is not None else os.cpu_count() or 1)
        self._devices = _visible_devices(num_gpus)
        self._all = {"CPU": self._cpus, "GPU": float(len(self._devices))}
        self._preload = tuple(preload)
        self._keeper: Keeper
        self._opening: asyncio.Task[None]
        self._call(self._open_keeper())  # it imports ahead while the caller does other things
        self._turn = asyncio.Lock()  # first come first served: the head of the queue holds it
        self._freed = asyncio.Event()

    async def _open_keeper(self) -> None:
        self._keeper = Keeper(address="127.0.0.1", preload=self._preload)
        self._opening = self._loop.create_task(self._keeper.open())

    def capacity(self, shape: Shape) -> Capacity:
        if shape.labels:
            why = "gang.labels choose among nodes of a Ray, and this cluster is this machine alone"
            return Capacity(0, 0, f"the gang needs {shape}, but {why}")
        here = {"this machine": self._all}
        total = count_gangs(shape, [self._all])
        free = {"CPU": self._cpus, "GPU": float(len(self._devices))}
        return Capacity(
            total=total,
            free=count_gangs(shape, [free]),
            reason=explain_shortage(shape, here),
            busy=explain_shortage(shape, {"this machine": free}, now=True),
            ours=free != self._all,
        )

    async def _place(self, shape: Shape) -> Gang:
        async with self._turn:
            while self.capacity(shape).free == 0:
                self._freed.clear()
                await self._freed.wait()
            if self._keeper.lost is not None:
                await self._open_keeper()
            keeper = self._keeper
            # Shielded: stopping the attempt that came first must not stop the keeper's start.
            await asyncio.shield(self._opening)
            self._cpus -= shape.workers * shape.cpus_per_worker
            each = shape.gpus_per_worker
            taken = [
                self._devices[rank * each : (rank + 1) * each] for rank in range(shape.workers)
            ]
            del self._devices[: shape.workers * each]
            return Gang(shape, tuple(Seat(keeper, tuple(devices)) for devices in taken))

    async def _release(self, gang: Gang) -> None:
        self._cpus += gang.shape.workers * gang.shape.cpus_per_worker
        self._devices += [device for seat in gang.seats for device in seat.devices]
        self._freed.set()

    async def _shut_down(self) -> None:
        await asyncio.wait([self._opening])
        await self._keeper.close()


_DRIVER = Path("/proc/driver/nvidia/gpus")
"""A folder for each GPU that the driver has found."""


def _visible_devices(number: int | None) -> list[str]:
    """Names of the first ``number`` accelerators this process may use; None: of all."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        names = [name for name in visible.split(",") if name]
    elif number is None:
        names = [str(i) for i in range(len(list(_DRIVER.glob("*"))))]
    else:
        names = [str(i) for i in range(number)]
    if number is None:
        return names
    if len(names) < number:
        raise ClusterError(
            f"num_gpus is {number}, but CUDA_VISIBLE_DEVICES={visible} shows {len(names)}"
        )
    return names[:number]


# LocalCluster is a Cluster; mypy checks it here, where it is defined.
_: type[Cluster] = LocalCluster
