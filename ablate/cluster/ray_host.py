"""One Ray node as the life of a gang sees it: an actor there holds the node's keeper.

Who may go on is decided on the node. Its lease is renewed by the controller, which talks to the
agent directly, and by Ray's head, which says whether the node still counts as alive. So a
controller that is held for minutes costs nothing; a node that hears neither lets its ranks write a
checkpoint and ends them; a node that Ray has given up ends its ranks as soon as it hears of it. The
controller waits so long before it starts a successor (:meth:`RayHost.fence`).
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import time
from collections.abc import Mapping, Sequence
from typing import Any

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ablate.cluster.keeper.client import Keeper
from ablate.cluster.keeper.wire import Ended, Estate, HostLost, Rank
from ablate.errors import ClusterError
from ablate.records.provenance import code_of_here

# A node that hears nobody for so long stops its ranks,
_LEASE_S = 15.0
# which then have so long for a checkpoint.
_LEASE_GRACE_S = 30.0
# How old the controller's last word may be to renew a lease.
_HEARD_S = 5.0
_BEAT_S = 1.5
# From the loss of a node to the end of its last rank, whatever it still hears.
_FENCE_S = _LEASE_S + _HEARD_S + _LEASE_GRACE_S + 2.0
# An agent without ranks closes within this, or Ray no longer says what became of it.
_CLOSE_S = 10.0
# Ray's processes end so long after their raylet, and the ranks with them.
_FALL_S = 3.0


class _NodeAgent:
    """The actor on each node: the node's keeper, behind Ray's calls."""

    def __init__(self, address: str, name: str, preload: Sequence[str], leased: bool) -> None:
        self.keeper = Keeper(address=address, name=name, preload=preload)
        self.leased = leased
        self.opening: asyncio.Task[None] | None = None
        self.believing: asyncio.Task[None] | None = None
        self.heard = time.monotonic()

    async def _open(self) -> Keeper:
        if self.opening is None:
            self.opening = asyncio.create_task(self.keeper.open())
        await self.opening
        if self.leased and self.believing is None:
            self.believing = asyncio.create_task(self._believe())
        return self.keeper

    async def _believe(self) -> None:
        """Renew the lease while the controller or Ray's head says that this node counts."""
        node = ray.get_runtime_context().get_node_id()
        asking: asyncio.Task[bool | None] | None = None
        self.keeper.renew(_LEASE_S, grace_s=_LEASE_GRACE_S)
        while True:
            asking = asking or asyncio.create_task(asyncio.to_thread(_counts, node))
            await asyncio.wait({asking}, timeout=_BEAT_S)
            counts = None
            if asking.done():
                counts, asking = asking.result(), None
            if counts is False:
                return await self.keeper.close()
            if counts or time.monotonic() - self.heard < _HEARD_S:
                self.keeper.renew(_LEASE_S, grace_s=_LEASE_GRACE_S)
            await asyncio.sleep(_BEAT_S)

    async def code(self) -> dict[str, str]:
        """What ranks of this node would run."""
        return await asyncio.to_thread(code_of_here)

    async def inherit(self, estate: Estate) -> None:
        (await self._open()).inherit(estate)

    async def hear(self) -> None:
        """The controller lives."""
        self.heard = time.monotonic()
        await self._open()

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


def _counts(node: str) -> bool | None:
    """Whether Ray's head counts a node as alive; None when it does not answer."""
    try:
        return any(each["NodeID"] == node and each["Alive"] for each in ray.nodes())
    except Exception:  # whatever Ray raises while its head is away: the lease runs on
        return None


class RayHost:
    """One node as the life of a gang sees it: calls to its agent, and what their failure means."""

    def __init__(
        self, node: str, name: str, address: str, *, raylet_port: int, preload: Sequence[str]
    ) -> None:
        self.node = node
        self.name = name
        self.address = address
        self.raylet_port = raylet_port
        self.lost = False
        self.stuck = ""
        """Processes there that could not be killed."""
        self._keeper_died = False
        self._leased = not ipaddress.ip_address(address).is_loopback
        self._code: Mapping[str, str] | None = None
        self.agent = (
            ray.remote(_NodeAgent)
            .options(
                num_cpus=0,
                max_restarts=0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
            )
            .remote(address, name, tuple(preload), self._leased)
        )
        self._renewing = asyncio.get_running_loop().create_task(self._renew())

    async def _renew(self) -> None:
        """Say that we live, one call at a time, until the host is lost or closed.

        On this machine the end of the agent's socket says it at once.
        """
        with contextlib.suppress(HostLost):
            while self._leased and not self.lost:
                await self._answer(self.agent.hear.remote())
                await asyncio.sleep(_BEAT_S)

    async def code(self) -> Mapping[str, str]:
        """Versions of what ranks there would run, and a digest of ablate's own files."""
        if self._code is None:
            self._code = await self._answer(self.agent.code.remote())
        return self._code

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
        self.stuck = self.stuck or ended.stuck
        return ended

    async def stop(self, gang: str, grace_s: float) -> None:
        await self._answer(self.agent.stop.remote(gang, grace_s))

    async def fence(self) -> None:
        """After a loss: until no rank there can be alive.

        At once where the keeper's end was seen, soon where the node's raylet is seen to be gone;
        else (a cut cable, a raylet that hangs) when its lease and grace have passed.
        """
        if self._keeper_died or not self._leased or not self.lost:
            return
        deadline = time.monotonic() + _FENCE_S
        while time.monotonic() < deadline:
            if await _is_refused(self.address, self.raylet_port):
                return await asyncio.sleep(_FALL_S)
            await asyncio.sleep(1.0)

    async def close(self) -> None:
        with contextlib.suppress(HostLost, TimeoutError):
            await asyncio.wait_for(self._answer(self.agent.close.remote()), _CLOSE_S)
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
            self._keeper_died = isinstance(cause, HostLost)
            self.lost = self.lost or self._keeper_died
            raise (cause if isinstance(cause, (HostLost, ClusterError)) else error) from None
        except ray.exceptions.RayError as error:
            self.lost = True
            reason = str(error).strip().splitlines()[0]
            raise HostLost(f"{self.name}: the node or its agent is gone ({reason})") from None


async def _is_refused(address: str, port: int) -> bool:
    """Whether the machine is there and says that nothing listens; False when it is silent."""
    try:
        _, writer = await asyncio.wait_for(asyncio.open_connection(address, port), 1.0)
    except ConnectionRefusedError:
        return True
    except (OSError, TimeoutError):
        return False
    writer.close()
    return False
