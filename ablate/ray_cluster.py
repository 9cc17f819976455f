"""The Cluster contract on Ray: a private one on this machine, or one that is already running.

Ray is asked for seats: one placement group per gang, so a gang is placed as a whole or waits. The
ranks themselves are forked by the keeper of each machine (:mod:`ablate.keeper`), which lives behind
one light actor per node, so no rank pays for Ray's or torch's start. A group is handed from one
attempt to the next of the same shape, because Ray needs up to a second to see freed seats.

The only file that imports ray.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import os
import secrets
import shutil
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import ray
import ray._private.ray_constants
import ray._private.state
import ray._private.worker
import ray.exceptions
from ray.util.placement_group import (
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)

from ablate.cluster import (
    Capacity,
    Cluster,
    Gang,
    GangCluster,
    Placement,
    Seat,
    count_gangs,
    explain_shortage,
)
from ablate.errors import ClusterError
from ablate.keeper import Ended, Estate, HostLost, Keeper, Rank

# What every rank would import first; the worker names its own list.
_PRELOAD = ("ablate.training.worker:PRELOAD",)
_RETRY_S = 0.5
# An idle group keeps its seats this long for an attempt of the same shape.
_IDLE_S = 5.0
# A group that is given up has been completed by then, or waits for seats that are taken.
_SETTLE_S = 1.0
# Joining a Ray that is open to the network is refused without this, set to 1.
INSECURE = "ABLATE_INSECURE_RAY"
# A node that does not hear from us kills its ranks after this time, sooner than Ray can have given
# the node up (launch/ray.env: 16 s), so that no rank writes beside its successor.
_LEASE_S = 15.0
# Only small messages pass through Ray's object store.
_OBJECT_STORE_BYTES = 80 * 2**20


class _NodeAgent:
    """The actor on each node: the node's keeper, behind Ray's calls."""

    def __init__(self, address: str, name: str, preload: Sequence[str]) -> None:
        self.keeper = Keeper(address=address, name=name, preload=preload)
        self.opening: asyncio.Task[None] | None = None

    async def _open(self) -> Keeper:
        if self.opening is None:
            self.opening = asyncio.create_task(self.keeper.open())
        await self.opening
        return self.keeper

    async def inherit(self, estate: Estate) -> None:
        (await self._open()).inherit(estate)

    async def renew(self, lease_s: float) -> None:
        (await self._open()).renew(lease_s)

    async def reserve(self, gang: str) -> int:
        return await (await self._open()).reserve(gang)

    async def run(
        self, gang: str, entry: str, ranks: Sequence[Rank], devices: Sequence[str]
    ) -> dict[int, int]:
        return await (await self._open()).run(gang, entry, ranks, devices)

    async def ended(self, gang: str) -> Ended:
        return await self.keeper.ended(gang)

    async def stop(self, gang: str, grace_s: float) -> None:
        await self.keeper.stop(gang, grace_s)

    async def close(self) -> None:
        if self.opening is not None:
            await self.opening
            await self.keeper.close()


class _RayHost:
    """One node as the life of a gang sees it: calls to its agent, and what their failure means."""

    def __init__(self, node: str, name: str, address: str, preload: Sequence[str]) -> None:
        self.node = node
        self.name = name
        self.address = address
        self.lost = False
        self.agent = (
            ray.remote(_NodeAgent)
            .options(
                num_cpus=0,
                max_restarts=0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
            )
            .remote(address, name, tuple(preload))
        )
        self._renewing = asyncio.get_running_loop().create_task(self._renew())

    async def _renew(self) -> None:
        """Say that we live, one call at a time, until the host is lost or closed.

        On this machine the end of the agent's socket says it at once, and a controller that is
        merely stopped for a while costs nothing.
        """
        if ipaddress.ip_address(self.address).is_loopback:
            return
        with contextlib.suppress(HostLost):
            while not self.lost:
                await self._answer(self.agent.renew.remote(_LEASE_S))
                await asyncio.sleep(_LEASE_S / 10)

    async def reserve(self, gang: str) -> int:
        return int(await self._answer(self.agent.reserve.remote(gang)))

    async def run(
        self, gang: str, entry: str, ranks: Sequence[Rank], devices: Sequence[str]
    ) -> dict[int, int]:
        pids: dict[int, int] = await self._answer(
            self.agent.run.remote(gang, entry, list(ranks), list(devices))
        )
        return pids

    async def ended(self, gang: str) -> Ended:
        ended: Ended = await self._answer(self.agent.ended.remote(gang))
        return ended

    async def stop(self, gang: str, grace_s: float) -> None:
        await self._answer(self.agent.stop.remote(gang, grace_s))

    async def close(self) -> None:
        with contextlib.suppress(HostLost):
            await self._answer(self.agent.close.remote())
        self.abandon()

    def abandon(self) -> None:
        self._renewing.cancel()
        ray.kill(self.agent)

    async def _answer(self, call: Any) -> Any:
        try:
            return await call
        except ray.exceptions.RayTaskError as error:
            # The agent answered with an exception of its own.
            cause = error.cause
            self.lost = self.lost or isinstance(cause, HostLost)
            raise (cause if isinstance(cause, (HostLost, ClusterError)) else error) from None
        except ray.exceptions.RayError as error:
            self.lost = True
            reason = str(error).strip().splitlines()[0]
            raise HostLost(f"{self.name}: the node or its agent is gone ({reason})") from None


@dataclass(eq=False, slots=True)
class _Waiting:
    """An attempt in the queue."""

    gang: Gang
    seated: asyncio.Future[Placement]


@dataclass(eq=False, slots=True)
class _Idle:
    """A placement that waits for the next attempt of its shape."""

    placement: Placement
    expiry: asyncio.TimerHandle = field(repr=False)


class RayCluster(GangCluster):
    """Gangs on Ray.

    Without an address a private Ray is started on this machine: loopback only, no dashboard, an
    own token, its files removed at the end; it dies with this process. With an address (``auto``,
    ``host:port``) a running Ray is joined, and left as it was. ``num_cpus`` and ``num_gpus`` are
    for a private Ray. ``preload`` names what keepers import ahead (see
    :func:`ablate.keeper.import_ahead`); the default is what the training worker asks for.

    Raises:
        ClusterError: this process uses a Ray already, or there is none at the address.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        num_cpus: float | None = None,
        num_gpus: int | None = None,
        preload: Sequence[str] | None = None,
    ) -> None:
        if ray.is_initialized():
            raise ClusterError("this process is connected to a Ray already; close that one first")
        super().__init__()
        self._preload = _PRELOAD if preload is None else tuple(preload)
        self._folder: Path | None = None
        self._estate: Estate | None = None
        self._hosts: dict[str, _RayHost] = {}
        self._seen: dict[str, dict[str, Any]] = {}
        self._aside: set[str] = set()
        self._queue: deque[_Waiting] = deque()
        self._asking: tuple[Gang, asyncio.Task[None]] | None = None
        self._idle: list[_Idle] = []
        self._leaving: set[asyncio.Task[None]] = set()
        try:
            self._call(self._connect(address, num_cpus, num_gpus))
        except BaseException:
            self.close()
            raise

    async def _connect(
        self, address: str | None, num_cpus: float | None, num_gpus: int | None
    ) -> None:
        """Start or join Ray. In the cluster's thread: Ray's processes die with the one that starts
        them, and Ray must not take SIGTERM from the main thread's owner."""
        logging.getLogger("ray").setLevel(logging.ERROR)
        quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
        # Ray would print its view of a lost node on standard output, where --json goes.
        worker: Any = ray._private.worker
        worker._worker_logs_enabled = False
        if address is not None:
            if "://" in address:
                raise ClusterError(
                    f"{address} is an address for Ray Client; run where the Ray is, with auto or "
                    "host:port"
                )
            try:
                ray.init(address=address, **quiet)
            except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
                raise ClusterError(f"no Ray to join at {address}: {error}") from error
            _refuse_open_door(str(ray.get_runtime_context().gcs_address))
            return
        before = psutil.Process().children(recursive=True)
        self._folder = _private_folder()
        with _loopback_only():
            ray.init(
                address="local",
                num_cpus=num_cpus,
                num_gpus=num_gpus,
                include_dashboard=False,
                object_store_memory=_OBJECT_STORE_BYTES,
                _node_ip_address="127.0.0.1",
                _temp_dir=str(self._folder),
                _system_config={
                    # Ray would kill the agent when a rank fills the memory; the kernel takes the
                    # rank itself.
                    "memory_monitor_refresh_ms": 0,
                    "prestart_worker_first_driver": False,
                },
                **quiet,
            )
        # Ray's own agents outlive a killed driver by a minute, its folder for ever.
        processes = psutil.Process().children(recursive=True)
        self._estate = Estate(
            owner=_identity(psutil.Process()),
            processes=tuple(_identity(process) for process in processes if process not in before),
            folder=str(self._folder),
        )
        for node in self._machines():
            self._host(node)  # starts to import ahead

    # -- what there is ---------------------------------------------------------------------------

    def _machines(self) -> dict[str, dict[str, Any]]:
        """Nodes now alive, by node id; remembers every node it ever saw."""
        alive = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
        self._seen |= alive
        return alive

    def capacity(self, gang: Gang) -> Capacity:
        """Total counts every node seen so far: one that was lost may be replaced."""
        alive = self._machines()
        usable = {n: facts for n, facts in self._seen.items() if n not in self._aside}
        seen = {self._name(node): facts["Resources"] for node, facts in usable.items()}
        total = count_gangs(gang, list(seen.values()))
        # Idle groups are given up, or over, to whoever comes.
        free = {
            node: {kind: float(left.get(kind, 0.0)) for kind in ("CPU", "GPU")}
            for node, left in ray._private.state.available_resources_per_node().items()
            if node in alive and node in usable
        }
        for idle in list(self._idle):
            held = idle.placement.gang
            for seat in idle.placement.seats:
                if isinstance(seat.host, _RayHost) and seat.host.node in free:
                    free[seat.host.node]["CPU"] += held.cpus_per_worker
                    free[seat.host.node]["GPU"] += held.gpus_per_worker
        answering = [facts["Resources"] for node, facts in usable.items() if node in alive]
        return Capacity(
            total,
            min(total, count_gangs(gang, list(free.values()))),
            explain_shortage(gang, seen),
            explain_shortage(gang, {self._name(n): left for n, left in free.items()}, now=True),
            away=total - count_gangs(gang, answering),
        )

    def _host(self, node: str) -> _RayHost:
        host = self._hosts.get(node)
        if host is None or host.lost:
            if host is not None:
                host.abandon()
            if node not in self._seen:
                self._machines()
            address = self._seen[node]["NodeManagerAddress"]
            host = self._hosts[node] = _RayHost(node, self._name(node), address, self._preload)
            if self._estate is not None:
                host.agent.inherit.remote(self._estate)
        return host

    def _name(self, node: str) -> str:
        """A node's host name; with a piece of its id where several nodes share one machine."""
        name = str(self._seen[node]["NodeManagerHostname"])
        twins = [n for n, facts in self._seen.items() if facts["NodeManagerHostname"] == name]
        return name if twins == [node] else f"{name}/{node[:6]}"

    def set_aside(self, node: str, gang: Gang) -> bool:
        return self._call(self._set_aside(node, gang))

    async def _set_aside(self, name: str, gang: Gang) -> bool:
        aside = {node for node in self._machines() if self._name(node) == name} | self._aside
        left = [facts["Resources"] for node, facts in self._seen.items() if node not in aside]
        if not count_gangs(gang, left):
            return False
        self._aside = aside
        if self._asking is not None:  # for any node
            self._asking[1].cancel()
            self._asking = None
        for idle in list(self._idle):
            if not self._stands(idle.placement):
                self._drop(idle)
        self._serve_queue()
        return True

    # -- seats -----------------------------------------------------------------------------------

    async def _place(self, gang: Gang) -> Placement:
        waiting = _Waiting(gang, asyncio.get_running_loop().create_future())
        self._queue.append(waiting)
        self._serve_queue()
        try:
            return await waiting.seated
        except asyncio.CancelledError:
            if waiting in self._queue:
                self._queue.remove(waiting)
                self._serve_queue()
            elif not waiting.seated.cancelled():  # seated in the same turn of the loop
                self._offer(waiting.seated.result())
            raise

    def _serve_queue(self) -> None:
        """Seat the head of the queue from an idle group; else ask Ray for a new one."""
        while self._queue:
            gang = self._queue[0].gang
            if self._queue[0].seated.cancelled():
                self._queue.popleft()
                continue
            if not (fitting := [idle for idle in self._idle if idle.placement.gang == gang]):
                break
            if not self._stands(fitting[0].placement):
                self._drop(fitting[0])
                continue
            self._wake(fitting[0])
            self._queue.popleft().seated.set_result(fitting[0].placement)
        asked = self._asking[0] if self._asking else None
        wanted = self._queue[0].gang if self._queue else None
        if asked == wanted:
            return
        if self._asking is not None:
            self._asking[1].cancel()
            self._asking = None
        if wanted is not None:
            for idle in list(self._idle):  # of another shape: the head comes first
                self._drop(idle)
            self._asking = (wanted, self._loop.create_task(self._ask(wanted)))

    async def _ask(self, gang: Gang) -> None:
        """Wait for a new group, and give it to the head of the queue."""
        bundle: dict[str, float] = {"CPU": gang.cpus_per_worker}
        if gang.gpus_per_worker:
            bundle["GPU"] = gang.gpus_per_worker
        where = {"ray.io/node-id": f"!in({','.join(sorted(self._aside))})"} if self._aside else {}
        group = placement_group(
            [bundle] * gang.workers,
            strategy=gang.strategy,
            bundle_label_selector=[where] * gang.workers,
        )
        try:
            await group.ready()
            placement = await self._seat(gang, group)
        except (HostLost, ray.exceptions.RayError):
            # A node went away between its promise and its answer: ask again.
            remove_placement_group(group)
            await asyncio.sleep(_RETRY_S)
            self._asking = None
            self._serve_queue()
            return
        except BaseException:
            leaving = self._loop.create_task(self._give_up(group))
            self._leaving.add(leaving)
            leaving.add_done_callback(self._leaving.discard)
            raise
        self._asking = None
        self._offer(placement)

    async def _give_up(self, group: Any) -> None:
        """Remove a group that may be in the making.

        Ray 2.60 never gives back the seats of one that is removed between their promise and the
        group's completion, which follows within milliseconds; so that is waited for.
        """
        with contextlib.suppress(TimeoutError, ray.exceptions.RayError):
            await asyncio.wait_for(group.ready(), _SETTLE_S)
        remove_placement_group(group)

    async def _seat(self, gang: Gang, group: Any) -> Placement:
        nodes = placement_group_table(group)["bundles_to_node_id"]
        if len(nodes) < gang.workers:
            raise HostLost("a node left while the group was being placed")
        # Bundles of one node next to each other, nodes in the order Ray gave them.
        arrival = list(dict.fromkeys(nodes[i] for i in range(gang.workers)))
        bundles = sorted(range(gang.workers), key=lambda i: (arrival.index(nodes[i]), i))
        devices: list[tuple[str, ...]] = [()] * gang.workers
        if gang.gpus_per_worker:
            devices = await asyncio.gather(*(_devices_of(group, i, gang) for i in bundles))
        seats = [Seat(self._host(nodes[i]), own) for i, own in zip(bundles, devices, strict=True)]
        return Placement(gang, tuple(seats), lease=group)

    def _offer(self, placement: Placement) -> None:
        """Keep a placement for the next attempt of its shape, which may be waiting."""
        expiry = self._loop.call_later(_IDLE_S, self._expire, placement)
        self._idle.append(_Idle(placement, expiry))
        self._serve_queue()

    def _expire(self, placement: Placement) -> None:
        for idle in self._idle:
            if idle.placement is placement:
                return self._drop(idle)

    def _wake(self, idle: _Idle) -> None:
        idle.expiry.cancel()
        self._idle.remove(idle)

    def _drop(self, idle: _Idle) -> None:
        self._wake(idle)
        remove_placement_group(idle.placement.lease)

    async def _release(self, placement: Placement) -> None:
        if self._stands(placement):
            self._offer(placement)
        else:
            remove_placement_group(placement.lease)
            self._serve_queue()

    def _stands(self, placement: Placement) -> bool:
        """Every node of the placement is alive, in use, and answers through its agent."""
        usable = self._machines().keys() - self._aside
        hosts = [seat.host for seat in placement.seats if isinstance(seat.host, _RayHost)]
        return all(host.node in usable and not host.lost for host in hosts)

    async def _shut_down(self) -> None:
        if ray.is_initialized():
            if self._asking is not None:
                self._asking[1].cancel()
                await asyncio.wait([self._asking[1]])
            if self._leaving:
                await asyncio.wait(self._leaving)
            for idle in list(self._idle):
                self._drop(idle)
            await asyncio.gather(*(host.close() for host in self._hosts.values()))
            ray.shutdown()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


async def _devices_of(group: Any, bundle: int, gang: Gang) -> tuple[str, ...]:
    """The accelerators a bundle holds. They belong to it until the group is removed."""
    task = ray.remote(_list_devices).options(
        num_cpus=0,
        num_gpus=gang.gpus_per_worker,
        scheduling_strategy=PlacementGroupSchedulingStrategy(
            group, placement_group_bundle_index=bundle
        ),
    )
    return tuple(await task.remote())


def _list_devices() -> list[str]:
    ids: dict[str, list[str]] = ray.get_runtime_context().get_accelerator_ids()
    return ids["GPU"]


def _refuse_open_door(address: str) -> None:
    """Whoever reaches a Ray without authentication can run anything as us.

    Raises:
        ClusterError: the Ray is not on loopback, and this process does not authenticate.
    """
    host = address.rpartition(":")[0].strip("[]")
    if ipaddress.ip_address(host).is_loopback:
        return
    if os.environ.get("RAY_AUTH_MODE") == "token" or os.environ.get(INSECURE) == "1":
        return
    raise ClusterError(
        f"the Ray at {address} listens beyond this machine, and RAY_AUTH_MODE is not token: anyone "
        "who reaches the port can run programs as you. Start Ray with RAY_AUTH_MODE=token and a "
        "secret in RAY_AUTH_TOKEN on every node (launch/ has it for each place), or, on a network "
        f"that you trust, set {INSECURE}=1."
    )


def _identity(process: psutil.Process) -> tuple[int, float]:
    return process.pid, process.create_time()


def _private_folder() -> Path:
    """A folder for a private Ray's sockets and logs, after removing those of dead processes.

    The name is short: the path of a Unix socket holds 107 bytes.
    """
    base = Path(tempfile.gettempdir())
    if len(str(base)) > 24:
        base = Path("/tmp")
    for old in base.glob("ablate-ray-*-*"):
        owner = old.name.split("-")[2]
        if owner.isdigit() and not psutil.pid_exists(int(owner)):
            shutil.rmtree(old, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"ablate-ray-{os.getpid()}-", dir=base))


@contextlib.contextmanager
def _loopback_only() -> Iterator[None]:
    """Start Ray on 127.0.0.1, with a token, silent.

    Ray replaces 127.0.0.1 by the address of a network card unless it believes that it cannot form
    a cluster (`ray._private.services.resolve_ip_for_localhost`), and listens on every card unless
    its address is exactly 127.0.0.1. Ray turns token authentication on when a token is there.
    """
    environment = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_AUTH_TOKEN": os.environ.get("RAY_AUTH_TOKEN") or _TOKEN,
    }
    before = {name: os.environ.get(name) for name in (*environment, "RAY_ADDRESS")}
    constants: Any = ray._private.ray_constants
    can_cluster = constants.ENABLE_RAY_CLUSTER
    os.environ.update(environment)
    os.environ.pop("RAY_ADDRESS", None)  # asked for a private one
    constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        constants.ENABLE_RAY_CLUSTER = can_cluster
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


# One per process: Ray reads it once.
_TOKEN = secrets.token_hex(32)

# RayCluster is a Cluster; mypy checks it here, where it is defined.
_: type[Cluster] = RayCluster
