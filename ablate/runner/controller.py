"""The study loop: ask, place, wait, record, tell.

`launch` reconciles a study with its folder: trials with an outcome are done, the rest are
attempted, and launching again (after a crash, on another machine, with one more factor or seed)
is the one way to go on. One controller at a time works on a folder; it alone writes outcomes.

What follows from what is decided elsewhere: :mod:`agenda` what is wanted, :mod:`attempts` what runs
where, :mod:`endings` what an end means, :mod:`budget` what may be spent. Only this loop acts.
"""

from __future__ import annotations

import errno
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from ablate.cluster.contract import Capacity, Cluster, GangEvent, Shape
from ablate.errors import ClusterError, PlacementError
from ablate.records.files import free_gib
from ablate.records.folder import StudyRecord
from ablate.runner.agenda import Agenda, Book
from ablate.runner.attempts import Attempts, write_end, write_outcome
from ablate.runner.breaker import Breaker, BreakerRules
from ablate.runner.budget import Budget
from ablate.runner.endings import GiveUp, Retry, RetryRules, decide, kind_of, outcome_of
from ablate.runner.hold import check_hold, stop_asked, write_controller
from ablate.runner.status import StudyStatus, picture
from ablate.runner.tenant import check_tenant, write_study
from ablate.search.referee import Referee, referee_of
from ablate.study import Study
from ablate.trial.identity import Outcome, Trial

_WAITS_S = 5.0
"""A gang is placed within so long where its seats are free: every launch begins with a shortage."""
_STUCK_S = 300.0
"""How long nothing may find a seat before the study counts as stuck."""
POLL_S = 0.5
"""How long one turn of the loop waits for the cluster."""

WORKER = "ablate.trial.worker:main"
"""What every rank of a gang runs: an importable function that reads the environment alone."""

GRACE_S = 120.0
"""Time a stopped trial has for its checkpoint before it is killed."""

_ANEW_S = 60.0
"""Until a trial that could not be given up is tried anew."""

PASSING = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN}
)
"""Troubles of a disk that pass: what could not be written is kept and tried again."""

LOOKING_SHARE = 0.1
"""Most of the loop's time that goes into the picture of the study for people."""


class Mirror(Protocol):
    """Where people watch (`ablate.tracking`); it never raises and never blocks for long."""

    @property
    def trouble(self) -> str | None:
        """One line while the mirror is behind; it catches up by itself."""

    def update(self, trials: Sequence[Trial], active: Sequence[str]) -> None:
        """Bring the mirror up to date with the study folder, soon; `trials` only ever grows."""


def launch(
    study: Study,
    record: StudyRecord,
    *,
    cluster: Cluster,
    book: Book,
    mirror: Mirror,
    archive: Mirror | None = None,
    stop_level: Callable[[], int] = lambda: 0,
    watch: Callable[[StudyStatus], None] = lambda status: None,
    entry: str = WORKER,
    clock: Callable[[], float] = time.monotonic,
    rules: RetryRules | None = None,
    breaker_rules: BreakerRules | None = None,
    looking_share: float = LOOKING_SHARE,
) -> StudyStatus:
    """Run what is missing of the study until every trial has an outcome, or it is stopped.

    `archive` is a second mirror, of records. `stop_level` is asked every turn: 1 lets running
    trials checkpoint first, 2 ends them at once.
    `watch` gets the study's status every few turns. Returns the last status. The caller holds
    :func:`ablate.runner.hold.controlling`. `clock` gives seconds that only go forward, whatever
    the time of day does. `rules` say when a trial is given up, `breaker_rules` when a cause that
    is everywhere makes a pause.

    Raises:
        PlacementError: no gang of this study fits the cluster.
        ClusterError: the cluster ends before the study; what ran has written checkpoints.
        PlanError: a rung of the study's pruning lies within a warmup.
        RecordError: the folder is another study's.
    """
    check_tenant(study, record)
    write_study(study, record)
    loop = _Loop(
        study=study,
        record=record,
        mirrors=(mirror,) if archive is None else (mirror, archive),
        clock=clock,
        agenda=Agenda(study, record, book, referee_of(study, record, report=book.report)),
        attempts=Attempts(study, record, cluster, entry, clock),
        budget=Budget(study.budget.gpu_hours, grace_s=GRACE_S, turn_s=POLL_S),
        rules=rules or RetryRules(attempts=study.budget.attempts),
        breaker=Breaker(breaker_rules or BreakerRules()),
        looking_share=looking_share,
    )
    try:
        return loop.run(stop_level, watch)
    finally:
        write_controller(record, state="absent", active={}, notes=())


@dataclass(slots=True, kw_only=True)
class _Loop:
    """One launch."""

    study: Study
    record: StudyRecord
    mirrors: Sequence[Mirror]
    clock: Callable[[], float]
    agenda: Agenda
    attempts: Attempts
    budget: Budget
    rules: RetryRules
    looking_share: float
    breaker: Breaker
    unsettled: deque[tuple[GangEvent, float]] = field(default_factory=deque)
    """Events with the time they came, that wait to be written down: the disk may be full."""
    unwritten: str = ""
    """Why they wait."""
    over_budget: bool = False
    """Nothing more is started."""
    cut: bool = False
    """What ran was stopped for the budget's sake."""
    preempted: int = 0
    """Attempts that somebody took the machine from."""
    short_since: float | None = None
    """When nothing that was handed to the cluster ran any more."""

    def run(
        self, stop_level: Callable[[], int], watch: Callable[[StudyStatus], None]
    ) -> StudyStatus:
        """Turn until nothing is left to do."""
        self.agenda.begin()
        self._end_pruned()
        active = self.attempts.active
        stopping, look_at = 0, 0.0
        while True:
            check_hold(self.record)
            level = max(stop_level(), stop_asked(self.record))
            if level > stopping:
                stopping = level
                self.attempts.stop(active, grace_s=GRACE_S if level == 1 else 0.0)
            if not stopping:
                self.attempts.reconsider()
                self._cut()
                self._fill()
            for mirror in self.mirrors:
                mirror.update(self.agenda.order, list(active))
            began = time.monotonic()
            if began >= look_at:
                watch(_status_of(self, "stopping" if stopping else "running"))
                now = time.monotonic()
                look_at = now + (now - began) * (1 / self.looking_share - 1)
            if not active and (stopping or self.over_budget or not self.agenda.backlog):
                return _status_of(self, "absent")
            for event in self.attempts.cluster.wait(POLL_S):
                self.unsettled.append((event, self.clock()))
            self._settle_all()
            self.agenda.write_some()
            if not stopping:
                self._prune()

    # ------------------------------------------------------------------ start

    def _fill(self) -> None:
        """Hand the cluster as many trials as it can run at once."""
        if self.over_budget or self.agenda.next(self.clock()) is None:
            return
        shape, capacity = self.attempts.room()
        if capacity.silent or capacity.ends:
            return  # what is begun now would only wait
        if capacity.total == 0:
            if self.attempts.placed or (self.attempts.active and not capacity.notes):
                return  # its nodes may come back
            raise PlacementError(
                f"a gang of {shape.workers} workers does not fit: {capacity.reason}"
            )
        seats = self._seats(capacity)
        while len(self.attempts.active) < seats:
            trial = self.agenda.next(self.clock())
            if trial is None:
                return
            if not _is_affordable(self, trial, shape):
                self.over_budget = True
                return
            self._start(self.agenda.take(self.clock()), shape)
            if self.breaker.cause:
                self.breaker.canary = trial.id

    def _seats(self, capacity: Capacity) -> int:
        """How many attempts the cluster may hold now."""
        self.attempts.shortage = "" if capacity.ours else capacity.busy
        self.attempts.notes = capacity.notes
        if (canary := self.breaker.canary) in self.attempts.active:
            number = self.attempts.active[canary]
            self.breaker.release(canary, step=self.record.record(canary).last_step(number))
        free = free_gib(self.record.folder) if self.breaker.cause == "space" else 0.0
        allowed = self.breaker.seats(now=self.clock(), free_gib=free)
        if allowed is None:
            return capacity.total
        return min(capacity.total, len(self.attempts.active) + allowed)

    def _start(self, trial: Trial, shape: Shape) -> None:
        folder = self.record.record(trial.id)
        number = max(folder.attempts(), default=0)
        result, end = folder.result(number), folder.end(number)
        if result is not None and end is not None and end["kind"] == "ended":
            # It had ended when its controller was killed.
            self._conclude(trial, **outcome_of(result, self.study.objective.metric))
            return
        try:
            self.agenda.write(trial)
            self.attempts.start(trial, shape)
        except PlacementError:
            raise
        except OSError as error:
            if error.errno not in PASSING:
                raise
            self.unwritten = str(error)
            self.agenda.backlog.add(trial, not_before=self.clock() + _ANEW_S)
        except ClusterError as error:
            self._spend(write_end(self.record, folder, number + 1, kind="lost", detail=str(error)))
            self._follow(trial)

    # ------------------------------------------------------------------ end

    def _settle_all(self) -> None:
        """Settle what has come, in order; what the disk does not take now is tried again."""
        while self.unsettled:
            try:
                self._settle(*self.unsettled[0])
            except OSError as error:
                if error.errno not in PASSING:
                    raise
                self.unwritten = str(error)
                return
            self.unwritten = ""
            self.unsettled.popleft()

    def _settle(self, event: GangEvent, came_at: float) -> None:
        """Write down what became of an attempt, and do what follows.

        Twice gives the same as once: the disk may take one file and not the next.
        """
        if self.attempts.active.get(event.trial_id) != event.number:
            return  # an attempt that was given up; its folder is its own
        if event.kind == "placed":
            self.attempts.place(event, came_at)
            return
        trial = self.agenda.wanted[event.trial_id]
        result = self.record.record(trial.id).result(event.number)
        kind = kind_of(event, result)
        end = self.attempts.write_end(event, kind, came_at)
        if kind == "ended":
            assert result is not None
            self._conclude(trial, **outcome_of(result, self.study.objective.metric))
        elif self.agenda.referee is not None and trial.id in self.agenda.referee.ended:
            self._conclude_pruned(trial, self.agenda.referee)
        self._spend(end)
        self.attempts.forget(event, end)
        self.preempted += kind == "preempted"
        counts = self.breaker.note(
            trial.id,
            end,
            now=self.clock(),
            left=len(self.agenda.backlog) + len(self.attempts.active),
            free_gib=free_gib(self.record.folder) if kind == "no_space" else 0.0,
        )
        if trial.id not in self.agenda.results:
            self._follow(trial, counts=counts)

    def _follow(self, trial: Trial, *, counts: bool = True) -> None:
        """Try a trial again whose last attempt gave no result, or give it up."""
        folder = self.record.record(trial.id)
        machines = self.attempts.num_machines
        if not counts:  # the breaker says when
            self.agenda.backlog.add(trial)
            return
        match decide(folder.ends_that_count(), rules=self.rules, num_machines=machines):
            case Retry(after_s):
                self.agenda.backlog.add(
                    trial, not_before=self.clock() + after_s if after_s else None
                )
            case GiveUp(outcome, reason):
                said = folder.log_tail(folder.attempts()[-1])
                why = f"{reason}\n{said}".rstrip()
                try:
                    self._conclude(trial, outcome=outcome, value=None, reason=why)
                except OSError as error:
                    if error.errno not in PASSING:
                        raise
                    self.agenda.backlog.add(trial, not_before=self.clock() + _ANEW_S)

    def _conclude(self, trial: Trial, **facts: object) -> None:
        folder = self.record.record(trial.id)
        facts["outcome"] = str(facts["outcome"])
        workers = self.study.gang.workers
        content = folder.outcome() or write_outcome(self.record, folder, workers=workers, **facts)
        self.agenda.conclude(trial, content)

    def _spend(self, end: dict[str, object]) -> None:
        self.agenda.ledger.spend([end], workers=self.study.gang.workers)

    # ------------------------------------------------------------------ end early

    def _cut(self) -> None:
        """Stop what runs while there is still time for a checkpoint within the budget."""
        running = self.attempts.running()
        if self.cut or not running:
            return
        grace_s = self.budget.grace_left_s(spent_s=self.agenda.ledger.spent_s, running=running)
        if grace_s is not None:
            self.over_budget = self.cut = True
            self.attempts.stop(self.attempts.active, grace_s=grace_s)

    def _prune(self) -> None:
        """End the running trials of a search that fell behind, with the other seeds of theirs."""
        if (referee := self.agenda.referee) is None:
            return
        active = self.attempts.active.items()
        behind = referee.look([(self.agenda.wanted[trial_id], n) for trial_id, n in active])
        for trial in {trial.cell.levels: trial for trial in behind}.values():
            self._end_cell(trial, referee)

    def _end_pruned(self) -> None:
        """End what an earlier launch had decided to end, and did not come to."""
        if (referee := self.agenda.referee) is not None:
            for trial_id in list(referee.ended):
                self._end_cell(self.agenda.wanted[trial_id], referee)

    def _end_cell(self, trial: Trial, referee: Referee) -> None:
        """A cell with a pruned seed has no mean to compare, so its other seeds end with it."""
        reason = referee.ended[trial.id]
        for other in self.agenda.seeds_of(trial):
            referee.ended.setdefault(other.id, f"ended with seed {trial.seed}: {reason}")
            if other.id in self.attempts.active:
                self.attempts.stop([other.id], grace_s=GRACE_S)
            elif self.agenda.backlog.remove(other):
                self._conclude_pruned(other, referee)

    def _conclude_pruned(self, trial: Trial, referee: Referee) -> None:
        folder = self.record.record(trial.id)
        steps = [folder.last_step(number) for number in folder.attempts()]
        self._conclude(
            trial,
            outcome=Outcome.PRUNED,
            value=None,
            reason=referee.ended[trial.id],
            step=max(steps, default=0),
        )


def _is_affordable(loop: _Loop, trial: Trial, shape: Shape) -> bool:
    """Whether a trial may start: with the first of a seed block, the whole block must fit."""
    ledger, running = loop.agenda.ledger, loop.attempts.running()
    grace_s = loop.budget.grace_left_s(spent_s=ledger.spent_s, running=running, more=shape.workers)
    if grace_s is not None:
        return False  # it would be stopped at once
    if trial.seed in loop.agenda.begun_seeds:
        return True
    ahead = len(running) + loop.agenda.backlog.num_of_seed(trial.seed)
    workers = loop.study.gang.workers
    return loop.budget.allows_block(ledger, num_trials=ahead, workers=workers)


def _status_of(loop: _Loop, state: str) -> StudyStatus:
    active, referee = loop.attempts.active, loop.agenda.referee
    notes = _notes_of(loop)
    write_controller(loop.record, state=state, active=active, notes=notes)
    shown = picture(
        loop.study,
        loop.record,
        loop.agenda.ledger,
        running=[(loop.agenda.wanted[trial_id], n) for trial_id, n in active.items()],
        num_trials=len(loop.agenda.wanted),
        controller=state,
        notes=notes,
        pruning=referee.describe() if referee is not None else (),
        search=loop.agenda.progress(),
    )
    stuck = (
        loop.breaker.describe()
        if loop.breaker.cause
        else loop.unwritten or _shortage(loop, lasting_s=_STUCK_S)
    )
    return replace(shown, stuck=stuck, over_budget=loop.over_budget, preempted=loop.preempted)


def _shortage(loop: _Loop, *, lasting_s: float) -> str:
    """Why no trial runs, though some were handed to the cluster, once that has lasted."""
    attempts, now = loop.attempts, loop.clock()
    short = attempts.shortage if attempts.active and not attempts.placed else ""
    loop.short_since = (loop.short_since or now) if short else None
    return short if now - (loop.short_since or now) >= lasting_s else ""


def _notes_of(loop: _Loop) -> list[str]:
    """Troubles that do not stop the study, a sentence each."""
    troubles = (*(mirror.trouble for mirror in loop.mirrors), loop.agenda.book.trouble)
    notes = [trouble for trouble in troubles if trouble]
    if loop.breaker.cause:
        notes.append(loop.breaker.describe())
    if loop.unwritten:
        notes.append(f"what ended cannot be written down now, and is kept: {loop.unwritten}")
    notes += loop.attempts.notes
    if shortage := _shortage(loop, lasting_s=_WAITS_S):
        notes.append("waits for seats that are away, or that others hold: " + shortage)
    notes += [
        f"{node} is set aside: trial after trial failed there before its first step, the last: "
        f"{detail}; mend it, and restart its Ray node or launch again to use it"
        for node, detail in loop.attempts.aside.items()
    ]
    if loop.over_budget:
        notes.append(
            f"the budget of {loop.study.budget.gpu_hours} accelerator-hours is spent, or does "
            "not hold another block of seeds; raise budget.gpu_hours to go on"
        )
    return notes
