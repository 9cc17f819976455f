"""The Cluster contract on Ray: a private one on this machine, or one that is already running.

Ray is asked for seats: one placement group per gang, so a gang is placed as a whole or waits. The
ranks themselves are forked by the keeper of each machine (:mod:`ablate.cluster.keeper`), which
lives behind one light actor per node, so no rank pays for Ray's or torch's start. A group
is handed from one attempt to the next of the same shape, because Ray needs up to a second to see
freed seats.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Collection, Coroutine, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import ray
import ray._private.state
import ray.exceptions

from ablate.cluster.contract import Capacity, Cluster, Shape
from ablate.cluster.gang import Gang, Host
from ablate.cluster.gang_cluster import GangCluster
from ablate.cluster.keeper.wire import Estate
from ablate.cluster.ray_doors import join, start_private
from ablate.cluster.ray_head import watch_head
from ablate.cluster.ray_host import RayHost
from ablate.cluster.ray_nodes import Nodes
from ablate.cluster.ray_seats import Seats
from ablate.errors import ClusterError

# A notice is acted on within so long,
_DRAIN_POLL_S = 1.0
# A node on which nothing was placed for so long is let go: an actor there makes it look busy to an
# autoscaler.
_UNUSED_S = 120.0
# leaves this long, of a short one this part, to the processes' own end,
_DRAIN_MARGIN_S, _DRAIN_MARGIN_SHARE = 3.0, 0.25
# and where it names no deadline, trials have this long for a checkpoint.
_DRAIN_GRACE_S = 120.0
# So long they have when Ray has ended on the node of its head, and not yet the head.
_GONE_GRACE_S = 25.0


class RayCluster(GangCluster):
    """Gangs on Ray.

    Without an address a private Ray is started on this machine: loopback only, no dashboard, an
    own token, its files removed at the end; it dies with this process. With an address (``auto``,
    ``host:port``) a running Ray is joined, and left as it was. ``num_cpus`` and ``num_gpus`` are
    for a private Ray. ``preload`` names what keepers import ahead (see
    :func:`ablate.cluster.keeper.rank.import_ahead`).
    Seats that have been ours for ``turn_s`` are given back when others wait for some on this Ray.

    Raises:
        ClusterError: this process uses a Ray already, or there is none at the address.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        num_cpus: float | None = None,
        num_gpus: int | None = None,
        preload: Sequence[str] = (),
        turn_s: float = 600.0,
    ) -> None:
        if ray.is_initialized():
            raise ClusterError("this process is connected to a Ray already; close that one first")
        super().__init__()
        self._preload = tuple(preload)
        self._estate: Estate | None = None
        self._hosts: dict[str, RayHost] = {}
        self._unused: dict[str, float] = {}
        """Since when nothing was placed on a node, on the monotonic clock."""
        self._nodes = Nodes()
        self._home: dict[str, str] = {}
        """Nodes without which this launch cannot go on, and what each is to it."""
        self._end: tuple[float, str] | None = None
        """When everything must have ended (on the monotonic clock) because one of them goes, and
        what befell it."""
        self._seats = Seats(self._nodes, host=self._host, keep=self._keep, turn_s=turn_s)
        self._leaving: set[asyncio.Task[None]] = set()
        self._watching: list[asyncio.Task[None]] = []
        try:
            self._call(self._connect(address, num_cpus, num_gpus))
        except BaseException:
            self.close()
            raise

    async def _connect(
        self, address: str | None, num_cpus: float | None, num_gpus: int | None
    ) -> None:
        """In the cluster's thread: Ray's processes die with the one that starts them, and Ray must
        not take SIGTERM from the main thread's owner."""
        if address is not None:
            join(address)
            self._nodes.look_for_autoscaler()
            head = str(ray.get_runtime_context().gcs_address)
            self._nodes.look()
            self._home = self._nodes.home(str(ray.get_runtime_context().get_node_id()))
            for node in self._home:
                self._host(node)  # a drained node without one of ours goes at once, the head too
            leave = partial(self._leave_all, why="Ray's head does not answer")
            watch = watch_head(head, tell=self._hear, leave=leave)
            self._watching = [self._loop.create_task(w) for w in (self._watch_drains(), watch)]
            return
        self._estate = start_private(num_cpus, num_gpus)
        for node in self._nodes.look():
            self._host(node)  # starts to import ahead

    # -- what there is ---------------------------------------------------------------------------

    def capacity(self, shape: Shape) -> Capacity:
        """Total counts every node seen so far, as one that was lost may be replaced, and some more
        where Ray's autoscaler is at work."""
        room = self._nodes.capacity(shape, self._seats.idle())
        return replace(room, ours=self._seats.holds_any())

    def _host(self, node: str) -> RayHost:
        host = self._hosts.get(node)
        if host is None or host.lost:
            if host is not None:
                host.abandon()
            address, port = self._nodes.door(node)
            name = self._nodes.name(node)
            ahead = self._preload if self._nodes.holds_seats(node) else ()
            host = RayHost(node, name, address, raylet_port=port, preload=ahead)
            self._hosts[node] = host
            if self._estate is not None:
                host.agent.inherit.remote(self._estate)
        return host

    def set_aside(self, node: str, shape: Shape) -> bool:
        return self._call(self._set_aside(node, shape))

    async def _set_aside(self, name: str, shape: Shape) -> bool:
        if not self._nodes.set_aside(name, shape):
            return False
        self._seats.reconsider()
        return True

    # -- nodes that will be taken away -----------------------------------------------------------

    async def _watch_drains(self) -> None:
        """Let the trials of machines that will be taken away write a checkpoint and go elsewhere.

        Ray knows of a notice at once (SIGTERM to a node, `ray drain-node`, an autoscaler): it says
        until when the node has time, in milliseconds of the time of day, 0 for no limit.
        """
        while True:
            await asyncio.sleep(_DRAIN_POLL_S)
            if self._nodes.silent:
                continue
            try:
                told = await asyncio.to_thread(ray._private.state.state.get_draining_nodes)
                nodes = await asyncio.to_thread(ray.nodes)
                await asyncio.to_thread(self._nodes.look_for_autoscaler)
            except Exception:  # whatever Ray raises while its head is away
                continue
            self._let_go()
            fresh = told.keys() - self._nodes.draining
            self._nodes.draining = frozenset(told)
            self._look_home(told, {node["NodeID"] for node in nodes if node["Alive"]})
            if not fresh:
                continue
            self._seats.reconsider()
            for node in fresh - self._home.keys():
                self._keep(self._leave(node, _grace_s(told[node])))

    def _look_home(self, told: Mapping[str, int], alive: Collection[str]) -> None:
        """Once a node goes that this launch cannot do without, end everything in good order.

        Its own: Ray then ends what a launch has on all nodes. That of the head: all of Ray goes
        with it.
        """
        for node, what in self._home.items():
            if self._end is not None or (node in alive and node not in told):
                continue
            grace_s = _grace_s(told[node]) if node in told else _GONE_GRACE_S
            befell = f"{self._nodes.name(node)} is {'taken away' if node in told else 'gone'}"
            self._end = time.monotonic() + grace_s, befell
            self._nodes.ends = (
                f"{befell}, and {what}. Launch again, on a Ray that stays: trials go on from their "
                "checkpoints."
            )
        if self._end is None:
            return
        by, befell = self._end
        left_s = max(0.0, by - time.monotonic())
        self._leave_all(left_s, why=befell)
        for life in [life for life in self._lives.values() if not life.pids]:
            life.stop(left_s)  # it waits for seats, or is being forked

    def _let_go(self) -> None:
        """Close the agents of nodes that have not been used for a while; they open on demand."""
        now = time.monotonic()
        used = self._seats.nodes_in_use() | self._home.keys()
        self._unused = {node: self._unused.get(node, now) for node in self._hosts.keys() - used}
        for node in [n for n, since in self._unused.items() if now - since > _UNUSED_S]:
            self._keep(self._hosts.pop(node).close())

    async def _leave(self, node: str, grace_s: float) -> None:
        """Stop the gangs with a rank on a node, then let go of it: with nothing of Ray's on it the
        node can end before its deadline."""
        held = [life for life in self._lives.values() if _has_rank(life.hosts, node)]
        for life in held:
            life.vacate(grace_s, f"{self._nodes.name(node)} is taken away")
        while any(_has_rank(life.hosts, node) for life in held):
            await asyncio.sleep(0.1)
        if host := self._hosts.pop(node, None):
            await host.close()

    def _hear(self, silent: bool) -> None:
        self._seats.hear(silent=silent)

    def _leave_all(self, grace_s: float, *, why: str) -> bool:
        """Ask every rank to stop; whether any is left."""
        running = [life for life in self._lives.values() if life.hosts]
        for life in running:
            life.vacate(grace_s, why)
        return bool(running)

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        """Run in the background; waited for when the cluster closes."""
        task = self._loop.create_task(work)
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    # -- for the life of gangs -------------------------------------------------------------------

    async def _place(self, shape: Shape) -> Gang:
        return await self._seats.take(shape)

    async def _release(self, gang: Gang) -> None:
        for seat in gang.seats:
            if isinstance(seat.host, RayHost) and seat.host.stuck:
                self._nodes.refuse(seat.host.node, f"it has {seat.host.stuck}")
        await self._seats.release(gang)

    async def _shut_down(self) -> None:
        if ray.is_initialized():
            for watching in self._watching:
                watching.cancel()
            await self._seats.close()
            if self._leaving:
                await asyncio.wait(self._leaving)
            await asyncio.gather(*(host.close() for host in self._hosts.values()))
            ray.shutdown()
        if self._estate is not None:
            shutil.rmtree(self._estate.folder, ignore_errors=True)


def _grace_s(until_ms: int) -> float:
    """How long the trials of a node have that is told to leave until then (0: not said)."""
    until_s = until_ms / 1000 - time.time() if until_ms else _DRAIN_GRACE_S
    return max(1.0, until_s - min(_DRAIN_MARGIN_S, _DRAIN_MARGIN_SHARE * until_s))


def _has_rank(hosts: Iterable[Host], node: str) -> bool:
    return any(isinstance(host, RayHost) and host.node == node for host in hosts)


# RayCluster is a Cluster; mypy checks it here, where it is defined.
_: type[Cluster] = RayCluster
