"""One study's runs in MLflow, brought up to date with its folder.

What a run should show is said in ``runs``, what is known to stand there in ``known``; here is who
is looked at, and that one trial that cannot be shown does not hold up the others.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from ablate.analysis.results import Score
from ablate.errors import AblateError, TrackingError
from ablate.records.folder import StudyRecord
from ablate.records.masking import reason_of
from ablate.study import Study
from ablate.tracking.mlflow.answer import read_answer
from ablate.tracking.mlflow.cell_runs import sync_cell
from ablate.tracking.mlflow.door import Door
from ablate.tracking.mlflow.known import Known
from ablate.tracking.mlflow.patience import Abandoned, Patience
from ablate.tracking.mlflow.study_run import ensure_study, sync_study
from ablate.tracking.mlflow.trial_runs import sync_trial
from ablate.trial.identity import Levels, Trial
from ablate.words import counted

_ANSWER_S = 60.0
"""Least time between two readings of all results while the study runs."""

_CELL_S = 15.0
"""Least time between two tellings of a cell whose seeds have not all ended: each takes as long as a
trial's."""

_MOST_TOLD = 3
"""Trials that the one line of trouble names."""


class Mirror:
    """One study's runs in MLflow; every method may raise whatever MLflow raises."""

    def __init__(
        self,
        study: Study,
        record: StudyRecord,
        score: Score,
        uri: str,
        fresh: bool,
        patience: Patience,
    ) -> None:
        self._known = Known(study, record, score)
        self._uri = uri
        self._fresh = fresh
        self._patience = patience
        self._door: Door | None = None
        self._pending: set[str] = set()
        """Trials to look at in the next round."""
        self._stale: dict[Levels, float] = {}
        """Cells with news that is not told, and since when (monotonic s)."""
        self._num_known = 0
        self._by_call = False
        """Whether each thing is told by a call of its own."""
        self.done = self.total = 0
        """Trials of this round that were looked at, and all of them."""
        self._answered = 0
        """Changes of outcomes when the answer was last read, which takes its time."""
        self._answer_due = 0.0

    @property
    def complaint(self) -> str | None:
        """What cannot be shown: a trial that MLflow refuses, or whose records cannot be read."""
        found = list(dict.fromkeys(self._known.complaints))
        if not found:
            return None
        more = f"; and {counted(len(found) - _MOST_TOLD, 'more trouble')}"
        return "; ".join(found[:_MOST_TOLD]) + (more if len(found) > _MOST_TOLD else "")

    def forget(self) -> None:
        """Believe nothing about MLflow: the next round connects and looks again."""
        self._door = None
        self._pending.update(self._known.trials)

    def update(
        self,
        trials: Sequence[Trial],
        active: frozenset[str],
        touched: Iterable[str],
        *,
        closing: bool,
    ) -> None:
        """One round: bring every trial that may have news up to date."""
        try:
            self._go_round(trials, active, touched, closing=closing)
        except SQLAlchemyError:
            self._by_call = True  # so MLflow says which run it is that it refuses
            raise

    def _go_round(
        self,
        trials: Sequence[Trial],
        active: frozenset[str],
        touched: Iterable[str],
        *,
        closing: bool,
    ) -> None:
        known = self._known
        self._pending.update(known.take_in(trials[self._num_known :]))
        self._num_known = len(trials)
        self._pending.update(trial_id for trial_id in touched if trial_id in known.trials)
        door = self._door or self._connect()
        known.complaints.clear()
        asked = [i for i in known.trials if i in self._pending]
        self.done, self.total = 0, len(asked)
        for trial_id in asked:
            self._patience.look_on()
            trial = known.trials[trial_id]
            done = self._try(door, trial, running=trial_id in active, closing=closing)
            self._stale.setdefault(trial.cell.levels, time.monotonic())
            self.done += 1
            if done or trial_id not in active:
                self._pending.discard(trial_id)
        if known.runs:
            ensure_study(door, known)
            self._read_answer(closing=closing)
        self._tell_cells(door, closing=closing)
        sync_study(door, known, closing=closing)
        door.flush()
        if closing:
            self._compare(door)

    def _tell_cells(self, door: Door, *, closing: bool) -> None:
        """Tell what is new of cells; of those whose seeds have not all ended now and then."""
        now = time.monotonic()
        for levels, since in list(self._stale.items()):
            if closing or self._known.is_due(levels) or now - since >= _CELL_S:
                self._patience.look_on()
                self._try_cell(door, levels, closing=closing)
                del self._stale[levels]

    def _read_answer(self, *, closing: bool) -> None:
        """Read what the results say, at the end and now and then; adds the cells that it says
        something else about."""
        known, now = self._known, time.monotonic()
        if (known.answer is not None and known.changes == self._answered) or not known.ended:
            return
        if not closing and now < self._answer_due:
            return
        before = known.answer.effects if known.answer is not None else {}
        try:
            known.answer = read_answer(known.study, known.record)
        except Exception as error:  # a record is not whole, in whatever way
            known.complaints.append(f"what to use is not told: {_why(error)}")
            return
        self._answered = known.changes
        self._answer_due = now + max(_ANSWER_S, 20 * (time.monotonic() - now))
        for levels, effect in known.answer.effects.items():
            if effect != before.get(levels) and levels in known.by_cell:
                self._stale.setdefault(levels, now)

    def _compare(self, door: Door) -> None:
        """See whether all that should stand in MLflow does, once; what does not is told again.

        Raises:
            TrackingError: something is missing.
        """
        missing = self._known.compare(door)
        if not missing:
            door.end_rebuilding()
        elif not self._known.complaints:
            wanted = len(self._known.ended)
            raise TrackingError(f"it holds {wanted - len(missing)} of {counted(wanted, 'trial')}")

    def _connect(self) -> Door:
        door = Door(
            self._known.study.name,
            self._known.record,
            self._uri,
            self._patience,
            by_call=self._by_call,
        )
        self._known.look(door, fresh=self._fresh)
        self._fresh = False
        self._door = door
        return door

    def _try(self, door: Door, trial: Trial, *, running: bool, closing: bool) -> bool:
        """Bring a trial up to date; one that cannot be is named, and the others go on."""
        known = self._known
        called = f"{known.name(trial)} ({trial.id})"
        try:
            done = sync_trial(door, known, trial, running=running, closing=closing)
            known.unreadable.discard(trial.id)
            if done:
                self._patience.finished()
            return done
        except SQLAlchemyError:
            raise
        except MlflowException as error:
            run = known.runs.get(trial.id)
            deleted = run is not None and door.is_deleted(run.run_id)
            if error.error_code != "INVALID_PARAMETER_VALUE" or deleted:
                raise
            known.complaints.append(f"MLflow refuses {called}: {reason_of(error)}")
        except Exception as error:
            if not _is_of_records(error, known.record.folder):
                raise
            known.unreadable.add(trial.id)
            known.complaints.append(f"{called} is not mirrored: {_why(error)}")
            run = known.runs.get(trial.id)
            if run is not None and not running:  # what came of it so far stands there
                door.log(run.run_id, tags={"outcome": "unreadable", "reason": _why(error)})
                door.set_status(run, "KILLED")
        return True

    def _try_cell(self, door: Door, levels: Levels, *, closing: bool) -> None:
        """Bring a cell up to date; one that cannot be is named, and the others go on."""
        known = self._known
        try:
            sync_cell(door, known, levels, closing=closing)
        except (MlflowException, SQLAlchemyError):
            raise
        except Exception as error:
            if not _is_of_records(error, known.record.folder):
                raise
            called = known.study.change_name(dict(levels))
            known.complaints.append(f"the setting {called} is not mirrored: {_why(error)}")


def _is_of_records(error: Exception, folder: Path) -> bool:
    """Whether an error comes of what one trial's records hold; else of the way to MLflow, of which
    whatever concerns a network or a disk may pass."""
    if isinstance(error, OSError):
        within = Path(str(error.filename or "")).is_relative_to(folder)
        return within and isinstance(
            error, PermissionError | IsADirectoryError | NotADirectoryError
        )
    return not isinstance(error, Abandoned)


def _why(error: Exception) -> str:
    """The reason, with the kind of error where its text alone says little (``'value'``)."""
    said = reason_of(error)
    return said if isinstance(error, AblateError) else f"{type(error).__name__}: {said}"
