"""Where gangs run: the Cluster contract, the life of a gang, and LocalCluster (this machine alone).

A cluster is asked to start attempts and tells what became of them. An attempt waits first come
first served until all its workers have a seat, its ranks are forked by the keeper of each machine
(:mod:`ablate.keeper`), and it ends with exactly one event after which nothing of it is alive.
No ray and no torch here.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import queue
import threading
import time
from abc import abstractmethod
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, Self, TypeVar, get_args

from ablate.errors import ClusterError, PlacementError
from ablate.keeper import Ended, HostLost, Keeper, Rank, describe_code
from ablate.wording import counted

Strategy = Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"]
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Gang:
    """What one attempt needs: all of its workers at once, or none."""

    workers: int
    cpus_per_worker: float = 1.0
    """May be a fraction. A worker computes with as many threads, rounded down, at least 1."""
    gpus_per_worker: int = 0
    """Whole accelerators: two ranks never share one."""
    strategy: Strategy = "PACK"
    """PACK: on as few machines as possible; SPREAD: on as many; STRICT_: or not at all."""

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ValueError(f"gang.workers is {self.workers}; at least 1 worker is needed")
        if not (math.isfinite(self.cpus_per_worker) and self.cpus_per_worker > 0):
            raise ValueError(f"gang.cpus_per_worker is {self.cpus_per_worker}; it must be above 0")
        if self.gpus_per_worker < 0:
            raise ValueError(
                f"gang.gpus_per_worker is {self.gpus_per_worker}; it must be 0 or more"
            )
        if self.strategy not in get_args(Strategy):
            raise ValueError(
                f"gang.strategy is {self.strategy!r}; allowed are {', '.join(get_args(Strategy))}"
            )

    def __str__(self) -> str:
        gpus = f" and {self.gpus_per_worker} GPU" if self.gpus_per_worker else ""
        return f"{counted(self.workers, 'worker')} with {self.cpus_per_worker:g} CPU{gpus} each"


@dataclass(frozen=True, slots=True)
class Attempt:
    """One execution of a trial, as asked of a cluster."""

    trial_id: str
    number: int
    folder: Path
    """The trial folder, at the same path on every machine."""
    gang: Gang
    entry: str = "ablate.training.worker:main"
    """``module:function``, called without arguments; its integer is the exit code."""
    env: Mapping[str, str] = field(default_factory=dict)
    """Added to the environment of the machine."""

    def log_of(self, rank: int) -> Path:
        """Where a rank's standard output and error go."""
        return self.folder / "attempts" / str(self.number) / f"log-{rank}.txt"


@dataclass(frozen=True, slots=True)
class GangEvent:
    """What became of an attempt: first ``placed`` (at most once), last ``exited`` or ``lost``."""

    trial_id: str
    number: int
    kind: Literal["placed", "exited", "lost"]
    """lost: a machine or its keeper went away, so some exit codes are unknown."""
    detail: str
    """One sentence for people: which rank, which signal, where its log is."""
    time: float
    """Unix seconds."""
    nodes: tuple[str, ...] = ()
    """Machine of each rank; empty when never placed."""
    pids: tuple[int, ...] = ()
    """Process of each rank on its machine; empty when never placed."""
    exit_codes: tuple[int | None, ...] = ()
    """By rank; negative for a signal, None when unknown or never started; empty in ``placed``."""
    failed_rank: int | None = None
    """The first rank that crashed; the others were killed because of it."""
    stopped: bool = False
    """stop() had been called."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """How many gangs of one shape fit."""

    total: int
    """With nothing else running."""
    free: int
    """Now."""
    reason: str
    """Why total is 0: which resource is missing, and what each machine has; else empty."""
    busy: str = ""
    """Why free is 0 though total is not: what each machine has left; else empty."""
    away: int = 0
    """How many of total need machines that do not answer now."""


class Cluster(Protocol):
    """The contract. Methods may be called from any thread."""

    def start(self, attempt: Attempt) -> None:
        """Queue an attempt; returns at once.

        Raises:
            PlacementError: no machines seen so far could ever hold the gang.
            ClusterError: the trial is queued or running already, or the cluster is closed.
        """

    def wait(self, timeout_s: float) -> list[GangEvent]:
        """Events since the last call, oldest first; waits up to the timeout for the first one."""

    def stop(self, trial_id: str, *, grace_s: float) -> None:
        """SIGTERM to every rank now, SIGKILL to all of their trees after the grace.

        Returns at once; the ``exited`` event follows. A rank that ignored SIGTERM is asked for the
        stack of each of its threads (into its log) before it is killed. A second call can only
        shorten the grace. A trial that is not here is left alone.
        """

    def capacity(self, gang: Gang) -> Capacity:
        """How many such gangs fit, in total and now."""

    def set_aside(self, node: str, gang: Gang) -> bool:
        """Place nothing more on a machine, unless then no such gang could ever be placed.

        Whether it was done; what runs there goes on. A machine that leaves and comes back is used.
        """

    def pids(self) -> dict[str, tuple[int, ...]]:
        """The rank processes now running, by trial."""

    def close(self, *, grace_s: float = 0.0) -> None:
        """Stop everything, and leave nothing behind."""


class Host(Protocol):
    """One machine as the life of a gang sees it; :class:`ablate.keeper.Keeper` is one."""

    name: str
    address: str

    async def reserve(self, gang: str) -> int: ...

    async def run(
        self, gang: str, entry: str, ranks: Sequence[Rank], devices: Sequence[str]
    ) -> dict[int, int]: ...

    async def ended(self, gang: str) -> Ended: ...

    async def stop(self, gang: str, grace_s: float) -> None: ...


@dataclass(frozen=True, slots=True)
class Seat:
    """Where one rank sits, and the accelerators that are its own."""

    host: Host
    devices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Placement:
    """One seat per rank, ranks of one machine next to each other, and what holds the seats."""

    gang: Gang
    seats: tuple[Seat, ...]
    lease: Any = None


@dataclass(slots=True)
class _Life:
    """An attempt from start() to its last event. Touched by the cluster's loop alone."""

    attempt: Attempt
    task: asyncio.Task[None] | None = None
    placing: asyncio.Task[Placement] | None = None
    hosts: list[Host] = field(default_factory=list)
    pids: tuple[int, ...] = ()
    kill_at: float | None = None
    """Monotonic time a stop() leaves it; None when nobody asked."""

    @property
    def name(self) -> str:
        """Names the gang to the hosts; attempts fence, so it is unique."""
        return f"{self.attempt.trial_id}/{self.attempt.number}"


class GangCluster:
    """The life of gangs, for clusters that differ only in where a gang is placed.

    One background thread with its own event loop moves every gang; it lives as long as the
    cluster does, because a process that is bound to its parent is bound to the thread that
    started it.
    """

    def __init__(self) -> None:
        self._events: queue.SimpleQueue[GangEvent] = queue.SimpleQueue()
        self._lives: dict[str, _Life] = {}
        self._lock = threading.Lock()
        self._closed = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="cluster", daemon=True)
        self._thread.start()

    # -- where gangs go: for subclasses ---------------------------------------------------------

    @abstractmethod
    async def _place(self, gang: Gang) -> Placement:
        """Wait for all seats at once; cancelled when the attempt is stopped first."""

    @abstractmethod
    async def _release(self, placement: Placement) -> None:
        """Give seats back; nothing of the gang is alive on any machine that still answers."""

    @abstractmethod
    async def _shut_down(self) -> None:
        """Let go of the machines; no gang is left."""

    @abstractmethod
    def capacity(self, gang: Gang) -> Capacity:
        """How many such gangs fit, in total and now."""

    # -- the contract ----------------------------------------------------------------------------

    def start(self, attempt: Attempt) -> None:
        capacity = self.capacity(attempt.gang)
        if capacity.total == 0:
            raise PlacementError(f"trial {attempt.trial_id} can never start: {capacity.reason}")
        with self._lock:
            if self._closed:
                raise ClusterError(f"trial {attempt.trial_id} cannot start: the cluster is closed")
            if attempt.trial_id in self._lives:
                running = self._lives[attempt.trial_id].attempt.number
                raise ClusterError(
                    f"trial {attempt.trial_id} has attempt {running} queued or running; wait for "
                    f"its last event before attempt {attempt.number} is started"
                )
            life = self._lives[attempt.trial_id] = _Life(attempt)
        self._loop.call_soon_threadsafe(self._begin, life)

    def wait(self, timeout_s: float) -> list[GangEvent]:
        events: list[GangEvent] = []
        with contextlib.suppress(queue.Empty):
            events.append(self._events.get(timeout=max(0.0, timeout_s)))
            while True:
                events.append(self._events.get_nowait())
        return events

    def stop(self, trial_id: str, *, grace_s: float) -> None:
        self._loop.call_soon_threadsafe(self._stop, trial_id, max(0.0, grace_s))

    def set_aside(self, node: str, gang: Gang) -> bool:
        return False  # a cluster of one machine

    def pids(self) -> dict[str, tuple[int, ...]]:
        with self._lock:
            return {trial: life.pids for trial, life in self._lives.items() if life.pids}

    def close(self, *, grace_s: float = 0.0) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            trials = list(self._lives)
        for trial_id in trials:
            self.stop(trial_id, grace_s=grace_s)
        self._call(self._drain())
        self._call(self._shut_down())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # -- the life of a gang, in the loop --------------------------------------------------------

    def _call(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Run a coroutine in the loop and wait for it, from another thread."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _drain(self) -> None:
        while tasks := [life.task for life in self._lives.values() if life.task is not None]:
            await asyncio.wait(tasks)

    def _begin(self, life: _Life) -> None:
        life.placing = self._loop.create_task(self._place(life.attempt.gang))
        life.task = self._loop.create_task(self._live(life))

    def _stop(self, trial_id: str, grace_s: float) -> None:
        life = self._lives.get(trial_id)
        if life is None:
            return
        life.kill_at = min(life.kill_at or math.inf, time.monotonic() + grace_s)
        if life.placing is not None:
            life.placing.cancel()
        for host in life.hosts:
            self._loop.create_task(_try_stop(host, life.name, grace_s))

    async def _live(self, life: _Life) -> None:
        """One attempt from queue to last event; every way out tells one last event."""
        assert life.placing is not None
        seats: Sequence[Seat] = ()
        placement: Placement | None = None
        try:
            placement = await life.placing
            life.placing = None
            seats = placement.seats
            event = await self._run(life, seats)
        except asyncio.CancelledError:
            event = self._event(life, "exited", "stopped before it was placed", codes={})
        except HostLost as error:
            event = self._event(life, "lost", f"lost before it ran: {error}", seats=seats, codes={})
        except ClusterError as error:
            event = self._event(life, "lost", f"could not start: {error}", seats=seats, codes={})
        if placement is not None:
            await self._release(placement)
        with self._lock:
            del self._lives[life.attempt.trial_id]
        self._events.put(event)

    async def _run(self, life: _Life, seats: Sequence[Seat]) -> GangEvent:
        attempt, name = life.attempt, life.name
        shares = _by_host(seats)
        first = seats[0].host
        port = await first.reserve(name)
        started = await self._fork(attempt, name, shares, seats, first.address, port)
        life.hosts = [host for host, _ in shares]
        pids = {rank: pid for share in started for rank, pid in share.items()}
        life.pids = tuple(pids[rank] for rank in range(attempt.gang.workers))
        if life.kill_at is not None:  # stop() came while the ranks were being forked
            self._stop(attempt.trial_id, max(0.0, life.kill_at - time.monotonic()))
        hosts = ", ".join(host.name for host in life.hosts)
        self._events.put(self._event(life, "placed", f"{attempt.gang} on {hosts}", seats=seats))
        return await self._watch(life, seats)

    async def _fork(
        self,
        attempt: Attempt,
        name: str,
        shares: Sequence[tuple[Host, Sequence[int]]],
        seats: Sequence[Seat],
        address: str,
        port: int,
    ) -> list[dict[int, int]]:
        """Fork the ranks on every host; when one host cannot, on none."""
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

    async def _watch(self, life: _Life, seats: Sequence[Seat]) -> GangEvent:
        """Wait for every host; the first that reports a crash or is lost ends the others."""
        codes: dict[int, int] = {}
        failed: int | None = None
        reason = ""
        losses: list[str] = []
        waits = {asyncio.ensure_future(host.ended(life.name)): host for host in life.hosts}
        while waits:
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            ended = [waits.pop(wait) for wait in done]
            for wait in done:
                try:
                    share = wait.result()
                except HostLost as error:
                    losses.append(str(error))
                    continue
                codes |= share.codes
                if failed is None and not losses:
                    failed, reason = share.failed, share.reason
            life.hosts = [host for host in life.hosts if host not in ended]
            if failed is not None or losses:
                for host in life.hosts:
                    self._loop.create_task(_try_stop(host, life.name, 0.0))
        if losses:
            return self._event(life, "lost", "; ".join(losses), seats=seats, codes=codes)
        stopped = life.kill_at is not None
        detail = _describe_end(life.attempt, codes, failed, reason, stopped=stopped)
        return self._event(life, "exited", detail, seats=seats, codes=codes, failed_rank=failed)

    def _event(
        self,
        life: _Life,
        kind: Literal["placed", "exited", "lost"],
        detail: str,
        *,
        seats: Sequence[Seat] = (),
        codes: Mapping[int, int] | None = None,
        failed_rank: int | None = None,
    ) -> GangEvent:
        return GangEvent(
            trial_id=life.attempt.trial_id,
            number=life.attempt.number,
            kind=kind,
            detail=detail,
            time=time.time(),
            nodes=tuple(seat.host.name for seat in seats),
            pids=life.pids,
            exit_codes=()
            if codes is None
            else tuple(codes.get(rank) for rank in range(life.attempt.gang.workers)),
            failed_rank=failed_rank,
            stopped=life.kill_at is not None,
        )


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
        "OMP_NUM_THREADS": str(max(1, int(attempt.gang.cpus_per_worker))),
        **attempt.env,
        "RANK": str(rank),
        "WORLD_SIZE": str(len(seats)),
        "LOCAL_RANK": str(neighbours.index(rank)),
        "LOCAL_WORLD_SIZE": str(len(neighbours)),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "CUDA_VISIBLE_DEVICES": ",".join(d for r in neighbours for d in seats[r].devices),
        "ABLATE_TRIAL": str(attempt.folder),
        "ABLATE_ATTEMPT": str(attempt.number),
    }


def _describe_end(
    attempt: Attempt, codes: Mapping[int, int], failed: int | None, reason: str, *, stopped: bool
) -> str:
    if failed is None:
        words = sorted({describe_code(code) for code in codes.values()})
        return ("stopped: " if stopped else "") + f"all ranks ended with {' or '.join(words)}"
    log = attempt.log_of(failed)
    if codes[failed] == -9:
        reason = reason or "not by us; often the kernel, out of memory"
    hint = f" ({reason})" if reason else ""
    others = " and the other ranks were killed" if attempt.gang.workers > 1 else ""
    last = _last_line(log)
    return f"rank {failed} ended with {describe_code(codes[failed])}{hint}{others}; log: {log}" + (
        f"; its last line: {last}" if last else ""
    )


def _last_line(log: Path) -> str:
    """The last line of a log that says something, at most 300 characters."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, os.path.getsize(log) - 4096))
            lines = file.read().decode(errors="replace").split("\n")
    except OSError:
        return ""
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "")


def count_gangs(gang: Gang, machines: Sequence[Mapping[str, float]]) -> int:
    """How many gangs of one shape fit on machines with these resources ("CPU", "GPU")."""
    seats = [_count_seats(gang, machine) for machine in machines]
    match gang.strategy:
        case "STRICT_PACK":
            return sum(n // gang.workers for n in seats)
        case "STRICT_SPREAD":
            # g gangs fit when every machine takes at most one worker of each.
            gangs = 0
            while sum(min(n, gangs + 1) for n in seats) >= (gangs + 1) * gang.workers:
                gangs += 1
            return gangs
        case _:
            return sum(seats) // gang.workers


def _count_seats(gang: Gang, machine: Mapping[str, float]) -> int:
    # A sum of fractions of CPUs misses an integer by rounding errors.
    seats = math.floor(machine.get("CPU", 0.0) / gang.cpus_per_worker + 1e-9)
    if gang.gpus_per_worker:
        seats = min(seats, int(machine.get("GPU", 0.0)) // gang.gpus_per_worker)
    return seats


def explain_shortage(
    gang: Gang, machines: Mapping[str, Mapping[str, float]], *, now: bool = False
) -> str:
    """Why not even one gang fits, naming the resource that is short on each machine; else nothing.

    `now`: the resources are those that are free at the moment.
    """
    if count_gangs(gang, list(machines.values())):
        return ""
    if not machines:
        return f"the gang needs {gang}, but the cluster has no machine"
    needs = {"CPU": gang.cpus_per_worker}
    if gang.gpus_per_worker:
        needs["GPU"] = float(gang.gpus_per_worker)
    seen = []
    for name, resources in machines.items():
        seats = _count_seats(gang, resources)
        has = " and ".join(f"{resources.get(kind, 0.0):g} {kind}" for kind in needs)
        has += " free" if now else ""
        per_seat = {kind: resources.get(kind, 0.0) / need for kind, need in needs.items()}
        short = min(per_seat, key=lambda kind: per_seat[kind])
        seen.append(f"{name} has {has}: {seats} of {gang.workers} workers, {short} runs out")
    where = {
        "STRICT_PACK": " on one machine (STRICT_PACK)",
        "STRICT_SPREAD": " each on a machine of its own (STRICT_SPREAD)",
    }.get(gang.strategy, "")
    return f"the gang needs {gang}{where}, but " + "; ".join(seen)


class LocalCluster(GangCluster):
    """This machine alone, without Ray: for a laptop, for debugging, for tests.

    It counts seats, it does not reserve cores: ``num_cpus`` (default: all cores) and ``num_gpus``
    say how much may run at once. ``preload`` names modules to import once instead of in every
    rank (``module``, or ``module:NAME`` for a list of names).
    """

    def __init__(
        self,
        *,
        num_cpus: float | None = None,
        num_gpus: int = 0,
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

    def capacity(self, gang: Gang) -> Capacity:
        here = {"this machine": self._all}
        total = count_gangs(gang, [self._all])
        free = {"CPU": self._cpus, "GPU": float(len(self._devices))}
        return Capacity(
            total=total,
            free=count_gangs(gang, [free]),
            reason=explain_shortage(gang, here),
            busy=explain_shortage(gang, {"this machine": free}, now=True),
        )

    async def _place(self, gang: Gang) -> Placement:
        async with self._turn:
            while self.capacity(gang).free == 0:
                self._freed.clear()
                await self._freed.wait()
            if self._keeper.lost is not None:
                await self._open_keeper()
            keeper = self._keeper
            # Shielded: stopping the attempt that came first must not stop the keeper's start.
            await asyncio.shield(self._opening)
            self._cpus -= gang.workers * gang.cpus_per_worker
            each = gang.gpus_per_worker
            taken = [self._devices[rank * each : (rank + 1) * each] for rank in range(gang.workers)]
            del self._devices[: gang.workers * each]
            return Placement(gang, tuple(Seat(keeper, tuple(devices)) for devices in taken))

    async def _release(self, placement: Placement) -> None:
        self._cpus += placement.gang.workers * placement.gang.cpus_per_worker
        self._devices += [device for seat in placement.seats for device in seat.devices]
        self._freed.set()

    async def _shut_down(self) -> None:
        await asyncio.wait([self._opening])
        await self._keeper.close()


def _visible_devices(number: int) -> list[str]:
    """Names of the first ``number`` accelerators this process may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(i) for i in range(number)]
    if len(names) < number:
        raise ClusterError(
            f"num_gpus is {number}, but CUDA_VISIBLE_DEVICES={visible} shows {len(names)}"
        )
    return names[:number]


# LocalCluster is a Cluster; mypy checks it here, where it is defined.
_: type[Cluster] = LocalCluster
