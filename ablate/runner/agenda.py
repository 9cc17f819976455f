"""What a study wants: which trials, in which order, which have ended, what results bring."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ablate.analysis.results import Result
from ablate.errors import RecordError
from ablate.records.folder import StudyRecord
from ablate.records.provenance import fingerprint
from ablate.runner.attempts import abandon_unseen
from ablate.runner.backlog import Backlog
from ablate.runner.budget import Ledger
from ablate.runner.hold import controlling
from ablate.search.referee import Referee, referee_of
from ablate.study import Observed, Search, Study, design, sweep
from ablate.study.results import result_of
from ablate.trial.identity import Cell, Levels, Outcome, Trial

WRITING_S = 0.1
"""How long one turn of the loop may write what is asked of trials that wait."""


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


@dataclass(slots=True)
class Agenda:
    """What is wanted and what came of it. Kept up to date per event, never recounted."""

    study: Study
    record: StudyRecord
    book: Book
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
    of_cell: dict[Levels, list[Trial]] = field(default_factory=dict)
    unended: Counter[Levels] = field(default_factory=Counter)
    """How many trials of a cell have not ended."""
    begun_seeds: set[int] = field(default_factory=set)
    """Seed blocks of which at least one trial was started."""
    ledger: Ledger = field(default_factory=Ledger)
    versions: dict[str, str] = field(default_factory=fingerprint)
    _written: set[str] = field(default_factory=set)
    """Trials that earlier launches wrote."""
    _unwritten: dict[str, Trial] = field(default_factory=dict)
    """Trials without a trial.json, in order: thousands of them must not hold up the first."""
    _outcomes: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    """Read, and not yet taken up."""
    _exhausted: bool = False
    """A search asks for nothing more."""
    _all_asked: bool = False
    """The space of a search has no further cell."""
    _proposed_at: int = -1
    """Number of results at which the design was last asked."""

    def begin(self) -> None:
        """Take up what earlier launches left, ask the design, and tell the book what has ended."""
        self._recall()
        self.extend()
        if self.referee is not None:
            self.referee.recall(self.wanted)
        for levels in self.of_cell:
            self._tell(levels)

    def next(self, now: float) -> Trial | None:
        """The trial to start next, from search and design if none is ready; None: not now."""
        while True:
            trial = self.backlog.first(now)
            if trial is not None:
                return trial
            if not self._search_more() and not self.extend():
                return None

    def take(self, now: float) -> Trial:
        """Remove and return :meth:`next`, which must be there: it is handed to the cluster."""
        trial = self.backlog.take(now)
        self.begun_seeds.add(trial.seed)
        return trial

    def extend(self) -> bool:
        """Ask the design for trials, new results may bring new ones; whether any came."""
        if self._proposed_at == len(self.results):
            return False
        if self._proposed_at >= 0 and not design.grows(self.study):
            waits = any(key not in self.results for key in self.wanted)
            if waits or not self.study.confirm:
                return False
        self._proposed_at = len(self.results)
        before = len(self.wanted)
        for trial in design.propose(self.study, list(self.results.values())):
            self._want(trial)
            if self.referee is not None:
                self._keep(trial, self.referee)
        return len(self.wanted) > before or bool(self.backlog)

    def conclude(self, trial: Trial, content: Mapping[str, Any]) -> None:
        """A trial has ended, and its outcome.json with this content is on disk."""
        self.ledger.count(trial, content)
        folder = self.record.record(trial.id)
        self.results[trial.id] = result = result_of(trial, folder, content)
        if self.referee is not None:
            self.referee.finish(trial, folder, design.score_of(self.study, result))
        self.unended[trial.cell.levels] -= 1
        self._tell(trial.cell.levels)

    def progress(self) -> tuple[str, ...]:
        """How a search stands, a line each; nothing of other designs."""
        lines = sweep.progress(self.study, list(self.results.values()), asked=self._num_asked())
        if self._exhausted and sweep.has_converged(self.study, list(self.results.values())):
            lines = (*lines, "no more cells are asked for: that is less than `until` wants")
        return lines

    def seeds_of(self, trial: Trial) -> Sequence[Trial]:
        """All trials of a trial's cell, itself included."""
        return self.of_cell[trial.cell.levels]

    def _recall(self) -> None:
        """Take up what earlier launches left: ended trials, and the cells a search has asked.

        A design whose list needs no results takes them up one by one, as it lists their trials;
        what is to be confirmed depends on cells that it does not list.
        """
        self._written = self.record.trial_ids()
        asks = design.grows(self.study) or isinstance(self.study.design, Search)
        if not (asks or self.study.confirm):
            return
        for folder in self.record.records():  # in the order they were asked, for the sampler
            trial = self.study.recall(folder.trial())
            if trial is None:
                continue
            if isinstance(self.study.design, Search):
                if trial.seed in self.study.seeds:
                    self._want_cell(trial.cell)
                else:
                    self._want(trial)  # it confirms, and its cell may have no other run
            outcome = folder.outcome()
            if outcome is not None:
                self.results[trial.id] = result_of(trial, folder, outcome)
                if trial.id not in self.wanted:
                    self._outcomes[trial.id] = outcome

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
        outcome = self._look(trial)
        if outcome is not None:
            folder = self.record.record(trial.id)
            self.results[trial.id] = result_of(trial, folder, outcome)
            self.ledger.count(trial, outcome)
            self.begun_seeds.add(trial.seed)
        else:
            self.unended[levels] += 1
            self.backlog.add(trial)

    def _look(self, trial: Trial) -> Mapping[str, Any] | None:
        """What earlier launches left of a trial: its outcome, or None and how its attempts ended.

        A trial that was never written is new, and costs no look at the disk. What a search asks is
        written at once, in the order in which it was asked.
        """
        workers = self.study.gang.workers
        folder = self.record.record(trial.id)
        if trial.id not in self._written:
            self._unwritten[trial.id] = trial
            if isinstance(self.study.design, Search):
                self.write(trial)
            return None
        outcome = self._outcomes.pop(trial.id, None) or folder.outcome()
        if outcome is not None:
            self.ledger.spent_s += outcome.get("worker_s", outcome["wall_s"] * workers)
            self.ledger.interrupt(outcome.get("interrupted", {}))
            return outcome
        self._unwritten[trial.id] = trial  # its launch may have been killed before it came to it
        abandon_unseen(self.record, folder)
        self.ledger.spend(folder.ends(), workers=workers)
        return None

    def write(self, trial: Trial) -> None:
        """Write a trial's trial.json, before its first attempt."""
        if trial.id in self._unwritten:
            self.record.write_trial({**trial.to_json(), "fingerprint": self.versions})
            del self._unwritten[trial.id]

    def write_some(self) -> None:
        """Write trial.json of trials that wait, for as long as one turn of the loop can spare."""
        until = time.monotonic() + WRITING_S
        while self._unwritten and time.monotonic() < until:
            self.write(next(iter(self._unwritten.values())))

    def _keep(self, trial: Trial, referee: Referee) -> None:
        """What a design lists is run to its end, also if the search had ended it early."""
        pruned = self.results.get(trial.id)
        reopened = pruned is not None and pruned.outcome == Outcome.PRUNED
        if trial.id in referee.kept and not reopened:
            return
        referee.keep(trial, log=reopened)
        if reopened:
            self._reopen(trial)

    def _reopen(self, trial: Trial) -> None:
        folder = self.record.record(trial.id)
        outcome = folder.outcome()
        assert outcome is not None
        self.record.reopen(folder)
        self.ledger.uncount(outcome)
        del self.results[trial.id]
        self.unended[trial.cell.levels] += 1
        self.backlog.add(trial)

    def _tell(self, levels: Levels) -> None:
        """Tell the book about a cell whose trials have all ended."""
        if not self.unended[levels]:
            mine = self.of_cell[levels]
            self.book.tell(mine[0].cell, [self.results[trial.id] for trial in mine])

    def _search_more(self) -> bool:
        """Ask the search for one more cell, or for another run of one whose noise decides; False
        when it has had its budget of cells."""
        plan = self.study.design
        if not isinstance(plan, Search) or self._exhausted or self._num_asked() >= plan.cells:
            return False
        results = list(self.results.values())
        if sweep.has_converged(self.study, results):
            self._exhausted = True
            return False
        again = sweep.to_repeat(self.study, results)
        if again is not None:
            trial = self.study.trial(again[0], seed=again[1])
            if trial.id not in self.wanted:  # else it runs: until it ends, new cells are asked
                self._want(trial)
                return True
        cell = None if self._all_asked else self.book.ask()
        if cell is None:
            self._all_asked = True
            # Results to come may still say that a cell be run again.
            waits = plan.until is not None and (again is not None or any(self.unended.values()))
            self._exhausted = not waits
            return False
        self.of_cell.setdefault(cell.levels, [])  # begun by the book itself
        self._want_cell(cell)
        return True

    def _num_asked(self) -> int:
        """Cells of a search, and further runs of cells, that its budget has paid for."""
        repeats = sweep.num_repeats(self.study, (trial.seed for trial in self.order))
        return len(self.of_cell) + repeats


def reopen_unanswered(record: StudyRecord) -> int:
    """Let trials go on that ended without saying anything about their setting, because the cause
    is mended; how many. The folder's next launch runs them, from their last checkpoint.

    Raises:
        RecordError: a launch works on the folder.
    """
    count = 0
    with controlling(record):
        for folder in record.records():
            outcome = folder.outcome()
            if outcome is not None and outcome["outcome"] in (Outcome.FAILED, Outcome.LOST):
                record.reopen(folder, kept_as="failed.json")
                count += 1
    return count


def planned(study: Study, record: StudyRecord) -> list[Trial]:
    """What launch would run or has run, as far as is known now: the list that plan prints."""
    found = [t for folder in record.records() if (t := study.recall(folder.trial())) is not None]
    results = [result for trial in found if (result := _whole_result(record, trial)) is not None]
    trials = {trial.id: trial for trial in design.propose(study, results)}
    confirming = [] if study.confirm else design.confirmations(study, results)
    asked = {cell.levels for cell in confirming}
    for trial in found:  # `ablate confirm` runs what the study file does not ask for
        if isinstance(study.design, (Search, Observed)) or (
            study.untuned(trial.cell.levels) in asked
        ):
            trials[trial.id] = trial
    return list(trials.values())


def _whole_result(record: StudyRecord, trial: Trial) -> Result | None:
    """What came of a trial; None without an outcome, and of a damaged one: that is for `verify` to
    name."""
    folder = record.record(trial.id)
    try:
        outcome = folder.outcome()
    except RecordError:
        return None
    if outcome is None or outcome.get("outcome") not in set(Outcome):
        return None
    if not isinstance(outcome.get("value"), float | int | None):
        return None
    return result_of(trial, folder, outcome)


def retell(study: Study, record: StudyRecord, book: Book) -> list[str]:
    """Tell a book every cell of the study anew, in the order they were asked; what of it cannot be
    told, a line each."""
    trials = planned(study, record)
    referee = referee_of(study, record, report=book.report)
    if referee is not None:
        referee.recall({trial.id: trial for trial in trials})
    untold = []
    for cell in {trial.cell.levels: trial.cell for trial in trials}.values():
        mine = [trial for trial in trials if trial.cell.levels == cell.levels]
        book.begin(cell)
        results = [_whole_result(record, trial) for trial in mine]
        if None not in results:
            book.tell(cell, [result for result in results if result is not None])
            continue
        for trial, result in zip(mine, results, strict=True):
            if result is None and (record.record(trial.id).folder / "outcome.json").exists():
                name = f"{study.change_name(dict(cell.levels))} · seed {trial.seed} ({trial.id})"
                untold.append(f"the outcome of {name} is damaged")
    return untold
