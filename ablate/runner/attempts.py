"""What runs where: choose a gang, start, stop, and write down how attempts ended."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ablate.cluster.contract import Attempt, Capacity, Cluster, GangEvent, Shape
from ablate.errors import ClusterError
from ablate.records.folder import StudyRecord, TrialRecord, interrupted, worker_seconds
from ablate.records.stores import CHECKPOINTS
from ablate.runner.budget import Running
from ablate.runner.endings import Kind
from ablate.runner.suspects import Suspects
from ablate.study import Study
from ablate.trial.identity import SHARE, Trial

FEWER_WORKERS = "FEWER_WORKERS"
"""Flag of a trial that trained for a time with fewer workers than the study asks for."""


@dataclass(slots=True)
class Attempts:
    """The attempts that the cluster holds."""

    study: Study
    record: StudyRecord
    cluster: Cluster
    entry: str
    clock: Callable[[], float]
    active: dict[str, int] = field(default_factory=dict)
    """Trial id -> attempt."""
    suspects: Suspects = field(default_factory=Suspects)
    aside: dict[str, str] = field(default_factory=dict)
    """Machines on which nothing more is placed, with what the last attempt there said."""
    shortage: str = ""
    """Why nothing more can be placed now."""
    notes: tuple[str, ...] = ()
    """What the cluster says of machines that are there and not used."""
    _sizes: dict[str, int] = field(default_factory=dict)
    """Trial id -> workers of its last attempt."""
    _machines: int = 1
    _placed_at: dict[str, float] = field(default_factory=dict)

    def running(self) -> list[Running]:
        """What the attempts take of a budget."""
        now = self.clock()
        return [
            Running(self._sizes[trial_id], now - self._placed_at.get(trial_id, now))
            for trial_id in self.active
        ]

    def room(self) -> tuple[Shape, Capacity]:
        """The gang to start: all workers, or as few as the study allows while machines are away.

        Raises:
            ClusterError: the cluster ends, and all that ran has left.
        """
        whole = self.study.gang.shape()
        capacity = self.cluster.capacity(whole)
        if capacity.ends and not self.active:
            raise ClusterError(capacity.ends)
        self._machines = capacity.machines
        if capacity.total > capacity.away:
            return whole, capacity
        for workers in self.study.gang.smaller:
            fewer = self.study.gang.shape(workers)
            room = self.cluster.capacity(fewer)
            if room.total > room.away:
                return fewer, room
        return whole, capacity

    @property
    def num_machines(self) -> int:
        """Those that held a rank, or could: a word of one of several is not believed alone."""
        return max(len(self.suspects.machines), self._machines)

    def start(self, trial: Trial, shape: Shape) -> None:
        """Hand a trial to the cluster.

        Raises:
            PlacementError: no machine could ever hold the gang.
            ClusterError: the cluster does not take it now.
        """
        folder = self.record.record(trial.id)
        number = self.record.new_attempt(folder)
        copies = self.study.checkpoints_of(trial.id)
        env = carried(os.environ)
        if copies:
            env[CHECKPOINTS] = copies
        if shape.workers < self.study.gang.workers:
            env[SHARE] = str(self.study.gang.workers // shape.workers)
            self.record.write_gang(folder, number, {"workers": shape.workers})
        self._sizes[trial.id] = shape.workers
        self.cluster.start(
            Attempt(trial.id, number, folder.folder.absolute(), shape, self.entry, env)
        )
        self.active[trial.id] = number

    def stop(self, trial_ids: Iterable[str], *, grace_s: float) -> None:
        """Ask attempts to checkpoint and end; they are killed after the grace."""
        for trial_id in trial_ids:
            self.cluster.stop(trial_id, grace_s=grace_s)

    def reconsider(self) -> None:
        """Take back attempts that wait for machines that are away, where fewer workers may do."""
        queued = self.active.keys() - self._placed_at.keys()
        if not self.study.gang.smaller or not queued:
            return
        shape, _ = self.room()
        self.stop([each for each in queued if self._sizes[each] > shape.workers], grace_s=0.0)

    @property
    def placed(self) -> Collection[str]:
        """Trials whose ranks run."""
        return self._placed_at.keys()

    def place(self, event: GangEvent, came_at: float) -> None:
        """An attempt has been placed."""
        self._placed_at[event.trial_id] = came_at
        self.suspects.machines.update(event.nodes)

    def write_end(self, event: GangEvent, kind: Kind, came_at: float) -> dict[str, Any]:
        """An attempt has ended: end.json as it was written."""
        return write_end(
            self.record,
            self.record.record(event.trial_id),
            event.number,
            kind=kind,
            detail=event.detail,
            exit_codes=list(event.exit_codes),
            failed_rank=event.failed_rank,
            nodes=list(event.nodes),
            error=self.record.record(event.trial_id).error(event.number, event.failed_rank),
            wall_s=came_at - self._placed_at.get(event.trial_id, came_at),
        )

    def forget(self, event: GangEvent, end: Mapping[str, Any]) -> None:
        """An attempt has ended, and is written down as `end`."""
        del self.active[event.trial_id]
        self._placed_at.pop(event.trial_id, None)
        node = self.suspects.note(event.trial_id, end)
        if node is not None and self.cluster.set_aside(node, self.study.gang.shape()):
            self.aside[node] = event.detail


_CARRIED = ("ABLATE_", "HF_", "NCCL_", "TORCH_", "TOKENIZERS_")
_CARRIED_NAMES = frozenset(
    {"AWS_PROFILE", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL", "PYTHONHASHSEED"}
)
# Set for each rank, or true of one machine alone.
_KEPT_BACK = ("_IFNAME", "_HCA", "_TOKEN", "_KEY", "_SECRET", "_FD", "_PASSWORD")


def carried(environment: Mapping[str, str]) -> dict[str, str]:
    """What of a launch's environment its ranks see on every machine, whatever is set there.

    A rank's environment is its machine's own; what people set for a launch (patience, where the
    hub's files are, NCCL's settings) is meant for its ranks. Secrets stay where they are.
    """
    return {
        name: value
        for name, value in environment.items()
        if (name.startswith(_CARRIED) or name in _CARRIED_NAMES) and not name.endswith(_KEPT_BACK)
    }


def write_end(
    record: StudyRecord, folder: TrialRecord, number: int, *, kind: Kind, **facts: Any
) -> dict[str, Any]:
    """Write an attempt's end.json; what it says."""
    content = {"kind": kind, "time": time.time(), "wall_s": 0.0, **facts}
    if (workers := folder.fewer_workers(number)) is not None:
        content["workers"] = workers
    content["step"] = folder.last_step(number)
    if again := folder.steps_again(number):
        content |= {"again": again, "first_step": (folder.first_row(number) or {})["step"]}
    record.write_end(folder, number, content)
    return content


def abandon_unseen(record: StudyRecord, folder: TrialRecord) -> None:
    """Record how the attempts ended whose controller was killed before it could say so.

    What they spent is counted like any other's; that they ended says nothing against the trial.
    """
    for number in folder.attempts():
        if folder.end(number) is not None:
            continue
        result = folder.result(number)
        done = result is not None and result["status"] != "stopped"
        write_end(
            record,
            folder,
            number,
            kind="ended" if done else "abandoned",
            detail="its controller ended before it could say how the attempt did",
            wall_s=folder.seen_s(number),
        )


def write_outcome(
    record: StudyRecord, folder: TrialRecord, *, workers: int, **facts: Any
) -> dict[str, Any]:
    """Write a trial's outcome.json from `facts` and its attempts; what it says."""
    ends = folder.ends()
    content: dict[str, Any] = {
        "attempt": max(folder.attempts(), default=0),
        "wall_s": sum(end["wall_s"] for end in ends),
        "time": time.time(),
        **facts,
    }
    _note_fewer(content, ends, workers=workers)
    if cost := interrupted(ends, workers=workers):
        content["interrupted"] = cost
    record.write_outcome(folder, content)
    return content


def _note_fewer(content: dict[str, Any], ends: list[dict[str, Any]], *, workers: int) -> None:
    """Say of an outcome that attempts had fewer workers than asked for, where some had."""
    smaller: list[Mapping[str, Any]] = [end for end in ends if "workers" in end]
    if smaller:
        content["worker_s"] = worker_seconds(ends, workers=workers)
    if trained := [end["workers"] for end in smaller if end["step"]]:
        content["flags"] = [*content.get("flags", ()), FEWER_WORKERS]
        content["fewest_workers"] = min(trained)
