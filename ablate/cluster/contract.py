"""What is asked of a cluster, and what it tells: the contract between the study loop and machines.

A cluster is asked to start attempts and tells what became of them. An attempt waits first come
first served until all its workers have a seat, and it ends with exactly one event after which
nothing of it is alive. Only the standard library: the study's schema and plans read this.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, get_args

from ablate.words import counted

Strategy = Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"]


@dataclass(frozen=True, slots=True)
class Shape:
    """What one attempt needs: all of its workers at once, or none."""

    workers: int
    cpus_per_worker: float = 1.0
    """May be a fraction. A worker computes with as many threads, rounded down, at least 1."""
    gpus_per_worker: int = 0
    """Whole accelerators: two ranks never share one."""
    strategy: Strategy = "PACK"
    """PACK: on as few machines as possible; SPREAD: on as many; STRICT_: or not at all."""
    labels: tuple[tuple[str, str], ...] = ()
    """Only machines with all of these (name, value), as Ray knows them."""

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
        where = "".join(f", {name}={value}" for name, value in self.labels)
        each = f"{self.cpus_per_worker:g} CPU{gpus} each"
        return f"{counted(self.workers, 'worker')} with {each}{where}"


@dataclass(frozen=True, slots=True)
class Attempt:
    """One execution of a trial, as asked of a cluster."""

    trial_id: str
    number: int
    folder: Path
    """The trial folder, at the same path on every machine."""
    shape: Shape
    entry: str = "ablate.trial.worker:main"
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
    ours: bool = False
    """This cluster's own gangs hold seats, or are about to: who waits then waits for them."""
    away: int = 0
    """How many of total need machines that do not answer now."""
    notes: tuple[str, ...] = ()
    """What people should know of machines that are there and not used."""
    machines: int = 1
    """How many machines have room for a worker of it, with nothing else running."""
    silent: bool = False
    """Nobody answers who could place a gang: these are the figures of the last answer."""
    ends: str = ""
    """Why this cluster is used no more, for people: what runs was told to leave, and nothing is
    placed again."""


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

    def capacity(self, shape: Shape) -> Capacity:
        """How many such gangs fit, in total and now."""

    def set_aside(self, node: str, shape: Shape) -> bool:
        """Place nothing more on a machine, unless then no such gang could ever be placed.

        Whether it was done; what runs there goes on. A machine that leaves and comes back is used.
        """

    def pids(self) -> dict[str, tuple[int, ...]]:
        """The rank processes now running, by trial."""

    def close(self, *, grace_s: float = 0.0) -> None:
        """Stop everything, and leave nothing behind."""
