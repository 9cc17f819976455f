"""The only user of mlflow: mirrors a study folder into MLflow, and never reads it back.

One experiment per study; in it a run for the study, below it one per cell, below that one per
trial. The folder is the truth, so a mirror can be deleted and built again, and an outage of MLflow
costs nothing but time: a thread of its own does all the talking, tries again after a failure, and
catches up. What stands in MLflow is the same whether it was mirrored live, after an outage, or
from the folder at the end.

What is mirrored of a long trace: every step up to 256, then every 2nd up to 512, every 4th up to
1,024 and so on (at least 128 points in the last half of any curve, 1,400 in all for 100,000
steps), and besides the first and last step of every event and the last step of all. Measurements
of single tensors and parameters are left out. The whole trace is an artifact of the trial.
(MLflow takes 0.2 ms of a core for every number it is given, and draws a few hundred of a curve.)
"""

from __future__ import annotations

import contextlib
import getpass
import gzip
import importlib
import json
import logging
import math
import os
import re
import shlex
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import yaml
from filelock import FileLock

from ablate import __version__, recipes
from ablate.analysis.results import Result, result_of
from ablate.errors import RecordError, TrackingError
from ablate.markers.replay import draw_record
from ablate.records import StudyRecord, TrialRecord, dumps, read_rows_from
from ablate.study import Study
from ablate.trial import Outcome, Trial

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read while mlflow is imported

import mlflow.entities as entities  # noqa: E402
import sqlalchemy.orm  # noqa: E402
from mlflow import MlflowClient  # noqa: E402
from mlflow.exceptions import MlflowException  # noqa: E402

Score = Callable[[Result], float | None]
Levels = tuple[tuple[str, str], ...]

_PAUSE_S = 2.0
"""Time between two rounds of mirroring; a round that took longer is followed by as long a pause,
so that mirroring never takes more than half a core."""

_LONGEST_PAUSE_S = 60.0
"""Most time between two tries while MLflow cannot be reached."""

_REQUEST_S = "10"
"""Timeout of one request to a server, and one retry: its own defaults are 120 s and 7."""

_WHOLE_STEPS = 256
"""Steps of a trace that are mirrored one by one; see the module's text for the rest."""

_ROWS_AT_ONCE = 200
"""Trace rows that one request carries, at most; MLflow takes 1,000 metrics a request."""

_NOT_MIRRORED = frozenset({"rms", "zero_grad_steps"})
"""Grouped measurements with one member per tensor or parameter: hundreds of curves."""

_AXES = frozenset({"step", "attempt", "time", "samples"})
"""Columns of a row that place it; they are not measurements."""

_PROGRESS = "mlflow.ablate.mirrored"
"""Tag that says how far a run is mirrored; MLflow's page hides tags whose name begins so."""

_STUDY_FILES = (
    "report.html",
    "report.md",
    "verdicts.json",
    "timeline.png",
    "best/config.yaml",
    "best/train.sh",
)
"""Files of a study folder that its run shows, when they exist."""

_MOST_EVENTS_TOLD = 20
_LARGEST_ARTIFACT = 64 * 2**20
_LARGEST_PLAIN_TRACE = 2**20
"""Bytes; a longer trace is stored compressed."""

_STATUS = {
    Outcome.COMPLETED: "FINISHED",
    Outcome.DIVERGED: "FINISHED",  # a result; the tag tells
    Outcome.PRUNED: "KILLED",
    Outcome.FAILED: "FAILED",
    Outcome.INFEASIBLE: "FAILED",
    Outcome.LOST: "FAILED",
}

_SECRET = re.compile(r"(?i)(passw|secret|token|credential|api_?key|access_?key|private_?key)")
_USERINFO = re.compile(r"(?<=://)[^/@\s]+@")
_SIGNATURE = re.compile(r"(?i)([?&](?:[a-z0-9-]*(?:signature|token|credential|key))=)[^&\s]+")
_ARTIFACT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def default_uri(runs: Path) -> str:
    """The tracking store that all studies in one folder share: an SQLite file, no server."""
    return f"sqlite:///{runs.absolute() / 'mlflow.db'}"


class Tracker:
    """Keeps MLflow up to date with one study folder, from a thread of its own.

    `score` gives the number a trial counts with (``design.score_of``). Without `uri` the mirror is
    an SQLite file and an artifact folder beside the study's. With `fresh` what stands there of
    this study is deleted first.

    Raises:
        TrackingError: a URI that can never work. A server that is down is no error.
    """

    def __init__(
        self,
        study: Study,
        record: StudyRecord,
        *,
        score: Score,
        uri: str | None = None,
        fresh: bool = False,
    ) -> None:
        runs = record.folder.absolute().parent
        embedded = uri is None
        uri = _checked(uri) if uri is not None else default_uri(runs)
        artifacts = (runs / "mlartifacts" / study.name) if embedded else None
        self.trouble: str | None = None
        if not uri.startswith("http"):
            _load_tables()
        self._uri = uri
        self._mirror = _Mirror(study, record, score, uri, artifacts, fresh, self._is_abandoned)
        self._changed = threading.Condition()
        self._trials: Sequence[Trial] = ()
        self._active: frozenset[str] = frozenset()
        self._touched: set[str] = set()
        self._news = False
        self._closing = False
        self._deadline = math.inf
        self._complete = False
        self._thread = threading.Thread(target=self._run, name="tracking", daemon=True)
        self._thread.start()

    def update(self, trials: Sequence[Trial], active: Sequence[str]) -> None:
        """Tell what the study wants and which trials are being attempted; returns at once.

        `trials` only ever grows at its end.
        """
        with self._changed:
            self._trials, self._active = trials, frozenset(active)
            self._touched.update(active)
            self._news = True
            self._changed.notify()

    def close(self, *, timeout_s: float = 30.0) -> bool:
        """Mirror what is left, with the study's own files, and end; False if time ran out.

        Trials without an outcome are shown as stopped.
        """
        with self._changed:
            self._closing, self._deadline = True, time.monotonic() + timeout_s
            self._changed.notify()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self.trouble = self.trouble or f"MLflow at {_masked_url(self._uri)} is slow"
        return self._complete

    # ------------------------------------------------------------------ the thread

    def _run(self) -> None:
        pause_s = 0.0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._news or self._closing)
                trials, active, closing = self._trials, self._active, self._closing
                touched, self._touched = self._touched, set()
                self._news = False
            begun = time.monotonic()
            try:
                self._mirror.update(trials, active, touched, closing=closing)
            except _Abandoned:
                return
            except Exception as error:  # whatever it is, the study goes on without MLflow
                with self._changed:
                    self._touched |= touched
                    self._news = True
                self._mirror.forget()
                self.trouble = f"MLflow at {_masked_url(self._uri)} is behind: {_reason(error)}"
                pause_s = min(max(2 * pause_s, 1.0), _LONGEST_PAUSE_S)
            else:
                self.trouble = self._mirror.complaint
                pause_s = 0.0
                if closing:
                    self._complete = self.trouble is None
                    return
            took_s = time.monotonic() - begun
            with self._changed:
                if self._closing:
                    wait_s = min(max(pause_s, 0.1), 1.0)  # the caller waits: hurry
                    self._changed.wait(wait_s)
                else:
                    self._changed.wait_for(
                        lambda: self._closing, max(pause_s, min(took_s, _LONGEST_PAUSE_S), _PAUSE_S)
                    )
            if self._is_abandoned():
                return

    def _is_abandoned(self) -> bool:
        return time.monotonic() > self._deadline


class _Abandoned(Exception):
    """The caller has stopped waiting: nothing more may be written."""


@dataclass(slots=True)
class _TrialRun:
    """What is known of a trial's run, and how far it is mirrored."""

    run_id: str
    status: str
    attempt: int = 0
    """Newest attempt that was looked at; `offsets` are of its logs."""
    step: int = 0
    """Last step of the trace that was looked at, and its attempt."""
    step_attempt: int = 0
    eval_step: int = 0
    eval_attempt: int = 0
    offsets: dict[str, int] = field(default_factory=dict)
    """Bytes read of the newest attempt's logs."""
    events_seen: int = -1
    """Bytes of events.jsonl of all attempts at the last look."""
    shown: set[int] = field(default_factory=set)
    """Thinned-out steps that were mirrored because of an event."""
    complete: bool = False
    tags: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Ended:
    """A trial that has an outcome."""

    result: Result
    time: float
    """When it was recorded (unix s)."""
    score: float | None


@dataclass(slots=True)
class _CellRun:
    run_id: str
    status: str
    seeds: int = 0
    """Seeds, counted from the first, whose mean is mirrored."""
    tags: dict[str, str] = field(default_factory=dict)


class _Mirror:
    """One study's runs in MLflow; every method may raise whatever MLflow raises."""

    def __init__(
        self,
        study: Study,
        record: StudyRecord,
        score: Score,
        uri: str,
        artifacts: Path | None,
        fresh: bool,
        abandoned: Callable[[], bool],
    ) -> None:
        self.complaint: str | None = None
        """A trial that MLflow refuses to take, or whose folder cannot be read."""
        self._study = study
        self._record = record
        self._score = score
        self._uri = uri
        self._artifacts = artifacts
        self._fresh = fresh
        self._abandoned = abandoned
        self._client: MlflowClient | None = None
        self._experiment = ""
        self._study_run = ""
        self._study_status = ""
        self._study_tags: dict[str, str] = {}
        self._cells: dict[Levels, _CellRun] = {}
        self._runs: dict[str, _TrialRun] = {}
        self._trials: dict[str, Trial] = {}
        self._by_cell: dict[Levels, list[Trial]] = {}
        self._ended: dict[str, _Ended] = {}
        self._best: tuple[Levels, float] | None = None
        """Best cell of those whose trials have all ended, and its mean score."""
        self._pending: set[str] = set()
        """Trials to look at in the next round."""
        self._num_known = 0

    def forget(self) -> None:
        """Believe nothing about MLflow: the next round connects and looks again."""
        self._client = None
        self._pending.update(self._trials)

    def update(
        self,
        trials: Sequence[Trial],
        active: frozenset[str],
        touched: Iterable[str],
        *,
        closing: bool,
    ) -> None:
        """One round: bring every trial that may have news up to date."""
        for trial in trials[self._num_known :]:
            if trial.id not in self._trials:
                self._trials[trial.id] = trial
                self._by_cell.setdefault(trial.cell.levels, []).append(trial)
                self._pending.add(trial.id)
        self._num_known = len(trials)
        self._pending.update(trial_id for trial_id in touched if trial_id in self._trials)
        if self._client is None:
            self._client = self._open()
        client = self._client
        self.complaint = None
        num_ended = len(self._ended)
        stale: set[Levels] = set()
        for trial_id in [i for i in self._trials if i in self._pending]:
            if self._abandoned():
                raise _Abandoned
            trial = self._trials[trial_id]
            try:
                done = self._sync_trial(client, trial, running=trial_id in active, closing=closing)
            except (RecordError, UnicodeError) as error:
                done, self.complaint = True, f"trial {trial_id} is not mirrored: {_reason(error)}"
            except MlflowException as error:
                if error.error_code != "INVALID_PARAMETER_VALUE" or self._is_deleted(
                    client, trial_id
                ):
                    raise
                done, self.complaint = True, f"MLflow refuses trial {trial_id}: {_reason(error)}"
            stale.add(trial.cell.levels)
            if done or trial_id not in active:
                self._pending.discard(trial_id)
        for levels in stale:
            self._sync_cell(client, levels, closing=closing)
        if len(self._ended) > num_ended:
            self._best = self._best_cell()
        self._sync_study(client, closing=closing)

    def _is_deleted(self, client: MlflowClient, trial_id: str) -> bool:
        """Whether someone has deleted the trial's run, so that MLflow takes nothing for it."""
        run = self._runs.get(trial_id)
        return run is not None and client.get_run(run.run_id).info.lifecycle_stage == "deleted"

    # ------------------------------------------------------------------ connecting

    def _open(self) -> MlflowClient:
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", _REQUEST_S)
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        for noisy in ("mlflow", "alembic"):
            logging.getLogger(noisy).setLevel(logging.ERROR)
        with _one_at_a_time(self._uri):
            client = MlflowClient(tracking_uri=self._uri, registry_uri=self._uri)
            self._experiment = self._open_experiment(client)
        self._cells, self._runs = {}, {}
        self._study_run = self._study_status = ""
        cells = {_cell_name(levels): levels for levels in self._by_cell}
        for run in _all_runs(client, self._experiment):
            tags, run_id = run.data.tags, run.info.run_id
            if self._fresh:
                client.delete_run(run_id)
            elif tags.get("kind") == "study" and not self._study_run:
                self._study_run, self._study_tags = run_id, dict(tags)
            elif tags.get("kind") == "cell" and (levels := cells.get(tags.get("cell", ""))):
                if levels in self._cells:
                    client.delete_run(run_id)  # made twice: the answer to the first was lost
                    continue
                self._cells[levels] = _CellRun(
                    run_id, run.info.status, int(tags.get("seeds_ended", 0)), dict(tags)
                )
            elif tags.get("kind") == "trial" and tags.get("trial_id") in self._trials:
                if tags["trial_id"] in self._runs:
                    client.delete_run(run_id)
                    continue
                self._runs[tags["trial_id"]] = _recalled(run)
        self._fresh = False
        return client

    def _open_experiment(self, client: MlflowClient) -> str:
        name = self._study.name
        location = None if self._artifacts is None else self._artifacts.as_uri()
        found = client.get_experiment_by_name(name)
        if found is not None and found.lifecycle_stage == "deleted":
            client.restore_experiment(found.experiment_id)
        if found is not None and location and found.artifact_location != location:
            # The folder has moved, and an experiment's artifacts cannot move with it.
            client.rename_experiment(found.experiment_id, f"{name} before {time.time():.0f}")
            client.delete_experiment(found.experiment_id)
            found = None
        if found is None:
            return str(client.create_experiment(name, artifact_location=location))
        return str(found.experiment_id)

    # ------------------------------------------------------------------ the study's run

    def _ensure_study(self, client: MlflowClient, *, start: int) -> str:
        if self._study_run:
            return self._study_run
        tags = {
            "kind": "study",
            "mlflow.note.content": _note(self._study),
            "mlflow.source.name": f"ablate launch {self._study.path}",
            "mlflow.source.type": "LOCAL",
            "mlflow.user": _user(),
            "recipe": self._study.recipe,
            "design": self._study.design.name,
            "objective": self._study.objective.metric,
            "folder": f"{socket.gethostname()}:{self._record.folder.absolute()}",
            **_versions(),
        }
        run = client.create_run(
            self._experiment,
            start_time=start,
            tags=_clean_tags(tags),
            run_name=self._study.name,
        )
        self._study_run, self._study_tags = run.info.run_id, dict(run.data.tags)
        client.set_experiment_tag(self._experiment, "mlflow.note.content", _note(self._study))
        client.set_experiment_tag(
            self._experiment, "mlflow.experimentKind", "custom_model_development"
        )
        for key, view in _views(self._study).items():
            client.set_experiment_tag(self._experiment, f"mlflow.sharedViewState.{key}", view)
        baseline = self._study.cell({})
        _log_params(client, self._study_run, self._shared_config(baseline.levels))
        client.log_text(self._study_run, _masked_url(self._study.text), "study.yaml")
        return self._study_run

    def _sync_study(self, client: MlflowClient, *, closing: bool) -> None:
        if not self._trials:
            return
        run_id = self._ensure_study(client, start=_ms(time.time()))
        ended = len(self._ended)
        tags = {"progress": f"{ended} of {len(self._trials)} trials"}
        best = self._best
        if best is not None:
            levels, score = best
            tags |= {"best_cell": self._changed(levels), "best_score": f"{score:.6g}"}
        self._set_tags(client, run_id, self._study_tags, tags)
        if not closing:
            if self._study_status != "RUNNING":
                client.update_run(run_id, status="RUNNING")
                self._study_status = "RUNNING"
            return
        if best is not None:
            when = max(item.time for item in self._ended.values())
            client.log_metric(run_id, "score", best[1], timestamp=_ms(when), step=ended)
        for name in _STUDY_FILES:
            path = artifact_path(self._record.folder, name)
            if path is not None:
                client.log_artifact(run_id, str(path), str(Path(name).parent).strip("."))
        client.set_terminated(run_id, "FINISHED" if ended == len(self._trials) else "KILLED")

    def _best_cell(self) -> tuple[Levels, float] | None:
        means = {
            levels: fmean(scores)
            for levels, trials in self._by_cell.items()
            if all(trial.id in self._ended for trial in trials)
            and (scores := [s for t in trials if (s := self._ended[t.id].score) is not None])
        }
        if not means:
            return None
        sign = 1.0 if self._study.objective.direction == "maximize" else -1.0
        best = max(means, key=lambda levels: sign * means[levels])
        return best, means[best]

    # ------------------------------------------------------------------ a cell's run

    def _ensure_cell(self, client: MlflowClient, levels: Levels, *, start: int) -> _CellRun:
        cell = self._cells.get(levels)
        if cell is not None:
            return cell
        parent = self._ensure_study(client, start=start)
        tags = {
            "kind": "cell",
            "mlflow.parentRunId": parent,
            "mlflow.source.name": "ablate",
            "mlflow.user": _user(),
            "cell": _cell_name(levels),
            **self._level_tags(levels),
        }
        run = client.create_run(
            self._experiment,
            start_time=start,
            tags=_clean_tags(tags),
            run_name=self._changed(levels),
        )
        cell = self._cells[levels] = _CellRun(run.info.run_id, "RUNNING", 0, dict(run.data.tags))
        _log_params(client, cell.run_id, self._shared_config(levels))
        return cell

    def _sync_cell(self, client: MlflowClient, levels: Levels, *, closing: bool) -> None:
        """Mean and deviation over seeds, at step k over the first k seeds of the study.

        In the order of seeds, whatever order they ended in, so that it can be told again.
        """
        trials = sorted(self._by_cell[levels], key=lambda t: self._study.seeds.index(t.seed))
        if not any(trial.id in self._runs for trial in trials):
            return
        cell = self._ensure_cell(client, levels, start=_ms(time.time()))
        scores: list[float] = []
        metrics: list[entities.Metric] = []
        ended = 0
        for trial in trials:
            if trial.id not in self._ended:
                break
            ended += 1
            when = _ms(max(self._ended[t.id].time for t in trials[:ended]))
            score = self._ended[trial.id].score
            if score is not None:
                scores.append(score)
            if not scores or ended <= cell.seeds:
                continue
            metrics.append(entities.Metric("score", fmean(scores), when, ended))
            if len(scores) > 1:
                metrics.append(entities.Metric("score_std", stdev(scores), when, ended))
        if metrics:
            client.log_batch(cell.run_id, metrics=metrics)
        known = [self._ended[t.id] for t in trials if t.id in self._ended]
        outcomes = [item.result.outcome for item in known]
        counts = {name: outcomes.count(name) for name in dict.fromkeys(sorted(outcomes))}
        flags = {flag for item in known for flag in item.result.flags}
        tags = {
            "seeds_ended": str(ended),
            "outcome": ", ".join(f"{name} {count}" for name, count in counts.items()) or "running",
            "flags": ", ".join(sorted(flags)),
        }
        self._set_tags(client, cell.run_id, cell.tags, tags)
        cell.seeds = ended
        whole = ended == len(trials)
        self._set_status(
            client,
            cell,
            "FINISHED" if whole else ("KILLED" if closing else "RUNNING"),
            when=max(item.time for item in known) if whole else None,
        )

    # ------------------------------------------------------------------ a trial's run

    def _sync_trial(
        self, client: MlflowClient, trial: Trial, *, running: bool, closing: bool
    ) -> bool:
        """Bring a trial's run up to date; True when there is nothing more to come of it."""
        folder = self._record.record(trial.id)
        outcome = folder.outcome()  # before the logs: an outcome says that they are complete
        if outcome is not None:
            if trial.id not in self._ended:
                result = result_of(trial, outcome)
                try:
                    value = _finite(self._score(result))
                except (ValueError, OSError) as error:  # chance level is counted from the data
                    value = None
                    self.complaint = f"trial {trial.id} has no score: {_reason(error)}"
                self._ended[trial.id] = _Ended(result, float(outcome["time"]), value)
        run = self._runs.get(trial.id)
        if run is not None and run.complete:
            return True
        attempts = folder.attempts()
        if not attempts and outcome is None:
            return False
        if run is None:
            run = self._create_trial_run(client, trial, folder)
        run = self._sync_rows(client, trial, folder, attempts, run)
        if outcome is None:
            stopped = closing or not running
            tags = {
                "outcome": "stopped" if stopped else "running",
                "attempt": str(attempts[-1] if attempts else 0),
            }
            self._set_tags(client, run.run_id, run.tags, tags)
            self._set_status(client, run, "KILLED" if stopped else "RUNNING")
            return False
        self._finish_trial(client, trial, folder, run, outcome)
        return True

    def _create_trial_run(
        self, client: MlflowClient, trial: Trial, folder: TrialRecord
    ) -> _TrialRun:
        start = _ms(_begun(folder))
        parent = self._ensure_cell(client, trial.cell.levels, start=start).run_id
        content = folder.trial()
        fingerprint = _flat(content.get("fingerprint") or {})
        commit = fingerprint.pop("git_commit", None)
        tags = {
            "kind": "trial",
            "mlflow.parentRunId": parent,
            "mlflow.source.name": "ablate",
            "mlflow.user": _user(),
            "trial_id": trial.id,
            "seed": str(trial.seed),
            "outcome": "running",
            **self._level_tags(trial.cell.levels),
            **({"mlflow.source.git.commit": commit} if commit else {}),
            **{f"fingerprint.{key}": value for key, value in fingerprint.items()},
        }
        run = client.create_run(
            self._experiment,
            start_time=start,
            tags=_clean_tags(tags),
            run_name=f"{self._changed(trial.cell.levels)} · seed {trial.seed}",
        )
        known = self._runs[trial.id] = _TrialRun(run.info.run_id, "RUNNING")
        known.tags = dict(run.data.tags)
        _log_params(client, known.run_id, trial.config)
        return known

    def _sync_rows(
        self,
        client: MlflowClient,
        trial: Trial,
        folder: TrialRecord,
        attempts: Sequence[int],
        run: _TrialRun,
    ) -> _TrialRun:
        """Mirror rows that are new; the run is replaced when an attempt repeated mirrored steps.

        MLflow cannot delete a point, and of two attempts' rows at one step the later one counts.
        """
        trace, evals, offsets = _new_rows(folder, attempts, run)
        if _repeats(trace, run, step=run.step, attempt=run.step_attempt) or _repeats(
            evals, run, step=run.eval_step, attempt=run.eval_attempt
        ):
            client.delete_run(run.run_id)
            del self._runs[trial.id]
            run = self._create_trial_run(client, trial, folder)
            trace, evals, offsets = _new_rows(folder, attempts, run)
        trace = [row for row in trace if row["step"] > run.step]
        evals = [row for row in evals if row["step"] > run.eval_step]

        # Before the events are read, so that no step that they ask for is passed over.
        if trace:
            step, step_attempt = trace[-1]["step"], trace[-1]["attempt"]
        else:
            step, step_attempt = run.step, run.step_attempt
        if evals:
            eval_step, eval_attempt = evals[-1]["step"], evals[-1]["attempt"]
        else:
            eval_step, eval_attempt = run.eval_step, run.eval_attempt
        forced: set[int] = set()
        size = _bytes_of_events(folder, attempts)
        if size != run.events_seen:
            for event in folder.events():
                for name in ("first_step", "last_step"):
                    forced.add(int(event.get(name) or 0))
        kept = [row for row in trace if _keeps(row["step"]) or row["step"] in forced]
        late = {s for s in forced if 0 < s <= run.step and not _keeps(s)} - run.shown
        if late:  # rare: an event is told some steps after its first
            kept = [row for row in folder.trace() if row["step"] in late] + kept
        mirrored = f"{step_attempt}:{step} {eval_attempt}:{eval_step}"
        for rows in _batches(kept, _ROWS_AT_ONCE):
            if self._abandoned():
                raise _Abandoned
            self._log_metrics(client, run.run_id, [m for row in rows for m in _metrics(row)])
        self._log_metrics(
            client, run.run_id, [m for row in evals for m in _metrics(row, evaluation=True)]
        )
        if trace or evals:
            self._set_tags(client, run.run_id, run.tags, {_PROGRESS: mirrored})
        run.attempt, run.offsets = attempts[-1] if attempts else 0, offsets
        run.step, run.step_attempt = step, step_attempt
        run.eval_step, run.eval_attempt = eval_step, eval_attempt
        run.shown |= {s for s in forced if s <= step}
        run.events_seen = size
        return run

    def _finish_trial(
        self,
        client: MlflowClient,
        trial: Trial,
        folder: TrialRecord,
        run: _TrialRun,
        outcome: Mapping[str, Any],
    ) -> None:
        when = _ms(float(outcome["time"]))
        trace = folder.trace()
        if trace and not _keeps(trace[-1]["step"]) and trace[-1]["step"] not in run.shown:
            self._log_metrics(client, run.run_id, _metrics(trace[-1]))
        step = int(outcome.get("step") or run.step)
        objective = self._study.objective.metric
        best = outcome.get("best") or {}
        events = folder.events()
        final = {
            "score": self._ended[trial.id].score,
            f"{objective}_best": best.get(objective),
            "num_events": len(events),
            "wall_s": outcome.get("wall_s"),
            "num_parameters": outcome.get("num_parameters"),
            "peak_memory_gib": outcome.get("peak_memory_gib"),
        }
        self._log_metrics(
            client,
            run.run_id,
            [
                entities.Metric(name, float(value), when, step)
                for name, value in final.items()
                if isinstance(value, (int, float)) and math.isfinite(value)
            ],
        )
        with tempfile.TemporaryDirectory(prefix="ablate-") as scratch:
            self._write_artifacts(Path(scratch), trial, folder, outcome, trace, events)
            client.log_artifacts(run.run_id, scratch)
        result = self._ended[trial.id].result
        tags = {
            "outcome": result.outcome,
            "verdict": result.verdict,
            "flags": ", ".join(result.flags),
            "markers": ", ".join(sorted({str(event["marker"]) for event in events})),
            "attempt": str(outcome.get("attempt", "")),
            "reason": str(outcome.get("reason") or ""),
            "mlflow.note.content": _trial_note(result, outcome, events),
        }
        self._set_tags(client, run.run_id, run.tags, tags)
        self._set_status(client, run, _STATUS[Outcome(result.outcome)], when=float(outcome["time"]))
        # Last of all: with this tag the run is never looked at again.
        self._set_tags(client, run.run_id, run.tags, {_PROGRESS: "complete"})
        run.complete = True

    def _write_artifacts(
        self,
        scratch: Path,
        trial: Trial,
        folder: TrialRecord,
        outcome: Mapping[str, Any],
        trace: Sequence[Mapping[str, Any]],
        events: Sequence[Mapping[str, Any]],
    ) -> None:
        recipe = recipes.load(trial.recipe)
        config = _masked("", trial.config)
        (scratch / "trial.json").write_text(dumps(_masked("", folder.trial()), indent=1) + "\n")
        (scratch / "outcome.json").write_text(dumps(_masked("", outcome), indent=1) + "\n")
        (scratch / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        with contextlib.suppress(ValueError):  # some settings have no equal in the peer
            line = recipe.command(
                recipe.Config(**config), workers=int(trial.gang.get("workers", 1))
            )
            (scratch / "command.txt").write_text(shlex.join(line) + "\n")
        _write_rows(scratch / "events.jsonl", events)
        _write_rows(scratch / "evals.jsonl", folder.evaluations())
        _write_rows(scratch / "trace.jsonl", trace)
        dense = scratch / "trace.jsonl"
        if dense.stat().st_size > _LARGEST_PLAIN_TRACE:
            with open(dense, "rb") as plain, gzip.open(scratch / "trace.jsonl.gz", "wb", 5) as file:
                shutil.copyfileobj(plain, file)
            dense.unlink()
        if trace:
            name = self._study.change_name(dict(trial.cell.levels))
            draw_record(scratch / "timeline", folder, title=f"{name} · seed {trial.seed}")
        attempts = folder.attempts()
        if outcome["outcome"] != Outcome.COMPLETED and attempts:
            tail = folder.log_tail(attempts[-1], lines=200)
            if tail:
                (scratch / "log.txt").write_text(_masked_url(tail) + "\n")

    # ------------------------------------------------------------------ small things

    def _changed(self, levels: Levels) -> str:
        return self._study.change_name(dict(levels))

    def _level_tags(self, levels: Levels) -> dict[str, str]:
        return {
            "changed": self._changed(levels),
            **{f"factor.{factor}": level for factor, level in levels},
        }

    def _shared_config(self, levels: Levels) -> dict[str, Any]:
        """The configuration that all seeds of a cell share."""
        cell = self._study.cell(dict(levels))
        config = self._study.config(cell, seed=self._study.seeds[0])
        return {key: value for key, value in config.items() if key != "seed"}

    def _set_tags(
        self, client: MlflowClient, run_id: str, known: dict[str, str], tags: Mapping[str, str]
    ) -> None:
        """Set what differs from what is known to stand there; an empty value sets nothing."""
        changed = {k: v for k, v in _clean_tags(tags).items() if v and known.get(k) != v}
        if changed:
            client.log_batch(run_id, tags=[entities.RunTag(k, v) for k, v in changed.items()])
            known.update(changed)

    def _set_status(
        self,
        client: MlflowClient,
        run: _TrialRun | _CellRun,
        status: str,
        *,
        when: float | None = None,
    ) -> None:
        if run.status == status:
            return
        if status == "RUNNING":
            client.update_run(run.run_id, status=status)
        else:
            client.set_terminated(run.run_id, status, None if when is None else _ms(when))
        run.status = status

    def _log_metrics(
        self, client: MlflowClient, run_id: str, metrics: Sequence[entities.Metric]
    ) -> None:
        for batch in _batches(metrics, 1000):
            client.log_batch(run_id, metrics=batch)


# --------------------------------------------------------------------------- rows


def _keeps(step: int) -> bool:
    """Whether the thinning rule keeps this step of a trace."""
    doublings = max(0, (step - 1).bit_length() - (_WHOLE_STEPS - 1).bit_length())
    return step % (1 << doublings) == 0


def _new_rows(
    folder: TrialRecord, attempts: Sequence[int], run: _TrialRun
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, int]]:
    """Rows of the trace and of the evaluations since the last look, one per step, and offsets.

    Where a later attempt went on from a checkpoint, what earlier ones did beyond it is void.
    """
    logs: list[list[dict[str, Any]]] = []
    offsets: dict[str, int] = {}
    for name in ("trace.jsonl", "evals.jsonl"):
        by_step: dict[int, dict[str, Any]] = {}
        for number in attempts:
            if run.offsets and number < run.attempt:
                continue
            start = run.offsets.get(name, 0) if number == run.attempt else 0
            rows, offsets[name] = read_rows_from(folder.attempt_folder(number) / name, start)
            if rows:
                by_step = {step: row for step, row in by_step.items() if step < rows[0]["step"]}
            for row in rows:
                by_step[int(row["step"])] = {**row, "attempt": number}
        logs.append([by_step[step] for step in sorted(by_step)])
    return logs[0], logs[1], offsets


def _repeats(rows: Sequence[Mapping[str, Any]], run: _TrialRun, *, step: int, attempt: int) -> bool:
    """Whether an attempt went again through steps that are mirrored already.

    `step` and `attempt` are those of the last row that is mirrored. Without offsets (after a
    restart) the rows hold what is mirrored, too.
    """
    return any(row["step"] <= step and (run.offsets or row["attempt"] > attempt) for row in rows)


def _begun(folder: TrialRecord) -> float:
    """When the trial's first attempt took its first step (unix s); now, if none has yet."""
    for number in folder.attempts()[:1]:
        rows, _ = read_rows_from(folder.attempt_folder(number) / "trace.jsonl", 0)
        if rows:
            return float(rows[0].get("time") or time.time())
    return time.time()


def _bytes_of_events(folder: TrialRecord, attempts: Sequence[int]) -> int:
    total = 0
    for number in attempts:
        with contextlib.suppress(FileNotFoundError):
            total += (folder.attempt_folder(number) / "events.jsonl").stat().st_size
    return total


def _metrics(row: Mapping[str, Any], *, evaluation: bool = False) -> list[entities.Metric]:
    """A row as MLflow metrics, at the row's own time, so that a second telling is the same."""
    left_out = _AXES | {"epoch"} if evaluation else _AXES
    found = []
    for name, value in row.items():
        if name in left_out or name.split("/", 1)[0] in _NOT_MIRRORED:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        # An infinite value would be stored as 1.8e308 and flatten its whole chart.
        number = float(value) if math.isfinite(value) else math.nan
        key = re.sub(r"[^\w.\- :/]", "_", name)[:250]
        found.append(entities.Metric(key, number, _ms(row.get("time") or 0.0), int(row["step"])))
    return found


def _batches(items: Sequence[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield list(items[start : start + size])


def _write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(dumps(row) + "\n")


def _ms(seconds: float) -> int:
    return int(seconds * 1000)


# --------------------------------------------------------------------------- runs


def _all_runs(client: MlflowClient, experiment: str) -> list[entities.Run]:
    """Every run of an experiment that is not deleted, oldest first."""
    found: list[entities.Run] = []
    token: str | None = None
    while True:
        page = client.search_runs(
            [experiment], max_results=1000, order_by=["attributes.start_time ASC"], page_token=token
        )
        found.extend(page)
        token = page.token
        if not token:
            return found


def _recalled(run: entities.Run) -> _TrialRun:
    tags = dict(run.data.tags)
    known = _TrialRun(run.info.run_id, run.info.status, tags=tags)
    mirrored = tags.get(_PROGRESS, "")
    if mirrored == "complete":
        known.complete = True
    elif mirrored:
        numbers = [int(number) for number in re.findall(r"\d+", mirrored)]
        known.step_attempt, known.step, known.eval_attempt, known.eval_step = numbers
    return known


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _cell_name(levels: Levels) -> str:
    return ", ".join(f"{factor}={level}" for factor, level in levels) or "baseline"


def _log_params(client: MlflowClient, run_id: str, config: Mapping[str, Any]) -> None:
    params = [
        entities.Param(re.sub(r"[^\w.\- :/]", "_", key)[:250], value[:6000])
        for key, value in _flat(config).items()
    ]
    for batch in _batches(params, 100):
        client.log_batch(run_id, params=batch)


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested mappings as dotted names, values as text, secrets masked."""
    flat: dict[str, str] = {}
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{name}.")
        else:
            shown = _masked(name, value)
            flat[name] = shown if isinstance(shown, str) else dumps(shown)
    return flat


def _masked(key: str, value: Any) -> Any:
    """`value` without what must not be shown: secrets by their name, passwords inside URLs."""
    if isinstance(value, Mapping):
        return {name: _masked(str(name), item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_masked(key, item) for item in value]
    if _SECRET.search(key) and value not in (None, "", False):
        return "***"
    return _masked_url(value) if isinstance(value, str) else value


def _masked_url(text: str) -> str:
    return _SIGNATURE.sub(r"\1***", _USERINFO.sub("***@", text))


def _clean_tags(tags: Mapping[str, str]) -> dict[str, str]:
    return {
        re.sub(r"[^\w.\- :/]", "_", key)[:250]: str(_masked(key, value))[:5000]
        for key, value in tags.items()
    }


def artifact_path(folder: Path, name: str) -> Path | None:
    """The file `name` in `folder` if it may be shown: plain names only, and no way out by links.

    None for a file that is missing, too large, or anything else than a file inside the folder.
    """
    if not all(_ARTIFACT_NAME.fullmatch(part) for part in name.split("/")):
        return None
    root = folder.resolve()
    path = (root / name).resolve()
    if not path.is_relative_to(root) or not path.is_file():
        return None
    return path if path.stat().st_size <= _LARGEST_ARTIFACT else None


def _versions() -> dict[str, str]:
    found = {"version.ablate": __version__}
    for name in ("torch", "open_clip_torch", "ray", "optuna", "mlflow"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[f"version.{name}"] = metadata.version(name)
    return found


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return str(os.getuid())


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return _masked_url(lines[0][:300]) if lines else type(error).__name__


def _trial_note(
    result: Result, outcome: Mapping[str, Any], events: Sequence[Mapping[str, Any]]
) -> str:
    """What came of a trial, as Markdown for its page."""
    verdict = f", verdict **{result.verdict}**" if result.verdict else ""
    lines = [f"**{result.outcome}**{verdict}"]
    if outcome.get("reason"):
        lines += ["```", str(outcome["reason"])[-2000:], "```"]
    for event in events[:_MOST_EVENTS_TOLD]:
        first, last = event.get("first_step"), event.get("last_step")
        steps = f"step {first}" if first == last else f"steps {first} to {last}"
        lines.append(f"- `{event.get('marker')}` at {steps}: {event.get('message', '')}")
    if len(events) > _MOST_EVENTS_TOLD:
        lines.append(f"- and {len(events) - _MOST_EVENTS_TOLD} more in events.jsonl")
    return "\n".join(lines)


def _views(study: Study) -> dict[str, str]:
    """Saved views of the runs table, in the form in which MLflow's page saves its own.

    They stand in its menu "Views"; a page that does not know the form leaves them out.
    """
    objective = study.objective.metric
    factors = [f"tags.`factor.{factor.name}`" for factor in study.factors]
    upward = study.objective.direction == "minimize"

    def view(name: str, search: str, order: str, columns: Sequence[str]) -> str:
        state = {
            "searchFilter": search,
            "orderByKey": order,
            "orderByAsc": upward,
            "startTime": "ALL",
            "lifecycleFilter": "Active",
            "modelVersionFilter": "All Runs",
            "datasetsFilter": [],
            "selectedColumns": columns,
            "columnWidths": {"attributes.`Run Name`": 340},
        }
        return dumps({"name": name, "createdAt": 0, "updatedAt": 0, "state": dumps(state)})

    ended = ["metrics.`score`", "tags.`outcome`"]
    spread = ["metrics.`score_std`", "tags.`seeds_ended`"]
    return {
        "ablate-tree": view(
            "Tree of settings and seeds",
            "",
            "attributes.start_time",
            ["attributes.`Duration`", *ended, *spread, "tags.`verdict`", "tags.`markers`"],
        ),
        "ablate-cells": view(
            "Settings, best first",
            "tags.kind = 'cell'",
            "metrics.`score`",
            [*ended, *spread, "tags.`flags`", *factors],
        ),
        "ablate-trials": view(
            "Trials, best first",
            "tags.kind = 'trial'",
            "metrics.`score`",
            [
                *ended,
                "tags.`verdict`",
                "tags.`markers`",
                "tags.`flags`",
                f"metrics.`{objective}_best`",
                "metrics.`loss`",
                "metrics.`wall_s`",
                "tags.`seed`",
                *factors,
            ],
        ),
        "ablate-unstable": view(
            "Trials with instabilities",
            "tags.kind = 'trial' and tags.markers != ''",
            "metrics.`num_events`",
            [
                *ended,
                "tags.`verdict`",
                "tags.`markers`",
                "tags.`flags`",
                "metrics.`num_events`",
                "tags.`reason`",
            ],
        ),
    }


def _note(study: Study) -> str:
    """What a reader of the MLflow page should know, as Markdown."""
    objective = study.objective
    factors = "\n".join(
        f"- **{factor.name}**: "
        + (
            " · ".join(
                f"`{item.name}`" + (" (baseline)" if item.name == factor.baseline else "")
                for item in factor.levels
            )
            if factor.range is None
            else f"{factor.range.low} to {factor.range.high}, baseline `{factor.baseline}`"
        )
        for factor in study.factors
    )
    example = study.factors[0]
    level = next((i.name for i in example.levels if i.name != example.baseline), example.baseline)
    return f"""Ablation study **{study.name}**: which setting matters for `{objective.metric}`?

{factors}

Design `{study.design.name}`, {len(study.seeds)} seeds, margin {objective.margin:g}.

One run for the study, below it one per cell (named by what differs from the baseline), below that
one per seed. `score` is what a trial counts with: `{objective.metric}` at its last step, chance
level if it diverged; a cell's `score` is the mean over its seeds, `score_std` their deviation.

Try in the search box:
- `tags.kind = 'cell'` — one row per setting; sort by `score`
- `tags.kind = 'trial' and tags.outcome = 'diverged'`
- ``tags.`factor.{example.name}` = '{level}'``
- `tags.verdict != 'STABLE'` — runs with instabilities; `tags.markers` says which

The study folder is the truth, this is its mirror: report.html among the artifacts has the answer.
"""


# --------------------------------------------------------------------------- stores and servers


def _checked(uri: str) -> str:
    """`uri`, if it can be a tracking store.

    Raises:
        TrackingError: it cannot, whatever the state of the network.
    """
    scheme = uri.split(":", 1)[0].lower() if "://" in uri else ""
    if scheme in ("http", "https"):
        return uri
    try:
        if scheme.split("+")[0] not in ("sqlite", "postgresql", "mysql", "mssql"):
            raise ValueError(f"unknown scheme {scheme!r}")
        sqlalchemy.engine.make_url(uri).get_dialect().import_dbapi()
    except (ValueError, ImportError, sqlalchemy.exc.SQLAlchemyError) as error:
        raise TrackingError(
            f"{_masked_url(uri)!r} cannot be an MLflow tracking store: {error}. Give "
            "http(s)://host:port of a server, sqlite:////abs/mlflow.db, or "
            "postgresql://user@host/name with its driver installed; leave it out for a local file."
        ) from error
    return uri


def _load_tables() -> None:
    """Load the database code of mlflow now, in the calling thread.

    It warns about itself while it loads, and a filter for warnings holds for all threads.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("mlflow.store.tracking.sqlalchemy_store")
        sqlalchemy.orm.configure_mappers()


@contextlib.contextmanager
def _one_at_a_time(uri: str) -> Iterator[None]:
    """Let one process at a time create or migrate an SQLite store, with readers unhindered."""
    if not uri.startswith("sqlite:///"):
        yield
        return
    path = Path(uri.removeprefix("sqlite:///"))
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(path.name + ".lock"), timeout=30):
        connection = sqlite3.connect(path, timeout=5)
        try:
            connection.execute("PRAGMA journal_mode=WAL")
        finally:
            connection.close()
        yield


@dataclass(slots=True)
class Server:
    """An MLflow server that was started here; also a context manager."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path

    def wait_ready(self, timeout_s: float = 60.0) -> None:
        """Wait until it answers.

        Raises:
            TrackingError: it ended, or did not answer in time; with the tail of its log.
        """
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=2):
                    return
            except OSError:
                time.sleep(0.1)
        tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])
        state = (
            f"ended with code {self.process.returncode}"
            if self.process.poll() is not None
            else f"did not answer within {timeout_s:g} s"
        )
        raise TrackingError(f"the MLflow server at {self.url} {state}. Its log {self.log}:\n{tail}")

    def pages(self) -> dict[str, str]:
        """Study -> link to its settings, best first, for every study in the store."""
        request = urllib.request.Request(
            f"{self.url}/api/2.0/mlflow/experiments/search",
            data=json.dumps(
                {"max_results": 1000, "filter": "attribute.name != 'Default'"}
            ).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            experiments = json.load(answer).get("experiments", [])
        query = "workflowType=machine_learning&viewStateShareKey=ablate-cells"
        return {
            item["name"]: f"{self.url}/#/experiments/{item['experiment_id']}/runs?{query}"
            for item in experiments
        }

    def close(self) -> None:
        """End the server with all its workers."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=5)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def serve(uri: str, *, port: int = 5000, host: str = "127.0.0.1", log: Path) -> Server:
    """Start MLflow's web page over a tracking store, for this machine alone.

    It listens on a loopback address, answers only requests that name it, and takes none from other
    pages. What it prints goes to `log`.

    Raises:
        TrackingError: the port is taken; or `host` is not a loopback address: MLflow has no
            authentication of its own switched on, so anyone who reaches it could change everything.
    """
    if host not in ("127.0.0.1", "localhost", "::1"):
        raise TrackingError(
            f"the page is served on loopback only, not on {host!r}; from another machine use "
            f"`ssh -L {port}:127.0.0.1:{port} THIS_HOST`"
        )
    with socket.socket(socket.AF_INET6 if host == "::1" else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise TrackingError(
                f"port {port} on {host} cannot be used ({error.strerror}); another page may be "
                f"open there. Give another one: --port {port + 1}"
            ) from error
    names = ("127.0.0.1", "localhost")
    command = [
        *(sys.executable, "-m", "mlflow", "server"),
        *("--backend-store-uri", uri),
        *("--host", host, "--port", str(port), "--workers", "1"),
        *("--allowed-hosts", ",".join(f"{name}:{port}" for name in names)),
        *("--cors-allowed-origins", ",".join(f"http://{name}:{port}" for name in names)),
        "--no-serve-artifacts",  # files are read from where the runs say they are
    ]
    if uri.startswith("sqlite:///"):
        beside = Path(uri.removeprefix("sqlite:///")).absolute().with_name("mlartifacts")
        command += ["--default-artifact-root", beside.as_uri()]
    environment = {
        **os.environ,
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    return Server(process, f"http://{'[::1]' if host == '::1' else host}:{port}", log)
