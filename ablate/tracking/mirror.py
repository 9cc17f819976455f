"""One study's runs in MLflow, brought up to date with its folder."""

from __future__ import annotations

import contextlib
import getpass
import gzip
import math
import os
import re
import secrets
import shlex
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from itertools import takewhile
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import mlflow.entities as entities
import yaml
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from ablate import __version__, recipes
from ablate.analysis.results import Result, Score, result_of
from ablate.errors import RecordError
from ablate.markers.replay import draw_record
from ablate.masking import artifact_path, flat, masked, masked_url, reason_of
from ablate.records import StudyRecord, TrialRecord, dumps, read_json, write_json
from ablate.study import Study
from ablate.tracking.pages import study_note, trial_note, views_of
from ablate.tracking.rows import (
    TrialRun,
    begun_at,
    bytes_of_events,
    keeps,
    metrics_of,
    milliseconds,
    new_rows,
    plain_key,
    repeats,
    write_rows,
)
from ablate.tracking.store import artifacts_of, default_uri, one_at_a_time
from ablate.trial import Levels, Outcome, Trial

_REQUEST_S = "10"
"""Timeout of one request to a server, and one retry: its own defaults are 120 s and 7."""

_NUMBERS_AT_ONCE = 500
"""Metrics, parameters and tags of one request. MLflow takes 1,000, but at half as much
again for each: so many objects at once set off Python's collection of garbage."""

_NAMES_AT_ONCE = 100
"""Parameters of one request, MLflow's limit."""

_PROGRESS = "mlflow.ablate.mirrored"
"""Tag that says how far a run is mirrored; MLflow's page hides tags whose name begins so."""

_OWNER = "ablate.folder"
"""Tag of an experiment: the number that its study folder keeps in mlflow.json."""

_STUDY_FILES = (
    "report.html",
    "report.md",
    "verdicts.json",
    "timeline.png",
    "best/config.yaml",
    "best/train.sh",
)
"""Files of a study folder that its run shows, when they exist."""

_LARGEST_PLAIN_TRACE = 2**20
"""Bytes; a longer trace is stored compressed."""

_FEWEST_DRAWN = 10
"""Rows; a shorter trial without events has no curve to draw."""

_Dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # ten times as fast, where it is built

_STATUS = {
    Outcome.COMPLETED: "FINISHED",
    Outcome.DIVERGED: "FINISHED",  # a result; the tag tells
    Outcome.PRUNED: "KILLED",
    Outcome.FAILED: "FAILED",
    Outcome.INFEASIBLE: "FAILED",
    Outcome.LOST: "FAILED",
}


class Abandoned(Exception):
    """The caller has stopped waiting: nothing more may be written."""


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
    described: bool = False
    """Its parameters are mirrored."""
    tags: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _News:
    """What a trial's logs hold that its run does not."""

    run: TrialRun
    """The run as it will be when this has arrived."""
    metrics: list[entities.Metric]
    rows: bool
    """Whether the logs have grown."""


class Mirror:
    """One study's runs in MLflow; every method may raise whatever MLflow raises."""

    def __init__(
        self,
        study: Study,
        record: StudyRecord,
        score: Score,
        uri: str,
        fresh: bool,
        abandoned: Callable[[], bool],
    ) -> None:
        self.complaint: str | None = None
        """A trial that MLflow refuses to take, or whose folder cannot be read."""
        self._study = study
        self._record = record
        self._score = score
        self._uri = uri
        self._fresh = fresh
        self._abandoned = abandoned
        self._client: MlflowClient | None = None
        self._experiment = ""
        self._study_run = ""
        self._study_status = ""
        self._study_tags: dict[str, str] = {}
        self._cells: dict[Levels, _CellRun] = {}
        self._runs: dict[str, TrialRun] = {}
        self._trials: dict[str, Trial] = {}
        self._by_cell: dict[Levels, list[Trial]] = {}
        self._ended: dict[str, _Ended] = {}
        self._means: dict[Levels, float] = {}
        """Mean score of each cell whose trials have all ended."""
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
        stale: set[Levels] = set()
        for trial_id in [i for i in self._trials if i in self._pending]:
            if self._abandoned():
                raise Abandoned
            trial = self._trials[trial_id]
            try:
                done = self._sync_trial(client, trial, running=trial_id in active, closing=closing)
            except (RecordError, UnicodeError) as error:
                done, self.complaint = True, f"trial {trial_id} is not mirrored: {reason_of(error)}"
            except MlflowException as error:
                if error.error_code != "INVALID_PARAMETER_VALUE" or self._is_deleted(
                    client, trial_id
                ):
                    raise
                done, self.complaint = True, f"MLflow refuses trial {trial_id}: {reason_of(error)}"
            stale.add(trial.cell.levels)
            if done or trial_id not in active:
                self._pending.discard(trial_id)
        for levels in stale:
            self._sync_cell(client, levels, closing=closing)
        self._sync_study(client, closing=closing)

    def _is_deleted(self, client: MlflowClient, trial_id: str) -> bool:
        """Whether someone has deleted the trial's run, so that MLflow takes nothing for it."""
        run = self._runs.get(trial_id)
        return run is not None and client.get_run(run.run_id).info.lifecycle_stage == "deleted"

    # ------------------------------------------------------------------ connecting

    def _open(self) -> MlflowClient:
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", _REQUEST_S)
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        with one_at_a_time(self._uri):
            client = MlflowClient(tracking_uri=self._uri, registry_uri=self._uri)
            self._experiment = self._open_experiment(client)
        self._cells, self._runs = {}, {}
        self._study_run = self._study_status = ""
        cells = {trials[0].cell.name: levels for levels, trials in self._by_cell.items()}
        surplus: list[str] = []  # deleted in the end: pages are counted from the first run
        for run in _all_runs(client, self._experiment):
            tags, run_id = run.data.tags, run.info.run_id
            if self._fresh:
                surplus.append(run_id)
            elif tags.get("kind") == "study" and not self._study_run:
                self._study_run, self._study_tags = run_id, dict(tags)
            elif tags.get("kind") == "cell" and (levels := cells.get(tags.get("cell", ""))):
                if levels in self._cells:
                    surplus.append(run_id)  # made twice: the answer to the first was lost
                    continue
                self._cells[levels] = _CellRun(
                    run_id,
                    run.info.status,
                    int(tags.get("seeds_ended", 0)),
                    described=bool(run.data.params),
                    tags=dict(tags),
                )
            elif tags.get("kind") == "trial" and tags.get("trial_id") in self._trials:
                if tags["trial_id"] in self._runs:
                    surplus.append(run_id)
                    continue
                self._runs[tags["trial_id"]] = _recalled(run)
        for run_id in surplus:
            client.delete_run(run_id)
        self._fresh = False
        return client

    def _open_experiment(self, client: MlflowClient) -> str:
        """The study's experiment. Where another folder's study has its name, it gets another one.

        Who is who is told by a number that the folder keeps: folders move, and hosts share them.
        """
        name = self._study.name
        mine = _number_of(self._record)
        found = client.get_experiment_by_name(name)
        if found is not None and found.tags.get(_OWNER, mine) != mine:
            name = f"{name}-{mine}"
            found = client.get_experiment_by_name(name)
        if found is not None and found.lifecycle_stage == "deleted":
            client.restore_experiment(found.experiment_id)
        runs = self._record.folder.parent
        location = artifacts_of(name, uri=self._uri, runs=runs)
        ours = self._uri == default_uri(runs)
        if found is not None and ours and found.artifact_location != location:
            # The folder has moved, and an experiment's artifacts cannot move with it.
            client.rename_experiment(found.experiment_id, f"{name} before {time.time():.0f}")
            client.delete_experiment(found.experiment_id)
            found = None
        if found is None:
            tags = {_OWNER: mine}
            return str(client.create_experiment(name, artifact_location=location, tags=tags))
        client.set_experiment_tag(found.experiment_id, _OWNER, mine)
        return str(found.experiment_id)

    # ------------------------------------------------------------------ the study's run

    def _ensure_study(self, client: MlflowClient, *, start: int) -> str:
        if self._study_run:
            return self._study_run
        tags = {
            "kind": "study",
            "mlflow.note.content": study_note(self._study),
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
        client.set_experiment_tag(self._experiment, "mlflow.note.content", study_note(self._study))
        client.set_experiment_tag(
            self._experiment, "mlflow.experimentKind", "custom_model_development"
        )
        with contextlib.suppress(MlflowException):  # a form that MLflow does not promise to take
            for key, view in views_of(self._study).items():
                client.set_experiment_tag(self._experiment, f"mlflow.sharedViewState.{key}", view)
        baseline = self._study.cell({})
        self._log(client, self._study_run, (), self._shared_config(baseline.levels), {})
        client.log_text(self._study_run, masked_url(self._study.text), "study.yaml")
        return self._study_run

    def _sync_study(self, client: MlflowClient, *, closing: bool) -> None:
        if not self._trials:
            return
        run_id = self._ensure_study(client, start=milliseconds(time.time()))
        ended = len(self._ended)
        tags = {"progress": f"{ended} of {len(self._trials)} trials"}
        best = self._best_cell()
        if best is not None:
            levels, score = best
            tags |= {"best_cell": self._changed(levels), "best_score": f"{score:.6g}"}
        changed = _changed_tags(tags, self._study_tags)
        self._log(client, run_id, (), {}, changed)
        self._study_tags.update(changed)
        if not closing:
            if self._study_status != "RUNNING":
                client.update_run(run_id, status="RUNNING")
                self._study_status = "RUNNING"
            return
        if best is not None:
            when = max(item.time for item in self._ended.values())
            client.log_metric(run_id, "score", best[1], timestamp=milliseconds(when), step=ended)
        for name in _STUDY_FILES:
            path = artifact_path(self._record.folder, name)
            if path is not None:
                client.log_artifact(run_id, str(path), str(Path(name).parent).strip("."))
        client.set_terminated(run_id, "FINISHED" if ended == len(self._trials) else "KILLED")

    def _best_cell(self) -> tuple[Levels, float] | None:
        """The best cell of those whose trials have all ended, and its mean score."""
        if not self._means:
            return None
        sign = self._study.objective.sign
        known = [levels for levels in self._by_cell if levels in self._means]
        best = max(known, key=lambda levels: sign * self._means[levels])
        return best, self._means[best]

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
            "cell": self._by_cell[levels][0].cell.name,
            **self._level_tags(levels),
        }
        run = client.create_run(
            self._experiment,
            start_time=start,
            tags=_clean_tags(tags),
            run_name=self._changed(levels),
        )
        cell = self._cells[levels] = _CellRun(run.info.run_id, "RUNNING", tags=dict(run.data.tags))
        return cell

    def _sync_cell(self, client: MlflowClient, levels: Levels, *, closing: bool) -> None:
        """Mean and deviation over seeds, at step k over the first k seeds of the study.

        In the order of seeds, whatever order they ended in, so that it can be told again.
        """
        trials = sorted(self._by_cell[levels], key=lambda t: self._study.seeds.index(t.seed))
        if not any(trial.id in self._runs for trial in trials):
            return
        counted = list(takewhile(lambda trial: trial.id in self._ended, trials))
        cell = self._cells.get(levels)
        if cell is not None and len(counted) < cell.seeds:  # one of them was taken up again
            client.delete_run(cell.run_id)
            del self._cells[levels]
            self._adopt(client, levels)
        cell = self._ensure_cell(client, levels, start=milliseconds(time.time()))
        scores: list[float] = []
        costs: list[float] = []
        metrics: list[entities.Metric] = []
        for ended, trial in enumerate(counted, start=1):
            when = milliseconds(max(self._ended[t.id].time for t in trials[:ended]))
            score = self._ended[trial.id].score
            if score is not None:
                scores.append(score)
            cost = self._ended[trial.id].result.cost
            if cost is not None:
                costs.append(cost)
            if not scores or ended <= cell.seeds:
                continue
            if costs:
                metrics.append(entities.Metric("cost", fmean(costs), when, ended))
            metrics.append(entities.Metric("score", fmean(scores), when, ended))
            if len(scores) > 1:
                metrics.append(entities.Metric("score_std", stdev(scores), when, ended))
        known = [self._ended[t.id] for t in trials if t.id in self._ended]
        outcomes = [item.result.outcome for item in known]
        counts = {name: outcomes.count(name) for name in dict.fromkeys(sorted(outcomes))}
        flags = {flag for item in known for flag in item.result.flags}
        tags = {
            "seeds_ended": str(len(counted)),
            "outcome": ", ".join(f"{name} {count}" for name, count in counts.items()) or "running",
            "flags": ", ".join(sorted(flags)),
        }
        described = {} if cell.described else self._shared_config(levels)
        changed = _changed_tags(tags, cell.tags)
        self._log(client, cell.run_id, metrics, described, changed)
        cell.described = True
        cell.tags.update(changed)
        cell.seeds = len(counted)
        whole = len(counted) == len(trials)
        self._means.pop(levels, None)
        if whole and scores:
            self._means[levels] = fmean(scores)
        self._set_status(
            client,
            cell,
            "FINISHED" if whole else ("KILLED" if closing else "RUNNING"),
            when=max(item.time for item in known) if whole else None,
        )

    def _adopt(self, client: MlflowClient, levels: Levels) -> None:
        """Give a cell a new run, and that run the cell's trials."""
        cell = self._ensure_cell(client, levels, start=milliseconds(time.time()))
        for trial in self._by_cell[levels]:
            run = self._runs.get(trial.id)
            if run is not None:
                client.set_tag(run.run_id, "mlflow.parentRunId", cell.run_id)

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
                    self.complaint = f"trial {trial.id} has no score: {reason_of(error)}"
                self._ended[trial.id] = _Ended(result, float(outcome["time"]), value)
        run = self._runs.get(trial.id)
        if run is not None and run.complete:
            if outcome is not None:
                return True
            self._begin_anew(client, trial, run)  # ended early, and then wanted after all
            self._ended.pop(trial.id, None)
            run = None
        attempts = folder.attempts()
        if not attempts and outcome is None:
            return False
        if run is None:
            run = self._create_trial_run(client, trial, folder)
        news = self._read_news(client, trial, folder, attempts, run)
        if outcome is not None:
            self._finish_trial(client, trial, folder, news, outcome)
            return True
        stopped = closing or not running
        tags = {
            "outcome": "stopped" if stopped else "running",
            "attempt": str(attempts[-1] if attempts else 0),
        }
        self._send(client, trial, news, tags)
        self._set_status(client, news.run, "KILLED" if stopped else "RUNNING")
        return False

    def _begin_anew(self, client: MlflowClient, trial: Trial, run: TrialRun) -> None:
        """MLflow cannot delete a point: what was told and no longer holds goes with its run."""
        client.delete_run(run.run_id)
        del self._runs[trial.id]

    def _create_trial_run(
        self, client: MlflowClient, trial: Trial, folder: TrialRecord
    ) -> TrialRun:
        start = milliseconds(begun_at(folder))
        parent = self._ensure_cell(client, trial.cell.levels, start=start).run_id
        content = folder.trial()
        fingerprint = flat(content.get("fingerprint") or {})
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
        known = self._runs[trial.id] = TrialRun(run.info.run_id, "RUNNING", run.info.artifact_uri)
        known.tags = dict(run.data.tags)
        return known

    def _read_news(
        self,
        client: MlflowClient,
        trial: Trial,
        folder: TrialRecord,
        attempts: Sequence[int],
        run: TrialRun,
    ) -> _News:
        """Rows that are new; the run is replaced when an attempt repeated mirrored steps.

        Of two attempts' rows at one step the later one counts.
        """
        trace, evals, offsets = new_rows(folder, attempts, run)
        if repeats(trace, run, step=run.step, attempt=run.step_attempt) or repeats(
            evals, run, step=run.eval_step, attempt=run.eval_attempt
        ):
            self._begin_anew(client, trial, run)
            run = self._create_trial_run(client, trial, folder)
            trace, evals, offsets = new_rows(folder, attempts, run)
        trace = [row for row in trace if row["step"] > run.step]
        evals = [row for row in evals if row["step"] > run.eval_step]

        after = replace(run, attempt=attempts[-1] if attempts else 0, offsets=offsets)
        if trace:
            after.step, after.step_attempt = trace[-1]["step"], trace[-1]["attempt"]
        if evals:
            after.eval_step, after.eval_attempt = evals[-1]["step"], evals[-1]["attempt"]
        # After the rows, so that no step that they ask for is passed over.
        forced: set[int] = set()
        after.events_seen = bytes_of_events(folder, attempts)
        if after.events_seen != run.events_seen:
            for event in folder.events():
                for name in ("first_step", "last_step"):
                    forced.add(int(event.get(name) or 0))
        kept = [row for row in trace if keeps(row["step"]) or row["step"] in forced]
        late = {s for s in forced if 0 < s <= run.step and not keeps(s)} - run.shown
        if late:  # rare: an event is told some steps after its first
            kept = [row for row in folder.trace() if row["step"] in late] + kept
        after.shown = run.shown | {s for s in forced if s <= after.step}
        metrics = [metric for row in kept for metric in metrics_of(row)]
        metrics += [metric for row in evals for metric in metrics_of(row, evaluation=True)]
        return _News(after, metrics, bool(trace or evals))

    def _finish_trial(
        self,
        client: MlflowClient,
        trial: Trial,
        folder: TrialRecord,
        news: _News,
        outcome: Mapping[str, Any],
    ) -> None:
        run, metrics = news.run, news.metrics
        when = milliseconds(float(outcome["time"]))
        trace = folder.trace()
        if trace and not keeps(trace[-1]["step"]) and trace[-1]["step"] not in run.shown:
            metrics += metrics_of(trace[-1])
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
            "cost": self._ended[trial.id].result.cost,
        }
        for marker in {str(event["marker"]) for event in events}:
            steps = [event["first_step"] for event in events if event["marker"] == marker]
            final[f"num_events/{marker}"] = len(steps)
            final[f"first_step/{marker}"] = min(steps)
        metrics += [
            entities.Metric(name, float(value), when, step)
            for name, value in final.items()
            if isinstance(value, (int, float)) and math.isfinite(value)
        ]
        result = self._ended[trial.id].result
        learned = folder.learned()
        artifacts = get_artifact_repository(run.artifact_uri, tracking_uri=self._uri)
        with tempfile.TemporaryDirectory(prefix="ablate-") as scratch:
            self._write_artifacts(Path(scratch), trial, folder, outcome, trace, events, learned)
            artifacts.log_artifacts(scratch)
        self._set_status(client, run, _STATUS[Outcome(result.outcome)], when=float(outcome["time"]))
        tags = {
            "outcome": result.outcome,
            "verdict": result.verdict,
            "flags": ", ".join(result.flags),
            "markers": ", ".join(sorted({str(event["marker"]) for event in events})),
            "attempt": str(outcome.get("attempt", "")),
            "reason": str(outcome.get("reason") or ""),
            "learning": str((learned or {}).get("verdict", "")),
            "mlflow.note.content": trial_note(result, outcome, events),
        }
        # Last of all: once this has arrived, the run is never looked at again.
        groups = outcome.get("parameter_groups") or {}
        self._send(client, trial, news, tags, params={"parameter_groups": groups}, complete=True)

    def _send(
        self,
        client: MlflowClient,
        trial: Trial,
        news: _News,
        tags: Mapping[str, str],
        *,
        params: Mapping[str, Any] | None = None,
        complete: bool = False,
    ) -> None:
        """Tell MLflow what is new of a trial, in as few requests as it takes."""
        run = news.run
        if complete:
            tags = {**tags, _PROGRESS: "complete"}
        elif news.rows:
            progress = f"{run.step_attempt}:{run.step} {run.eval_attempt}:{run.eval_step}"
            tags = {**tags, _PROGRESS: progress}
        described = {} if run.described else trial.config
        changed = _changed_tags(tags, run.tags)
        self._log(client, run.run_id, news.metrics, {**described, **(params or {})}, changed)
        run.described = True
        if complete:
            run = TrialRun(run.run_id, run.status, complete=True)  # a study may have thousands
        else:
            run.tags.update(changed)
        self._runs[trial.id] = run

    def _write_artifacts(
        self,
        scratch: Path,
        trial: Trial,
        folder: TrialRecord,
        outcome: Mapping[str, Any],
        trace: Sequence[Mapping[str, Any]],
        events: Sequence[Mapping[str, Any]],
        learned: Mapping[str, Any] | None,
    ) -> None:
        recipe = recipes.load(trial.recipe)
        config = masked("", trial.config)
        (scratch / "trial.json").write_text(dumps(masked("", folder.trial()), indent=1) + "\n")
        (scratch / "outcome.json").write_text(dumps(masked("", outcome), indent=1) + "\n")
        (scratch / "config.yaml").write_text(yaml.dump(config, Dumper=_Dumper, sort_keys=False))
        with contextlib.suppress(ValueError):  # some settings have no equal in the peer
            line = recipe.command(
                recipe.Config(**config), workers=int(trial.gang.get("workers", 1))
            )
            (scratch / "command.txt").write_text(shlex.join(line) + "\n")
        if learned is not None:
            (scratch / "learning.json").write_text(dumps(learned, indent=1) + "\n")
        write_rows(scratch / "events.jsonl", events)
        write_rows(scratch / "evals.jsonl", folder.evaluations())
        write_rows(scratch / "trace.jsonl", trace)
        dense = scratch / "trace.jsonl"
        if dense.stat().st_size > _LARGEST_PLAIN_TRACE:
            with open(dense, "rb") as plain, gzip.open(scratch / "trace.jsonl.gz", "wb", 5) as file:
                shutil.copyfileobj(plain, file)
            dense.unlink()
        if events or len(trace) >= _FEWEST_DRAWN:
            name = self._changed(trial.cell.levels)
            draw_record(
                scratch / "timeline.png",
                folder,
                title=f"{name} · seed {trial.seed}",
                verdict=self._ended[trial.id].result.verdict,
            )
        attempts = folder.attempts()
        if outcome["outcome"] != Outcome.COMPLETED and attempts:
            tail = folder.log_tail(attempts[-1], lines=200)
            if tail:
                (scratch / "log.txt").write_text(masked_url(tail) + "\n")

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

    def _log(
        self,
        client: MlflowClient,
        run_id: str,
        metrics: Sequence[entities.Metric],
        params: Mapping[str, Any],
        tags: Mapping[str, str],
    ) -> None:
        """Log to a run in as few requests as there can be; the tags arrive after all the rest."""
        named = [
            entities.Param(plain_key(key), value[:6000]) for key, value in flat(params).items()
        ]
        labels = [entities.RunTag(key, value) for key, value in tags.items()]
        while named[_NAMES_AT_ONCE:]:
            client.log_batch(run_id, params=named[:_NAMES_AT_ONCE])
            named = named[_NAMES_AT_ONCE:]
        at = 0
        while len(metrics) - at + len(named) + len(labels) > _NUMBERS_AT_ONCE:
            if self._abandoned():
                raise Abandoned
            client.log_batch(run_id, metrics=metrics[at : at + _NUMBERS_AT_ONCE])
            at += _NUMBERS_AT_ONCE
        client.log_batch(run_id, metrics=metrics[at:], params=named, tags=labels)

    def _set_status(
        self,
        client: MlflowClient,
        run: TrialRun | _CellRun,
        status: str,
        *,
        when: float | None = None,
    ) -> None:
        if run.status == status:
            return
        if status == "RUNNING":
            client.update_run(run.run_id, status=status)
        else:
            client.set_terminated(run.run_id, status, None if when is None else milliseconds(when))
        run.status = status


def _number_of(record: StudyRecord) -> str:
    """Six hexadecimal digits that are this study folder's own, drawn at its first mirroring."""
    path = record.folder / "mlflow.json"
    try:
        return str(read_json(path)["folder"])
    except FileNotFoundError:
        number = secrets.token_hex(3)
        write_json(path, {"folder": number})
        return number


def _all_runs(client: MlflowClient, experiment: str) -> Iterator[entities.Run]:
    """Every run of an experiment that is not deleted, oldest first, some in memory at a time."""
    token: str | None = None
    while True:
        page = client.search_runs(
            [experiment], max_results=200, order_by=["attributes.start_time ASC"], page_token=token
        )
        yield from page
        token = page.token
        if not token:
            return


def _recalled(run: entities.Run) -> TrialRun:
    tags = dict(run.data.tags)
    mirrored = tags.get(_PROGRESS, "")
    if mirrored == "complete":
        return TrialRun(run.info.run_id, run.info.status, complete=True)
    known = TrialRun(
        run.info.run_id,
        run.info.status,
        run.info.artifact_uri,
        described=bool(run.data.params),
        tags=tags,
    )
    if mirrored:
        numbers = [int(number) for number in re.findall(r"\d+", mirrored)]
        known.step_attempt, known.step, known.eval_attempt, known.eval_step = numbers
    return known


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _clean_tags(tags: Mapping[str, str]) -> dict[str, str]:
    return {plain_key(key): str(masked(key, value))[:5000] for key, value in tags.items()}


def _changed_tags(tags: Mapping[str, str], known: Mapping[str, str]) -> dict[str, str]:
    """What differs from what is known to stand there; an empty value sets nothing."""
    return {k: v for k, v in _clean_tags(tags).items() if v and known.get(k) != v}


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
