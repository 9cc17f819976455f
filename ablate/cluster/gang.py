"""One gang, from its seats to its last event.

A gang is what an attempt's shape becomes once every worker has a seat. Its ranks are forked by the
keeper of each machine (:mod:`ablate.cluster.keeper`), watched, and ended together.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from ablate.cluster.contract import Attempt, GangEvent, Shape
from ablate.cluster.keeper.wire import Ended, HostLost, Rank, describe_code
from ablate.errors import ClusterError
from ablate.trial.identity import ORDERLY

# A shared disk that hangs must not hold what moves all gangs.
_READ_S = 5.0


class Host(Protocol):
    """One machine as the life of a gang sees it; :class:`ablate.cluster.keeper.Keeper` is one."""

    name: str
    address: str

    async def reserve(self, gang: str) -> int: ...

    async def run(
        self, gang: str, entry: str, ranks: Sequence[Rank], devices: Sequence[str]
    ) -> dict[int, int]: ...

    async def ended(self, gang: str) -> Ended: ...

    async def stop(self, gang: str, grace_s: float) -> None: ...

    async def fence(self) -> None:
        """After :class:`HostLost`: wait until no rank of it can be alive."""


@dataclass(frozen=True, slots=True)
class Seat:
    """Where one rank sits, and the accelerators that are its own."""

    host: Host
    devices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Gang:
    """One seat per rank, ranks of one machine next to each other, and what holds the seats."""

    shape: Shape
    seats: tuple[Seat, ...]
    lease: Any = None


@dataclass(slots=True)
class Life:
    """An attempt from start() to its last event. Touched by the cluster's loop alone."""

    attempt: Attempt
    tell: Callable[[GangEvent], None]
    task: asyncio.Task[None] | None = None
    placing: asyncio.Task[Gang] | None = None
    hosts: list[Host] = field(default_factory=list)
    """Machines with ranks of it that have not all ended."""
    pids: tuple[int, ...] = ()
    kill_at: float | None = None
    """Monotonic time a stop() leaves it; None when nobody asked."""
    leaving: str = ""
    """Why its machines are wanted back, where they are."""
    orders: set[asyncio.Task[None]] = field(default_factory=set)

    @property
    def name(self) -> str:
        """Names the gang to the hosts; attempts fence, so it is unique."""
        return f"{self.attempt.trial_id}/{self.attempt.number}"

    def stop(self, grace_s: float) -> None:
        """End it, wherever it is."""
        self.kill_at = min(self.kill_at or math.inf, time.monotonic() + grace_s)
        if self.placing is not None:
            self.placing.cancel()
        self.stop_ranks(grace_s)

    def vacate(self, grace_s: float, why: str) -> None:
        """Its machines are wanted back; without time enough for a checkpoint it is lost."""
        self.leaving = why
        self.stop_ranks(grace_s)

    def stop_ranks(self, grace_s: float) -> None:
        """End its ranks, though nobody asked for the trial's end."""
        for host in self.hosts:
            order = asyncio.get_running_loop().create_task(_try_stop(host, self.name, grace_s))
            self.orders.add(order)
            order.add_done_callback(self.orders.discard)

    async def live(self, release: Callable[[Gang], Awaitable[None]]) -> GangEvent:
        """From queue to last event: every way out gives one, when nothing of it is alive."""
        assert self.placing is not None
        seats: Sequence[Seat] = ()
        gang: Gang | None = None
        try:
            gang = await self.placing
            self.placing = None
            seats = gang.seats
            event = await self._run(seats)
        except asyncio.CancelledError:
            event = self.event("exited", "stopped before it was placed", codes={})
        except HostLost as error:
            await _fence({id(seat.host): seat.host for seat in seats}.values())
            event = self.event("lost", f"lost before it ran: {error}", seats=seats, codes={})
        except ClusterError as error:
            event = self.event("lost", f"could not start: {error}", seats=seats, codes={})
        if gang is not None:
            await release(gang)
        return event

    async def _run(self, seats: Sequence[Seat]) -> GangEvent:
        attempt, name = self.attempt, self.name
        shares = _by_host(seats)
        first = seats[0].host
        port = await first.reserve(name)
        started = await self._fork(shares, seats, first.address, port)
        self.hosts = [host for host, _ in shares]
        pids = {rank: pid for share in started for rank, pid in share.items()}
        self.pids = tuple(pids[rank] for rank in range(attempt.shape.workers))
        if self.kill_at is not None:  # stop() came while the ranks were being forked
            self.stop_ranks(max(0.0, self.kill_at - time.monotonic()))
        hosts = ", ".join(host.name for host in self.hosts)
        self.tell(self.event("placed", f"{attempt.shape} on {hosts}", seats=seats))
        return await self._watch(seats)

    async def _fork(
        self,
        shares: Sequence[tuple[Host, Sequence[int]]],
        seats: Sequence[Seat],
        address: str,
        port: int,
    ) -> list[dict[int, int]]:
        """Fork the ranks on every host; when one host cannot, on none."""
        attempt, name = self.attempt, self.name
        calls = []
        for host, members in shares:
            devices = [device for rank in members for device in seats[rank].devices]
            ranks = [
                Rank(
                    rank,
                    _rank_environment(attempt, seats, rank, address, port),
                    str(attempt.log_of(rank)),
                )
                for rank in members
            ]
            calls.append(host.run(name, attempt.entry, ranks, devices))
        results = await asyncio.gather(*calls, return_exceptions=True)
        failures = [result for result in results if isinstance(result, BaseException)]
        if failures:
            await asyncio.gather(*(_try_stop(host, name, 0.0) for host, _ in shares))
            begun = [
                host.ended(name)
                for (host, _), result in zip(shares, results, strict=True)
                if not isinstance(result, BaseException)
            ]
            await asyncio.gather(*begun, return_exceptions=True)
            raise failures[0]
        return [result for result in results if not isinstance(result, BaseException)]

    async def _watch(self, seats: Sequence[Seat]) -> GangEvent:
        """Wait for every host; the first that reports a crash or is lost ends the others."""
        codes: dict[int, int] = {}
        failed: int | None = None
        reason = ""
        losses: list[str] = []
        lost: list[Host] = []
        waits = {asyncio.ensure_future(host.ended(self.name)): host for host in self.hosts}
        while waits:
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            ended = [waits.pop(wait) for wait in done]
            for wait, host in zip(done, ended, strict=True):
                try:
                    share = wait.result()
                except HostLost as error:
                    losses.append(str(error))
                    lost.append(host)
                    continue
                codes |= share.codes
                if share.stuck:
                    losses.append(f"{host.name} has {share.stuck}")
                if failed is None and not losses:
                    failed, reason = share.failed, share.reason
            self.hosts = [host for host in self.hosts if host not in ended]
            if failed is not None or losses:
                self.stop_ranks(0.0)
        await _fence(lost)
        if losses:
            return self.event("lost", "; ".join(losses), seats=seats, codes=codes)
        stopped = self.kill_at is not None
        log = "" if failed is None else await _last_line(self.attempt.log_of(failed))
        detail = _describe_end(self.attempt, codes, failed, reason, log, stopped=stopped)
        if self.leaving and not ORDERLY.issuperset(codes.values()):
            why = f"{self.leaving}, and the time was too short for a checkpoint: {detail}"
            return self.event("lost", why, seats=seats, codes=codes)
        return self.event("exited", detail, seats=seats, codes=codes, failed_rank=failed)

    def event(
        self,
        kind: Literal["placed", "exited", "lost"],
        detail: str,
        *,
        seats: Sequence[Seat] = (),
        codes: Mapping[int, int] | None = None,
        failed_rank: int | None = None,
    ) -> GangEvent:
        return GangEvent(
            trial_id=self.attempt.trial_id,
            number=self.attempt.number,
            kind=kind,
            detail=detail,
            time=time.time(),
            nodes=tuple(seat.host.name for seat in seats),
            pids=self.pids,
            exit_codes=()
            if codes is None
            else tuple(codes.get(rank) for rank in range(self.attempt.shape.workers)),
            failed_rank=failed_rank,
            stopped=self.kill_at is not None,
        )


async def _fence(hosts: Iterable[Host]) -> None:
    """A successor may write where ranks of lost hosts wrote, so nothing of those may be alive."""
    await asyncio.gather(*(host.fence() for host in hosts))


async def _try_stop(host: Host, name: str, grace_s: float) -> None:
    """Stop a gang on a host; when the host is gone, so is the gang."""
    with contextlib.suppress(HostLost):
        await host.stop(name, grace_s)


def _by_host(seats: Sequence[Seat]) -> list[tuple[Host, list[int]]]:
    """The ranks that sit on each host, hosts in the order of their lowest rank."""
    shares: list[tuple[Host, list[int]]] = []
    for rank, seat in enumerate(seats):
        for host, ranks in shares:
            if host is seat.host:
                ranks.append(rank)
                break
        else:
            shares.append((seat.host, [rank]))
    return shares


def _rank_environment(
    attempt: Attempt, seats: Sequence[Seat], rank: int, address: str, port: int
) -> dict[str, str]:
    """What torchrun would set, plus our own names.

    A rank sees all accelerators its gang has on the machine, its own at LOCAL_RANK *
    gpus_per_worker, as under torchrun; NCCL needs to see its neighbours for peer-to-peer copies.
    """
    neighbours = [r for r, seat in enumerate(seats) if seat.host is seats[rank].host]
    return {
        "OMP_NUM_THREADS": str(max(1, int(attempt.shape.cpus_per_worker))),
        **attempt.env,
        "RANK": str(rank),
        "WORLD_SIZE": str(len(seats)),
        "LOCAL_RANK": str(neighbours.index(rank)),
        "LOCAL_WORLD_SIZE": str(len(neighbours)),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        # As nvidia-smi counts them, which is asked whether they are free.
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "CUDA_VISIBLE_DEVICES": ",".join(d for r in neighbours for d in seats[r].devices),
        "ABLATE_TRIAL": str(attempt.folder),
        "ABLATE_ATTEMPT": str(attempt.number),
    }


def _describe_end(
    attempt: Attempt,
    codes: Mapping[int, int],
    failed: int | None,
    reason: str,
    last: str,
    *,
    stopped: bool,
) -> str:
    """A sentence; `last` is the last line of the log of the rank that failed."""
    if failed is None:
        words = sorted({describe_code(code) for code in codes.values()})
        why = f" ({reason})" if reason else ""
        return ("stopped: " if stopped else "") + f"all ranks ended with {' or '.join(words)}{why}"
    log = attempt.log_of(failed)
    if codes[failed] == -9:
        reason = reason or "not by us; often the kernel, out of memory"
    hint = f" ({reason})" if reason else ""
    others = " and the other ranks were killed" if attempt.shape.workers > 1 else ""
    return f"rank {failed} ended with {describe_code(codes[failed])}{hint}{others}; log: {log}" + (
        f"; its last line: {last}" if last else ""
    )


async def _last_line(log: Path) -> str:
    """The last line of a log that says something; empty where its disk does not answer."""
    loop = asyncio.get_running_loop()
    found: asyncio.Future[str] = loop.create_future()

    def answer(line: str) -> None:
        if not found.done():
            found.set_result(line)

    def read() -> None:
        line = _read_last_line(log)
        with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
            loop.call_soon_threadsafe(answer, line)

    # A thread of its own, and no pool: it may hang for ever, and nobody may wait for it then.
    threading.Thread(target=read, name="last-line", daemon=True).start()
    try:
        return await asyncio.wait_for(found, _READ_S)
    except TimeoutError:
        return ""


def _read_last_line(log: Path) -> str:
    """At most 300 characters."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, os.path.getsize(log) - 4096))
            lines = file.read().decode(errors="replace").split("\n")
    except OSError:
        return ""
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "")
