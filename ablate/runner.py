"""The study loop: ask, place, wait, record, tell.

`launch` reconciles a study with its folder: trials with an outcome are done, the rest are
attempted, and launching again (after a crash, on another machine, with one more factor or seed)
is the one way to go on. One controller at a time works on a folder; it alone writes outcomes.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from filelock import FileLock, Timeout

from ablate import __version__, design
from ablate.analysis.results import Result, result_of
from ablate.backlog import Backlog
from ablate.cluster import Attempt, Capacity, Cluster, Gang, GangEvent
from ablate.errors import ClusterError, PlacementError, RecordError
from ablate.records import StudyRecord, TrialRecord, read_json, worker_seconds
from ablate.referee import Referee, referee_of
from ablate.status import Ledger, StudyStatus, picture, write_controller
from ablate.stores import CHECKPOINTS
from ablate.study import Search, Study
from ablate.suspects import Suspects, culprit
from ablate.trial import (
    EXIT_NO_SPACE,
    EXIT_STOPPED,
    ORDERLY,
    SHARE,
    Cell,
    Levels,
    Outcome,
    Trial,
)
from ablate.versions import fingerprint

POLL_S = 0.5
"""How long one turn of the loop waits for the cluster."""

WORKER = "ablate.training.worker:main"
"""What every rank of a gang runs: an importable function that reads the environment alone."""

GRACE_S = 120.0
"""Time a stopped trial has for its checkpoint before it is killed."""

STOPPING_SHARE = 0.05
"""At most this part of a budget is kept back for the checkpoints of trials that must be stopped."""

FEWER_WORKERS = "FEWER_WORKERS"
"""Flag of a trial that trained for a time with fewer workers than the study asks for."""

LOST_LIMIT = 20
"""Attempts in a row that may vanish with their machine, without progress, before giving up."""

SPACE_PAUSE_S = 15.0
"""Between two attempts of a trial whose disk is full."""

ALIKE_LIMIT = 5
"""Of these, how many in a row may be lost before their first step and in the same words: a cause
that stays, e.g. a package that a machine lacks."""

LOOKING_SHARE = 0.1
"""Most of the loop's time that goes into the picture of the study for people."""


class Book(Protocol):
    """Where cells are asked for and told (`ablate.search`)."""

    @property
    def trouble(self) -> str | None:
        """One line while the storage is behind; it catches up by itself."""

    def begin(self, cell: Cell) -> None:
        """A cell is going to be run."""

    def ask(self) -> Cell | None:
        """The next cell of a search, already begun, or None when the space is exhausted."""

    def report(self, cell: Cell, rung: float, score: float) -> None:
        """A cell's seeds so far score this at a rung of their schedule."""

    def tell(self, cell: Cell, results: Sequence[Result]) -> None:
        """All seeds of a cell have ended."""


class Mirror(Protocol):
    """Where people watch (`ablate.tracking`); it never raises and never blocks for long."""

    @property
    def trouble(self) -> str | None:
        """One line while the mirror is behind; it catches up by itself."""

    def update(self, trials: Sequence[Trial], active: Sequence[str]) -> None:
        """Bring the mirror up to date with the study folder, soon; `trials` only ever grows."""


@contextmanager
def controlling(record: StudyRecord) -> Iterator[None]:
    """Hold the study folder: one controller at a time.

    Raises:
        RecordError: another controller holds it.
    """
    record.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    lock = FileLock(record.folder / "controller.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        try:
            note = read_json(record.folder / "controller.json")
            holder = f" (process {note['pid']} on {note['host']})"
        except (FileNotFoundError, RecordError):
            holder = ""
        raise RecordError(
            f"{record.folder} is being worked on by another launch{holder}. "
            f"Watch it with `ablate status {record.folder}`, end it with "
            f"`ablate stop {record.folder}`."
        ) from None
    try:
        yield
    finally:
        lock.release()


def request_stop(record: StudyRecord, *, now: bool) -> None:
    """Ask the controller of this study, wherever it runs, to stop."""
    (record.folder / ("stop-now" if now else "stop")).touch()


def launch(
    study: Study,
    record: StudyRecord,
    *,
    cluster: Cluster,
    book: Book,
    mirror: Mirror,
    stop_level: Callable[[], int] = lambda: 0,
    watch: Callable[[StudyStatus], None] = lambda status: None,
    entry: str = WORKER,
    clock: Callable[[], float] = time.monotonic,
) -> StudyStatus:
    """Run what is missing of the study until every trial has an outcome, or it is stopped.

    `stop_level` is asked every turn: 1 lets running trials checkpoint first, 2 ends them at once.
    `watch` gets the study's status every few turns. Returns the last status. The caller holds
    :func:`controlling`. `clock` gives seconds that only go forward, whatever the time of day does.

    Raises:
        PlacementError: no gang of this study fits the cluster.
        PlanError: a rung of the study's pruning lies within a warmup.
    """
    for name in ("stop", "stop-now"):
        (record.folder / name).unlink(missing_ok=True)
    record.write_study(
        {
            "format": 1,
            "name": study.name,
            "path": study.path,
            "root": study.root,
            "text": study.text,
            "version": __version__,
        }
    )
    referee = referee_of(study, record, report=book.report)
    controller = _Controller(study, record, cluster, book, mirror, entry, clock, referee)
    try:
        return controller.run(stop_level, watch)
    finally:
        write_controller(record, state="absent", active={}, notes=())


@dataclass(slots=True)
class _Controller:
    """One launch. What it keeps up to date per event, it never recounts over the study."""

    study: Study
    record: StudyRecord
    cluster: Cluster
    book: Book
    mirror: Mirror
    entry: str
    clock: Callable[[], float]
    referee: Referee | None
    """Says which runs of a search to end early."""
    results: dict[str, Result] = field(default_factory=dict)
    """Ended trials of the study, by id."""
    wanted: dict[str, Trial] = field(default_factory=dict)
    """Every trial the study wants so far, in order."""
    order: list[Trial] = field(default_factory=list)
    """The same as a list that only grows, for the mirror."""
    backlog: Backlog = field(default_factory=Backlog)
    """Wanted trials that have neither ended nor been handed to the cluster."""
    active: dict[str, int] = field(default_factory=dict)
    """Trial id -> attempt, of those handed to the cluster."""
    sizes: dict[str, int] = field(default_factory=dict)
    """Trial id -> workers of its last attempt."""
    placed_at: dict[str, float] = field(default_factory=dict)
    of_cell: dict[Levels, list[Trial]] = field(default_factory=dict)
    unended: Counter[Levels] = field(default_factory=Counter)
    """How many trials of a cell have not ended."""
    begun_seeds: set[int] = field(default_factory=set)
    """Seed blocks of which at least one trial was started."""
    fingerprint: dict[str, str] = field(default_factory=fingerprint)
    ledger: Ledger = field(default_factory=Ledger)
    suspects: Suspects = field(default_factory=Suspects)
    aside: dict[str, str] = field(default_factory=dict)
    """Machines on which nothing more is placed, with what the last attempt there said."""
    short_of_space: str = ""
    """What the last attempt said when the disk was full; empty once another has gone on."""
    exhausted: bool = False
    over_budget: bool = False
    """Nothing more is started."""
    cut: bool = False
    """What ran was stopped for the budget's sake."""
    proposed_at: int = -1
    """Number of results at which the design was last asked."""

    def run(
        self, stop_level: Callable[[], int], watch: Callable[[StudyStatus], None]
    ) -> StudyStatus:
        self._recall()
        self._extend()
        self._recall_pruning()
        for levels in self.of_cell:
            self._tell(levels)
        stopping = 0
        look_at = 0.0
        while True:
            level = max(stop_level(), self._stop_file())
            if level > stopping:
                stopping = level
                for trial_id in self.active:
                    self.cluster.stop(trial_id, grace_s=GRACE_S if level == 1 else 0.0)
            if not stopping:
                self._reconsider()
                self._cut()
                self._fill()
            self.mirror.update(self.order, list(self.active))
            began = time.monotonic()
            if began >= look_at:
                watch(self._status("stopping" if stopping else "running"))
                now = time.monotonic()
                look_at = now + (now - began) * (1 / LOOKING_SHARE - 1)
            if not self.active and (stopping or self.over_budget or not self.backlog):
                return self._status("absent")
            for event in self.cluster.wait(POLL_S):
                self._settle(event)
            if not stopping:
                self._prune()

    # ------------------------------------------------------------------ what to run

    def _recall(self) -> None:
        """Take up what earlier launches left: ended trials, and the cells a search has asked."""
        for folder in self.record.records():  # in the order they were asked, for the sampler
            trial = self.study.recall(folder.trial())
            if trial is None:
                continue
            if isinstance(self.study.design, Search):
                self._want_cell(trial.cell)
            outcome = folder.outcome()
            if outcome is not None:
                self.results[trial.id] = result_of(trial, outcome)

    def _extend(self) -> bool:
        """Ask the design for trials, new results may bring new ones; whether any came."""
        if self.proposed_at == len(self.results) or (
            self.proposed_at >= 0 and not design.grows(self.study)
        ):
            return False
        self.proposed_at = len(self.results)
        before = len(self.wanted)
        for trial in design.propose(self.study, list(self.results.values())):
            self._want(trial)
            if self.referee is not None:
                self._keep(trial, self.referee)
        return len(self.wanted) > before or bool(self.backlog)

    def _want_cell(self, cell: Cell) -> None:
        for seed in self.study.seeds:
            self._want(self.study.trial(cell, seed=seed))

    def _want(self, trial: Trial) -> None:
        if trial.id in self.wanted:
            return
        levels = trial.cell.levels
        if levels not in self.of_cell:
            self.of_cell[levels] = []
            self.book.begin(trial.cell)
        self.wanted[trial.id] = trial
        self.order.append(trial)
        self.of_cell[levels].append(trial)
        folder = self.record.write_trial({**trial.to_json(), "fingerprint": self.fingerprint})
        self._close(folder)
        outcome = folder.outcome()
        self.ledger.spend(folder.ends(), workers=self.study.gang.workers)
        if outcome is not None:
            self.results[trial.id] = result_of(trial, outcome)
            self.ledger.count(trial, outcome)
            self.begun_seeds.add(trial.seed)
        else:
            self.unended[levels] += 1
            self.backlog.add(trial)

    def _close(self, folder: TrialRecord) -> None:
        """Record how the attempts ended whose controller was killed before it could say so.

        What they spent is counted like any other's; that they ended says nothing against the trial.
        """
        for number in folder.attempts():
            if folder.end(number) is not None:
                continue
            result = folder.result(number)
            done = result is not None and result["status"] != "stopped"
            self._write_end(
                folder,
                number,
                kind="ended" if done else "abandoned",
                detail="its controller ended before it could say how the attempt did",
                wall_s=folder.seen_s(number),
            )

    def _tell(self, levels: Levels) -> None:
        """Tell the book about a cell whose trials have all ended."""
        if not self.unended[levels]:
            mine = self.of_cell[levels]
            self.book.tell(mine[0].cell, [self.results[trial.id] for trial in mine])

    def _search_more(self) -> bool:
        """Ask the search for one more cell; False when it has had its budget of cells."""
        plan = self.study.design
        if not isinstance(plan, Search) or self.exhausted or len(self.of_cell) >= plan.cells:
            return False
        cell = self.book.ask()
        if cell is None:
            self.exhausted = True
            return False
        self.of_cell.setdefault(cell.levels, [])  # begun by the book itself
        self._want_cell(cell)
        return True

    # ------------------------------------------------------------------ end early

    def _prune(self) -> None:
        """End the running trials of a search that fell behind, with the other seeds of theirs."""
        if self.referee is None:
            return
        running = [(self.wanted[trial_id], number) for trial_id, number in self.active.items()]
        behind = self.referee.look(running)
        for trial in {trial.cell.levels: trial for trial in behind}.values():
            self._end_cell(trial, self.referee.ended[trial.id])

    def _recall_pruning(self) -> None:
        """End what an earlier launch had decided to end, and did not come to."""
        if self.referee is None:
            return
        self.referee.recall(self.wanted)
        for trial_id, reason in list(self.referee.ended.items()):
            self._end_cell(self.wanted[trial_id], reason)

    def _end_cell(self, trial: Trial, reason: str) -> None:
        """A cell with a pruned seed has no mean to compare, so its other seeds end with it."""
        assert self.referee is not None
        for other in self.of_cell[trial.cell.levels]:
            self.referee.ended.setdefault(other.id, f"ended with seed {trial.seed}: {reason}")
            if other.id in self.active:
                self.cluster.stop(other.id, grace_s=GRACE_S)
            elif self.backlog.remove(other):
                self._conclude_pruned(other)

    def _conclude_pruned(self, trial: Trial) -> None:
        assert self.referee is not None
        folder = self.record.record(trial.id)
        attempts = folder.attempts()
        self._conclude(
            trial,
            folder,
            outcome=Outcome.PRUNED,
            value=None,
            reason=self.referee.ended[trial.id],
            step=max((folder.last_step(number) for number in attempts), default=0),
        )

    def _keep(self, trial: Trial, referee: Referee) -> None:
        """What a design lists is run to its end, also if the search had ended it early."""
        pruned = self.results.get(trial.id)
        reopened = pruned is not None and pruned.outcome == Outcome.PRUNED
        if trial.id in referee.kept and not reopened:
            return
        referee.keep(trial, log=reopened)
        if pruned is not None and reopened:
            folder = self.record.record(trial.id)
            outcome = folder.outcome()
            assert outcome is not None
            self.record.reopen(folder)
            self.ledger.uncount(outcome)
            del self.results[trial.id]
            self.unended[trial.cell.levels] += 1
            self.backlog.add(trial)

    # ------------------------------------------------------------------ place

    def _next(self) -> Trial | None:
        """The trial to start next, from search and design if none is ready; None: not now."""
        while True:
            trial = self.backlog.first(self.clock())
            if trial is not None:
                return trial
            if not self._search_more() and not self._extend():
                return None

    def _fill(self) -> None:
        """Hand the cluster as many trials as it can run at once."""
        if self.over_budget or self._next() is None:
            return
        gang, capacity = self._gang()
        if capacity.total == 0:
            if self.active:
                return  # its nodes may come back
            raise PlacementError(
                f"a gang of {gang.workers} workers does not fit: {capacity.reason}"
            )
        while len(self.active) < capacity.total:
            trial = self._next()
            if trial is None:
                return
            if self._exceeds_budget(trial, gang):
                self.over_budget = True
                return
            self._start(self.backlog.take(self.clock()), gang)

    def _gang(self) -> tuple[Gang, Capacity]:
        """The gang to start: all workers, or as few as the study allows while machines are away."""
        whole = self.study.gang.shape()
        capacity = self.cluster.capacity(whole)
        if capacity.total > capacity.away:
            return whole, capacity
        for workers in self.study.gang.smaller:
            fewer = self.study.gang.shape(workers)
            room = self.cluster.capacity(fewer)
            if room.total > room.away:
                return fewer, room
        return whole, capacity

    def _reconsider(self) -> None:
        """Take back attempts that wait for machines that are away, where fewer workers may do."""
        queued = self.active.keys() - self.placed_at.keys()
        if not self.study.gang.smaller or not queued:
            return
        gang, _ = self._gang()
        for trial_id in queued:
            if self.sizes[trial_id] > gang.workers:
                self.cluster.stop(trial_id, grace_s=0.0)

    def _start(self, trial: Trial, gang: Gang) -> None:
        folder = self.record.record(trial.id)
        if self._catch_up(trial, folder):
            return
        number = self.record.new_attempt(folder)
        self.begun_seeds.add(trial.seed)
        copies = self.study.checkpoints_of(trial.id)
        env = {CHECKPOINTS: copies} if copies else {}
        if gang.workers < self.study.gang.workers:
            env[SHARE] = str(self.study.gang.workers // gang.workers)
            self.record.write_gang(folder, number, {"workers": gang.workers})
        self.sizes[trial.id] = gang.workers
        try:
            self.cluster.start(
                Attempt(trial.id, number, folder.folder.absolute(), gang, self.entry, env)
            )
        except PlacementError:
            raise
        except ClusterError as error:
            self._end_attempt(trial, number, kind="lost", detail=str(error))
            self._retry_or_give_up(trial, folder)
            return
        self.active[trial.id] = number

    def _exceeds_budget(self, trial: Trial, gang: Gang) -> bool:
        """Whether starting this trial's seed block could spend more than the budget.

        Asked only at a block's first trial, so that a cut study consists of whole blocks.
        """
        limit = self.study.budget.gpu_hours
        if limit is None:
            return False
        if self._grace_s(more=gang.workers) is not None:
            return True  # it would be stopped at once
        if trial.seed in self.begun_seeds:
            return False
        if not self.ledger.durations_s:
            return False  # nothing is known about the cost yet
        costly_s = max(self.ledger.durations_s) * self.study.gang.workers
        ahead_s = (len(self.active) + self.backlog.num_of_seed(trial.seed)) * costly_s
        return (self.ledger.spent_s + ahead_s) / 3600 > limit

    def _cut(self) -> None:
        """Stop what runs while there is still time for a checkpoint within the budget."""
        grace_s = self._grace_s() if self.active else None
        if grace_s is None or self.cut:
            return
        self.over_budget = self.cut = True
        for trial_id in self.active:
            self.cluster.stop(trial_id, grace_s=grace_s)

    def _grace_s(self, *, more: int = 0) -> float | None:
        """Seconds that the running trials, and another of `more` workers, may take to stop; None
        while they may go on."""
        limit = self.study.budget.gpu_hours
        if limit is None:
            return None
        now = self.clock()
        running_s = sum(
            (now - self.placed_at.get(trial_id, now)) * self.sizes[trial_id]
            for trial_id in self.active
        )
        left_s = limit * 3600 - self.ledger.spent_s - running_s
        workers = sum(self.sizes[trial_id] for trial_id in self.active) + more
        # All of them spend at once; an end is seen up to two turns of the loop late.
        each_s = left_s / workers - 2 * POLL_S
        grace_s = min(GRACE_S, STOPPING_SHARE * limit * 3600 / workers)
        return max(min(grace_s, each_s), 0.0) if each_s <= grace_s else None

    # ------------------------------------------------------------------ record

    def _settle(self, event: GangEvent) -> None:
        if self.active.get(event.trial_id) != event.number:
            return  # an attempt that was given up; its folder is its own
        trial = self.wanted[event.trial_id]
        folder = self.record.record(trial.id)
        if event.kind == "placed":
            self.placed_at[trial.id] = self.clock()
            self.suspects.machines.update(event.nodes)
            return
        del self.active[trial.id]
        result = folder.result(event.number)
        status = result["status"] if result else None
        if status is not None and status != "stopped":
            kind = "ended"  # the last word is on disk, whatever its processes died of afterwards
        elif event.stopped:
            kind = "stopped"
        elif EXIT_STOPPED in event.exit_codes and ORDERLY.issuperset(event.exit_codes):
            kind = "preempted"  # SIGTERM by someone else: the machine is wanted back
        elif EXIT_NO_SPACE in event.exit_codes:
            kind = "no_space"
        else:
            kind = "lost" if event.kind == "lost" else "crashed"
        end = self._end_attempt(
            trial,
            event.number,
            kind=kind,
            detail=event.detail,
            exit_codes=list(event.exit_codes),
            failed_rank=event.failed_rank,
            nodes=list(event.nodes),
            wall_s=self.clock() - self.placed_at.pop(trial.id, self.clock()),
        )
        self.short_of_space = event.detail if kind == "no_space" else ""
        node = self.suspects.note(trial.id, end)
        if node is not None and self.cluster.set_aside(node, self.study.gang.shape()):
            self.aside[node] = event.detail
        if kind == "ended":
            assert result is not None
            self._conclude(trial, folder, **_outcome_of(self.study, result))
        elif self.referee is not None and trial.id in self.referee.ended:
            self._conclude_pruned(trial)
        elif kind in ("stopped", "preempted"):
            self.backlog.add(trial)
        elif kind == "no_space":
            self.backlog.add(trial, not_before=self.clock() + SPACE_PAUSE_S)
        else:
            self._retry_or_give_up(trial, folder)

    def _catch_up(self, trial: Trial, folder: TrialRecord) -> bool:
        """Conclude a trial whose last attempt had ended when its controller was killed."""
        number = max(folder.attempts(), default=0)
        result, end = folder.result(number), folder.end(number)
        if result is None or end is None or end["kind"] != "ended":
            return False
        self._conclude(trial, folder, **_outcome_of(self.study, result))
        return True

    def _end_attempt(self, trial: Trial, number: int, *, kind: str, **facts: Any) -> dict[str, Any]:
        end = self._write_end(self.record.record(trial.id), number, kind=kind, **facts)
        self.ledger.spend([end], workers=self.study.gang.workers)
        return end

    def _write_end(
        self, folder: TrialRecord, number: int, *, kind: str, **facts: Any
    ) -> dict[str, Any]:
        content = {"kind": kind, "time": time.time(), "wall_s": 0.0, **facts}
        if (workers := folder.fewer_workers(number)) is not None:
            content["workers"] = workers
        content["step"] = folder.last_step(number)
        self.record.write_end(folder, number, content)
        return content

    def _retry_or_give_up(self, trial: Trial, folder: TrialRecord) -> None:
        """A crash says nothing about the setting: try again from the last checkpoint.

        Attempts that got further than all before them do not count; a trial that keeps dying
        without progress is given up, with the tail of its log, and the study goes on. The word of
        one machine is not enough while there are others.
        """
        ends = folder.ends()
        fruitless, best = 0, -1
        kinds: list[str] = []
        for end in ends:
            if end["step"] > best and end["step"] > 0:
                fruitless, kinds = 0, []
            if end["kind"] in ("crashed", "lost"):
                fruitless += 1
                kinds.append(end["kind"])
            best = max(best, end["step"])
        only_lost = bool(kinds) and set(kinds) == {"lost"}
        words = [end["detail"] for end in ends[-ALIKE_LIMIT:] if not end["step"]]
        stays = len(words) == ALIKE_LIMIT and len(set(words)) == 1
        limit = self.study.budget.attempts
        if only_lost:
            limit = ALIKE_LIMIT if stays else LOST_LIMIT
        culprits = {culprit(end) for end in ends}
        if len(culprits) == 1 and None not in culprits and len(self.suspects.machines) > 1:
            limit = LOST_LIMIT
        if fruitless < limit:
            pause_s = min(2.0 ** (fruitless - 1), 60.0) - 1.0
            self.backlog.add(trial, not_before=self.clock() + pause_s)
            return
        last = folder.attempts()[-1]
        broken = "" if best > 0 else "broken: no attempt finished a step. "
        self._conclude(
            trial,
            folder,
            outcome=Outcome.LOST if only_lost else Outcome.FAILED,
            value=None,
            reason=f"{broken}{fruitless} attempts without progress; the last: "
            f"{ends[-1]['detail']}\n"
            f"{folder.log_tail(last)}".rstrip(),
        )

    def _conclude(
        self,
        trial: Trial,
        folder: TrialRecord,
        *,
        outcome: Outcome,
        value: float | None,
        **facts: Any,
    ) -> None:
        ends = folder.ends()
        content = {
            "outcome": str(outcome),
            "value": value,
            "attempt": max(folder.attempts(), default=0),
            "wall_s": sum(end["wall_s"] for end in ends),
            "time": time.time(),
            **facts,
        }
        smaller = [end for end in ends if "workers" in end]
        if smaller:
            content["worker_s"] = worker_seconds(ends, workers=self.study.gang.workers)
        if trained := [end["workers"] for end in smaller if end["step"]]:
            content["flags"] = [*content.get("flags", ()), FEWER_WORKERS]
            content["fewest_workers"] = min(trained)
        self.record.write_outcome(folder, content)
        self.ledger.count(trial, content)
        self.results[trial.id] = result = result_of(trial, content)
        if self.referee is not None:
            self.referee.finish(trial, folder, design.score_of(self.study, result))
        self.unended[trial.cell.levels] -= 1
        self._tell(trial.cell.levels)

    # ------------------------------------------------------------------ show

    def _status(self, state: str) -> StudyStatus:
        notes = [trouble for trouble in (self.mirror.trouble, self.book.trouble) if trouble]
        if self.short_of_space:
            notes.append(f"the disk is full; free some space, it goes on: {self.short_of_space}")
        notes += [
            f"{node} is set aside: trial after trial failed there before its first step, the last: "
            f"{detail}; mend it, and restart its Ray node or launch again to use it"
            for node, detail in self.aside.items()
        ]
        if self.over_budget:
            notes.append(
                f"the budget of {self.study.budget.gpu_hours} accelerator-hours is spent, or does "
                "not hold another block of seeds; raise budget.gpu_hours to go on"
            )
        write_controller(self.record, state=state, active=self.active, notes=notes)
        return picture(
            self.study,
            self.record,
            self.ledger,
            running=[(self.wanted[trial_id], n) for trial_id, n in self.active.items()],
            num_trials=len(self.wanted),
            controller=state,
            notes=notes,
            pruning=self.referee.describe() if self.referee is not None else (),
        )

    def _stop_file(self) -> int:
        if (self.record.folder / "stop-now").exists():
            return 2
        return 1 if (self.record.folder / "stop").exists() else 0


def retell(study: Study, record: StudyRecord, book: Book) -> None:
    """Tell a book every cell of the study anew, in the order they were asked."""
    trials = planned(study, record)
    referee = referee_of(study, record, report=book.report)
    if referee is not None:
        referee.recall({trial.id: trial for trial in trials})
    for cell in {trial.cell.levels: trial.cell for trial in trials}.values():
        mine = [trial for trial in trials if trial.cell.levels == cell.levels]
        outcomes = [(trial, record.record(trial.id).outcome()) for trial in mine]
        book.begin(cell)
        if all(outcome is not None for _, outcome in outcomes):
            book.tell(cell, [result_of(trial, o) for trial, o in outcomes if o is not None])


def planned(study: Study, record: StudyRecord) -> list[Trial]:
    """What launch would run or has run, as far as is known now: the list that plan prints."""
    found = [t for folder in record.records() if (t := study.recall(folder.trial())) is not None]
    results = [
        result_of(trial, outcome)
        for trial in found
        if (outcome := record.record(trial.id).outcome()) is not None
    ]
    trials = {trial.id: trial for trial in design.propose(study, results)}
    if isinstance(study.design, Search):
        trials.update({trial.id: trial for trial in found})
    return list(trials.values())


def _outcome_of(study: Study, result: dict[str, Any]) -> dict[str, Any]:
    """The outcome that an attempt's own last word stands for."""
    outcome = Outcome(result["status"])
    final = result.get("final") or {}
    value = final.get(study.objective.metric)
    if outcome is Outcome.COMPLETED and value is None:
        outcome = Outcome.FAILED
        result = {
            **result,
            "reason": f"the trial ended without {study.objective.metric}; "
            f"it measured: {', '.join(sorted(final)) or 'nothing'}",
        }
    kept = (
        *("best", "final", "verdict", "flags", "stop", "reason", "step"),
        *("train_s", "num_parameters", "parameter_groups", "peak_memory_gib"),
    )
    return {
        "outcome": outcome,
        "value": float(value) if outcome is Outcome.COMPLETED and value is not None else None,
        **{key: result[key] for key in kept if key in result},
    }
