"""Every cell in an Optuna storage, for optuna-dashboard and other readers; never read back."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import alembic.util
import optuna
import sqlalchemy
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

from ablate.errors import TrackingError
from ablate.records.masking import masked_url, reason_of
from ablate.search.cells import Entry
from ablate.search.space import directions_of, state_of
from ablate.study import Study
from ablate.trial.identity import Levels
from ablate.words import name_levels

_BUSY_S = 1.0
"""How long one write waits for a locked database, and so holds up the study, at most."""

_LONGEST_PAUSE_S = 60.0
"""Most time between two tries of a storage that is out of order."""


class Storage:
    """Keeps the Optuna study in the storage up to date; what cannot be written now waits."""

    def __init__(
        self,
        study: Study,
        space: Mapping[str, BaseDistribution],
        storage: Path | str,
        *,
        fresh: bool,
    ) -> None:
        self.trouble: str | None = None
        self._study = study
        self._space = dict(space)
        self._url, self._file = _url(storage)
        self._fresh = fresh
        self._engine: optuna.storages.RDBStorage | None = None
        self._study_id = -1
        self._wanted: dict[Levels, tuple[Entry, dict[str, Any]]] = {}
        self._behind: dict[Levels, None] = {}
        self._stored: dict[str, _Stored] = {}
        """What the storage holds, by the cell's name there."""
        self._outdated = False
        """A finished trial differs from what is wanted now, and has been followed by a new one."""
        self._pause_s = 0.0
        self._not_before = 0.0
        self._flush()

    def put(self, levels: Levels, entry: Entry, params: dict[str, Any] | None) -> None:
        """Show a cell, now or as soon as the storage can be written."""
        if params is None:
            return
        self._wanted[levels] = (entry, params)
        self._behind[levels] = None
        self._flush()

    def close(self) -> None:
        """Write what is behind if it can be; cells still running stand there as waiting."""
        self._not_before = 0.0
        if self._outdated:
            self._forget()
        self._flush()
        if self._engine is None:
            return
        try:
            for stored in self._stored.values():
                if stored.state == TrialState.RUNNING:
                    self._engine.set_trial_state_values(stored.trial_id, TrialState.WAITING)
            self._engine.engine.dispose()
        except _OUT_OF_ORDER as error:
            self._report(error)

    def _flush(self) -> None:
        if time.monotonic() < self._not_before:
            return
        try:
            if self._engine is None:
                self._open()
            for levels in list(self._behind):
                self._write(levels, *self._wanted[levels])
                del self._behind[levels]
        except _OUT_OF_ORDER as error:
            self._report(error)
        else:
            self.trouble, self._pause_s = None, 0.0

    def _report(self, error: Exception) -> None:
        reason = reason_of(error.__cause__ or error)
        self.trouble = f"the Optuna storage {masked_url(self._url)} is behind: {reason}"
        self._pause_s = min(max(2 * self._pause_s, 2.0), _LONGEST_PAUSE_S)
        self._not_before = time.monotonic() + self._pause_s
        self._forget()

    def _forget(self) -> None:
        """Believe nothing of what was written; the next flush looks, and writes what differs."""
        if self._engine is not None:
            self._engine.engine.dispose()
        self._engine = None
        self._stored = {}
        self._behind = dict.fromkeys(self._wanted)

    def _open(self) -> None:
        """Connect, and find what the storage holds of this study.

        A study with another space or objective, or with outdated trials, is written anew: Optuna
        can change neither the choices of a parameter nor a finished trial.
        """
        engine = self._connect()
        study = self._open_study(engine)
        self._study_id = engine.get_study_id_from_name(study)
        self._stored = {}
        for trial in engine.get_all_trials(self._study_id, deepcopy=False):
            if trial.state == TrialState.FAIL and trial.user_attrs.get("cell") in self._stored:
                continue
            if trial.state == TrialState.RUNNING:  # left by a controller that was killed
                engine.set_trial_state_values(trial._trial_id, TrialState.WAITING)
            self._stored[str(trial.user_attrs.get("cell"))] = _Stored(
                trial._trial_id,
                TrialState.WAITING if trial.state == TrialState.RUNNING else trial.state,
                trial.user_attrs.get("seeds"),
            )
        self._engine, self._fresh, self._outdated = engine, False, False

    def _connect(self) -> optuna.storages.RDBStorage:
        if self._file is not None:
            _prepare_sqlite(self._file)
        seconds: dict[str, float] = {}
        if self._file is not None:
            seconds = {"timeout": _BUSY_S}
        elif self._url.startswith("postgresql"):
            seconds = {"connect_timeout": 2}  # the least that libpq takes
        try:
            return self._storage(seconds)
        except (ImportError, sqlalchemy.exc.ArgumentError, sqlalchemy.exc.NoSuchModuleError) as e:
            advice = (
                "Give a path, or a URL such as sqlite:////abs/optuna.db or "
                "postgresql://user@host/optuna with its driver installed."
            )
            if isinstance(e, ImportError) and self._url.startswith("postgresql"):
                e = ImportError("its driver is not installed")
                advice = "Install it: pip install 'ablate-runner[postgres]'."
            said = str(e).rstrip(".")
            raise TrackingError(
                f"{masked_url(self._url)} cannot be used as Optuna storage: {said}. {advice}"
            ) from e

    def _storage(self, seconds: Mapping[str, float]) -> optuna.storages.RDBStorage:
        """The storage; one that another version of Optuna made is out of order, as a damaged one
        is, and where the view is made anew, a file of it is put aside."""
        arguments = {"connect_args": dict(seconds)}
        try:
            return optuna.storages.RDBStorage(self._url, engine_kwargs=arguments)
        except (RuntimeError, alembic.util.CommandError):
            if self._fresh and self._file is not None:
                for end in ("", "-wal", "-shm"):
                    with contextlib.suppress(FileNotFoundError):
                        os.replace(f"{self._file}{end}", f"{self._file}.other-version{end}")
                return optuna.storages.RDBStorage(self._url, engine_kwargs=arguments)
            raise optuna.exceptions.StorageInternalError(
                f"another version of Optuna than this one ({optuna.__version__}) made it; "
                "`ablate rebuild` makes it anew, or move it away"
            ) from None

    def _open_study(self, engine: optuna.storages.RDBStorage) -> str:
        """The name of this study's entry, written anew where it is another question's."""
        space = {
            name: optuna.distributions.distribution_to_json(distribution)
            for name, distribution in self._space.items()
        }
        objective = self._study.objective
        facts = {
            "space": space,
            "metric": objective.metric,
            "directions": list(directions_of(self._study)),
            "cost": objective.cost,
            "seeds": list(self._study.seeds),
        }
        name = self._study.name
        known = {item.study_name: item for item in optuna.get_all_study_summaries(engine)}
        if name in known:
            same = all(
                known[name].user_attrs.get(key) == facts[key]
                for key in ("space", "metric", "cost", "directions")
            )
            if self._fresh or self._outdated or not same:
                optuna.delete_study(study_name=name, storage=engine)
                del known[name]
        study = optuna.create_study(
            storage=engine,
            study_name=name,
            directions=list(directions_of(self._study)),
            load_if_exists=True,
        )
        if name not in known:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                study.set_metric_names(
                    [name for name in (objective.metric, objective.cost) if name]
                )
        for key, value in facts.items():
            if name not in known or known[name].user_attrs.get(key) != value:
                study.set_user_attr(key, value)
        return name

    def _write(self, levels: Levels, entry: Entry, params: dict[str, Any]) -> None:
        engine = self._engine
        assert engine is not None
        name = name_levels(dict(levels)) or "baseline"
        stored = self._stored.get(name)
        ended = entry.ended
        if stored is not None and stored.state.is_finished():
            if ended is not None and stored.seeds == _plain(ended.seeds):
                return
            self._outdated = self._outdated or stored.state != TrialState.FAIL
            stored = None
        if stored is None:
            attributes = (
                {"cell": name}
                if entry.source is None
                else {"cell": name, "earlier_study": entry.source}
            )
            template = optuna.trial.create_trial(
                state=TrialState.RUNNING,
                params=params,
                distributions=_holding(self._space, params),
                user_attrs=attributes,
            )
            stored = _Stored(
                engine.create_new_trial(self._study_id, template), TrialState.RUNNING, None
            )
            self._stored[name] = stored
        elif stored.state == TrialState.WAITING:
            engine.set_trial_state_values(stored.trial_id, TrialState.RUNNING)
            stored.state = TrialState.RUNNING
        for step, score in entry.course.items():
            engine.set_trial_intermediate_value(stored.trial_id, step, score)
        if ended is None:
            return
        for key, value in {
            "outcomes": ended.outcomes,
            "std": ended.std,
            "infeasible": ended.state == "infeasible" or None,
            "seeds": _plain(ended.seeds),
        }.items():
            if value is not None and value != "":
                engine.set_trial_user_attr(stored.trial_id, key, value)
        state, values = state_of(ended, len(directions_of(self._study)))
        engine.set_trial_state_values(stored.trial_id, state, values)
        stored.state, stored.seeds = state, _plain(ended.seeds)


@dataclass(slots=True)
class _Stored:
    trial_id: int
    state: TrialState
    seeds: Any


_OUT_OF_ORDER = (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.OptunaError, OSError, KeyError)
"""What a storage raises that is locked, full, gone, or was deleted under our hands."""


def _plain(seeds: Mapping[int, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    return {str(seed): dict(facts) for seed, facts in seeds.items()}


def _holding(
    space: Mapping[str, BaseDistribution], params: Mapping[str, Any]
) -> dict[str, BaseDistribution]:
    """The space, widened where a baseline lies outside the range that is searched."""
    widened = {name: space[name] for name in params}
    for name, distribution in tuple(widened.items()):
        if isinstance(distribution, (FloatDistribution, IntDistribution)):
            value = params[name]
            low, high = min(distribution.low, value), max(distribution.high, value)
            if (low, high) != (distribution.low, distribution.high):
                kind = type(distribution)
                widened[name] = kind(low, high, log=distribution.log and low > 0)
    return widened


def _url(storage: Path | str) -> tuple[str, Path | None]:
    """The URL of a storage, and its file if it is an SQLite one."""
    if isinstance(storage, str) and "://" in storage:
        file = storage.removeprefix("sqlite:///") if storage.startswith("sqlite:///") else ""
        return storage, Path(file) if file else None
    path = Path(storage).absolute()
    return f"sqlite:///{path}", path


def _prepare_sqlite(path: Path) -> None:
    """Let readers (the dashboard) and the one writer work at the same time: write-ahead log."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        connection = sqlite3.connect(path, timeout=_BUSY_S)
        try:
            connection.execute("PRAGMA journal_mode=WAL")
        finally:
            connection.close()
    except sqlite3.Error as error:
        raise OSError(f"{path}: {error}") from error
