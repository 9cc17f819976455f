"""Seats on Ray: one placement group per gang, handed from one attempt to the next of its shape."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import ray
import ray.exceptions
from ray.util.placement_group import (
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ablate.cluster.contract import Shape
from ablate.cluster.gang import Gang, Seat
from ablate.cluster.keeper.wire import HostLost
from ablate.cluster.ray_host import RayHost
from ablate.cluster.ray_nodes import AHEAD, Nodes
from ablate.records.provenance import code_of_here

_RETRY_S = 0.5
# An idle group keeps its seats this long for an attempt of the same shape.
_IDLE_S = 5.0
# A group that is given up has been completed by then, or waits for seats that are taken.
_SETTLE_S = 1.0


@dataclass(eq=False, slots=True)
class _Waiting:
    """An attempt in the queue."""

    shape: Shape
    seated: asyncio.Future[Gang]


@dataclass(eq=False, slots=True)
class _Idle:
    """A placed gang without an attempt, that waits for the next one of its shape."""

    gang: Gang
    expiry: asyncio.TimerHandle = field(repr=False)


class Seats:
    """The queue for seats, and the groups that wait for the next attempt. In the cluster's loop.

    `host` gives the machine of a node, `keep` runs what is waited for at the end.
    """

    def __init__(
        self,
        nodes: Nodes,
        *,
        host: Callable[[str], RayHost],
        keep: Callable[[Coroutine[Any, Any, None]], None],
        turn_s: float,
    ) -> None:
        self._nodes = nodes
        self._host = host
        self._keep = keep
        self._queue: deque[_Waiting] = deque()
        self._asking: list[asyncio.Task[None]] = []
        """For new groups, all of the shape of the queue's head."""
        self._asked: Shape | None = None
        self._idle: list[_Idle] = []
        self._taken: list[Gang] = []
        self._arriving = 0
        """Groups that Ray has placed, and whose machines are being made ready."""
        self._turn_s = turn_s
        self._since: dict[str, float] = {}
        """When each of our groups was placed, by Ray's id of it."""
        self._own: set[str] = set()
        """Groups that we ever asked for."""

    def idle(self) -> list[tuple[str, Shape]]:
        """Seats (node, what its worker takes) that are given up, or over, to whoever comes."""
        return [
            (seat.host.node, idle.gang.shape)
            for idle in list(self._idle)
            for seat in idle.gang.seats
            if isinstance(seat.host, RayHost)
        ]

    def holds_any(self) -> bool:
        """Whether Ray has given us any seats, their machines ready or not."""
        return bool(self._taken or self._idle or self._arriving)

    def nodes_in_use(self) -> set[str]:
        """Nodes with a seat that is taken, or kept for the next attempt."""
        gangs = [*self._taken, *(idle.gang for idle in self._idle)]
        hosts = [seat.host for gang in gangs for seat in gang.seats]
        return {host.node for host in hosts if isinstance(host, RayHost)}

    async def take(self, shape: Shape) -> Gang:
        """Wait for a gang, first come first served."""
        waiting = _Waiting(shape, asyncio.get_running_loop().create_future())
        self._queue.append(waiting)
        self._serve()
        try:
            gang = await waiting.seated
            self._taken.append(gang)
            return gang
        except asyncio.CancelledError:
            if waiting in self._queue:
                self._queue.remove(waiting)
                self._serve()
            elif not waiting.seated.cancelled():  # seated in the same turn of the loop
                self._offer(waiting.seated.result())
            raise

    def _serve(self) -> None:
        """Seat the head of the queue from an idle group; else ask Ray for a new one."""
        if self._nodes.silent or self._nodes.ends:
            return
        while self._queue:
            shape = self._queue[0].shape
            if self._queue[0].seated.cancelled():
                self._queue.popleft()
                continue
            if not (fitting := [idle for idle in self._idle if idle.gang.shape == shape]):
                break
            if not self._stands(fitting[0].gang):
                self._drop(fitting[0])
                continue
            self._wake(fitting[0])
            self._queue.popleft().seated.set_result(fitting[0].gang)
        wanted = self._queue[0].shape if self._queue else None
        if wanted != self._asked:
            self._ask_no_more()
        if wanted is None:
            return
        if not self._asking:
            for idle in list(self._idle):  # of another shape: the head comes first
                self._drop(idle)
        self._asked = wanted
        alike = len(list(takewhile(lambda waiting: waiting.shape == wanted, self._queue)))
        # An autoscaler sees only what is asked of Ray, and takes minutes for each of its rounds.
        at_once = min(alike, AHEAD if self._nodes.grows else 1)
        for task in self._asking[at_once:]:
            task.cancel()
        del self._asking[at_once:]
        while len(self._asking) < at_once:
            self._asking.append(asyncio.get_running_loop().create_task(self._ask(wanted)))

    def _ask_no_more(self) -> None:
        for task in self._asking:
            task.cancel()
        self._asking, self._asked = [], None

    def _has_asked(self) -> None:
        """The running task has asked in vain, or no longer asks."""
        task = asyncio.current_task()
        self._asking = [each for each in self._asking if each is not task]

    async def _ask(self, shape: Shape) -> None:
        """Wait for a new group, and give it to the head of the queue."""
        bundle: dict[str, float] = {"CPU": shape.cpus_per_worker}
        if shape.gpus_per_worker:
            bundle["GPU"] = shape.gpus_per_worker
        aside = sorted(self._nodes.aside | self._nodes.draining)
        where = dict(shape.labels)
        if aside:
            where["ray.io/node-id"] = f"!in({','.join(aside)})"
        group = placement_group(
            [bundle] * shape.workers,
            strategy=shape.strategy,
            bundle_label_selector=[where] * shape.workers,
        )
        self._own.add(group.id.hex())
        try:
            await group.ready()
            self._arriving += 1
            try:
                gang = await self._seat(shape, group)
            finally:
                self._arriving -= 1
        except (HostLost, ray.exceptions.RayError):
            # A node went away between its promise and its answer: ask again.
            remove_placement_group(group)
            await asyncio.sleep(_RETRY_S)
            self._has_asked()
            self._serve()
            return
        except BaseException:
            self._keep(self._give_up(group))
            raise
        self._has_asked()
        self._since[group.id.hex()] = time.monotonic()
        self._offer(gang)

    async def _give_up(self, group: Any) -> None:
        """Remove a group that may be in the making.

        Ray 2.60 never gives back the seats of one that is removed between their promise and the
        group's completion, which follows within milliseconds; so that is waited for.
        """
        with contextlib.suppress(TimeoutError, ray.exceptions.RayError):
            await asyncio.wait_for(group.ready(), _SETTLE_S)
        remove_placement_group(group)

    async def _seat(self, shape: Shape, group: Any) -> Gang:
        nodes = placement_group_table(group)["bundles_to_node_id"]
        if len(nodes) < shape.workers:
            raise HostLost("a node left while the group was being placed")
        # Bundles of one node next to each other, nodes in the order Ray gave them.
        arrival = list(dict.fromkeys(nodes[i] for i in range(shape.workers)))
        bundles = sorted(range(shape.workers), key=lambda i: (arrival.index(nodes[i]), i))
        devices: list[tuple[str, ...]] = [()] * shape.workers
        if shape.gpus_per_worker:
            devices = await asyncio.gather(*(_devices_of(group, i, shape) for i in bundles))
        for node in arrival:
            await _compare(self._host(node), self._nodes)
        seats = [Seat(self._host(nodes[i]), own) for i, own in zip(bundles, devices, strict=True)]
        return Gang(shape, tuple(seats), lease=group)

    def _offer(self, gang: Gang) -> None:
        """Keep a gang for the next attempt of its shape, which may be waiting."""
        expiry = asyncio.get_running_loop().call_later(_IDLE_S, self._expire, gang)
        self._idle.append(_Idle(gang, expiry))
        self._serve()

    def _expire(self, gang: Gang) -> None:
        for idle in self._idle:
            if idle.gang is gang and not self._nodes.silent:
                return self._drop(idle)

    def _wake(self, idle: _Idle) -> None:
        idle.expiry.cancel()
        self._idle.remove(idle)

    def _drop(self, idle: _Idle) -> None:
        self._wake(idle)
        self._give_back(idle.gang)

    def reconsider(self) -> None:
        """Nodes are not used any more: give up what stands on them, or may be placed there."""
        self._ask_no_more()  # it was for any node
        for idle in list(self._idle):
            if not self._stands(idle.gang):
                self._drop(idle)
        self._serve()

    def hear(self, *, silent: bool) -> None:
        """Ray's head has fallen silent, or answers again."""
        self._nodes.silent = silent
        if not silent:
            self.reconsider()

    async def close(self) -> None:
        """Give everything back."""
        if asking := self._asking:
            self._ask_no_more()
            await asyncio.wait(asking)
        for idle in list(self._idle):
            self._drop(idle)

    async def release(self, gang: Gang) -> None:
        """An attempt has ended; the next of its shape may have its seats."""
        self._taken.remove(gang)
        if self._stands(gang) and not await self._is_due(gang):
            return self._offer(gang)
        self._give_back(gang)
        self._serve()

    async def _is_due(self, gang: Gang) -> bool:
        """Whether others on this Ray wait, and these seats have been ours for a turn.

        A group that is handed on never shows Ray a free seat, so another study would get none
        before this one is done.
        """
        young = time.monotonic() - self._since[gang.lease.id.hex()] < self._turn_s
        if young or self._nodes.silent:
            return False
        try:
            table = await asyncio.to_thread(placement_group_table)
        except ray.exceptions.RayError:
            return False
        return any(
            facts["state"] == "PENDING" and name not in self._own for name, facts in table.items()
        )

    def _give_back(self, gang: Gang) -> None:
        self._since.pop(gang.lease.id.hex(), None)
        remove_placement_group(gang.lease)

    def _stands(self, gang: Gang) -> bool:
        """Every node of the gang is alive, in use, and answers through its agent."""
        usable = self._nodes.usable()
        hosts = [seat.host for seat in gang.seats if isinstance(seat.host, RayHost)]
        return all(host.node in usable and not host.lost for host in hosts)


async def _devices_of(group: Any, bundle: int, shape: Shape) -> tuple[str, ...]:
    """The accelerators a bundle holds. They belong to it until the group is removed."""
    task = ray.remote(_list_devices).options(
        num_cpus=0,
        num_gpus=shape.gpus_per_worker,
        scheduling_strategy=PlacementGroupSchedulingStrategy(
            group, placement_group_bundle_index=bundle
        ),
    )
    return tuple(await task.remote())


def _list_devices() -> list[str]:
    ids: dict[str, list[str]] = ray.get_runtime_context().get_accelerator_ids()
    return ids["GPU"]


async def _compare(host: RayHost, nodes: Nodes) -> None:
    """A node that runs other code would train something else under the same name.

    Raises:
        HostLost: it does, and is not used any more.
    """
    here, there = code_of_here(), await host.code()
    odd = [name for name in sorted({*here, *there}) if here.get(name) != there.get(name)]
    if odd:
        differs = "; ".join(
            f"{name} {there.get(name, 'missing')} there, {here.get(name, 'missing')} here"
            for name in odd
        )
        nodes.refuse(host.node, f"it runs other code than this launch: {differs}")
        raise HostLost(nodes.notes[host.node])
