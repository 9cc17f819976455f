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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import mlflow.entities as entities
import yaml
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from ablate import __version__, recipes
from ablate.analysis.results import Result, result_of
from ablate.errors import RecordError
from ablate.markers.replay import draw_record
from ablate.masking import artifact_path, flat, masked, masked_url, reason_of
from ablate.records import StudyRecord, TrialRecord, dumps, read_json, write_json
from ablate.study import Study
from ablate.tracking.pages import study_note, trial_note, views_of
from ablate.tracking.rows import (
    TrialRun,
    batches,
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
from ablate.tracking.store import one_at_a_time
from ablate.trial import Levels, Outcome, Trial

Score = Callable[[Result], float | None]


_REQUEST_S = "10"
"""Timeout of one request to a server, and one retry: its own defaults are 120 s and 7."""

_ROWS_AT_ONCE = 200
"""Trace rows that one request carries, at most; MLflow takes 1,000 metrics a request."""

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
    tags: dict[str, str] = field(default_factory=dict)


class Mirror:
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
        self._runs: dict[str, TrialRun] = {}
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
        with one_at_a_time(self._uri):
            client = MlflowClient(tracking_uri=self._uri, registry_uri=self._uri)
            self._experiment = self._open_experiment(client)
        self._cells, self._runs = {}, {}
        self._study_run = self._study_status = ""
        cells = {trials[0].cell.name: levels for levels, trials in self._by_cell.items()}
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
        """The study's experiment. Where another folder's study has its name, it gets another one.

        Who is who is told by a number that the folder keeps: folders move, and hosts share them.
        """
        name = self._study.name
        mine = _number_of(self._record)
        location = None if self._artifacts is None else self._artifacts.as_uri()
        found = client.get_experiment_by_name(name)
        if found is not None and found.tags.get(_OWNER, mine) != mine:
            name = f"{name}-{mine}"
            found = client.get_experiment_by_name(name)
        if found is not None and found.lifecycle_stage == "deleted":
            client.restore_experiment(found.experiment_id)
        if found is not None and location and found.artifact_location != location:
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
        _log_params(client, self._study_run, self._shared_config(baseline.levels))
        client.log_text(self._study_run, masked_url(self._study.text), "study.yaml")
        return self._study_run

    def _sync_study(self, client: MlflowClient, *, closing: bool) -> None:
        if not self._trials:
            return
        run_id = self._ensure_study(client, start=milliseconds(time.time()))
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
            client.log_metric(run_id, "score", best[1], timestamp=milliseconds(when), step=ended)
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
        sign = self._study.objective.sign
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
            "cell": self._by_cell[levels][0].cell.name,
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
        cell = self._ensure_cell(client, levels, start=milliseconds(time.time()))
        scores: list[float] = []
        costs: list[float] = []
        metrics: list[entities.Metric] = []
        ended = 0
        for trial in trials:
            if trial.id not in self._ended:
                break
            ended += 1
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
                    self.complaint = f"trial {trial.id} has no score: {reason_of(error)}"
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
        known = self._runs[trial.id] = TrialRun(run.info.run_id, "RUNNING")
        known.tags = dict(run.data.tags)
        _log_params(client, known.run_id, trial.config)
        return known

    def _sync_rows(
        self,
        client: MlflowClient,
        trial: Trial,
        folder: TrialRecord,
        attempts: Sequence[int],
        run: TrialRun,
    ) -> TrialRun:
        """Mirror rows that are new; the run is replaced when an attempt repeated mirrored steps.

        MLflow cannot delete a point, and of two attempts' rows at one step the later one counts.
        """
        trace, evals, offsets = new_rows(folder, attempts, run)
        if repeats(trace, run, step=run.step, attempt=run.step_attempt) or repeats(
            evals, run, step=run.eval_step, attempt=run.eval_attempt
        ):
            client.delete_run(run.run_id)
            del self._runs[trial.id]
            run = self._create_trial_run(client, trial, folder)
            trace, evals, offsets = new_rows(folder, attempts, run)
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
        size = bytes_of_events(folder, attempts)
        if size != run.events_seen:
            for event in folder.events():
                for name in ("first_step", "last_step"):
                    forced.add(int(event.get(name) or 0))
        kept = [row for row in trace if keeps(row["step"]) or row["step"] in forced]
        late = {s for s in forced if 0 < s <= run.step and not keeps(s)} - run.shown
        if late:  # rare: an event is told some steps after its first
            kept = [row for row in folder.trace() if row["step"] in late] + kept
        mirrored = f"{step_attempt}:{step} {eval_attempt}:{eval_step}"
        for rows in batches(kept, _ROWS_AT_ONCE):
            if self._abandoned():
                raise Abandoned
            self._log_metrics(client, run.run_id, [m for row in rows for m in metrics_of(row)])
        self._log_metrics(
            client, run.run_id, [m for row in evals for m in metrics_of(row, evaluation=True)]
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
        run: TrialRun,
        outcome: Mapping[str, Any],
    ) -> None:
        when = milliseconds(float(outcome["time"]))
        trace = folder.trace()
        if trace and not keeps(trace[-1]["step"]) and trace[-1]["step"] not in run.shown:
            self._log_metrics(client, run.run_id, metrics_of(trace[-1]))
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
        self._log_metrics(
            client,
            run.run_id,
            [
                entities.Metric(name, float(value), when, step)
                for name, value in final.items()
                if isinstance(value, (int, float)) and math.isfinite(value)
            ],
        )
        groups = outcome.get("parameter_groups") or {}
        _log_params(client, run.run_id, {"parameter_groups": groups})
        learned = folder.learned()
        with tempfile.TemporaryDirectory(prefix="ablate-") as scratch:
            self._write_artifacts(Path(scratch), trial, folder, outcome, trace, events, learned)
            client.log_artifacts(run.run_id, scratch)
        result = self._ended[trial.id].result
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
        learned: Mapping[str, Any] | None,
    ) -> None:
        recipe = recipes.load(trial.recipe)
        config = masked("", trial.config)
        (scratch / "trial.json").write_text(dumps(masked("", folder.trial()), indent=1) + "\n")
        (scratch / "outcome.json").write_text(dumps(masked("", outcome), indent=1) + "\n")
        (scratch / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
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
        if trace:
            name = self._study.change_name(dict(trial.cell.levels))
            draw_record(scratch / "timeline", folder, title=f"{name} · seed {trial.seed}")
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

    def _log_metrics(
        self, client: MlflowClient, run_id: str, metrics: Sequence[entities.Metric]
    ) -> None:
        for batch in batches(metrics, 1000):
            client.log_batch(run_id, metrics=batch)


def _number_of(record: StudyRecord) -> str:
    """Six hexadecimal digits that are this study folder's own, drawn at its first mirroring."""
    path = record.folder / "mlflow.json"
    try:
        return str(read_json(path)["folder"])
    except FileNotFoundError:
        number = secrets.token_hex(3)
        write_json(path, {"folder": number})
        return number


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


def _recalled(run: entities.Run) -> TrialRun:
    tags = dict(run.data.tags)
    known = TrialRun(run.info.run_id, run.info.status, tags=tags)
    mirrored = tags.get(_PROGRESS, "")
    if mirrored == "complete":
        known.complete = True
    elif mirrored:
        numbers = [int(number) for number in re.findall(r"\d+", mirrored)]
        known.step_attempt, known.step, known.eval_attempt, known.eval_step = numbers
    return known


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _log_params(client: MlflowClient, run_id: str, config: Mapping[str, Any]) -> None:
    params = [entities.Param(plain_key(key), value[:6000]) for key, value in flat(config).items()]
    for batch in batches(params, 100):
        client.log_batch(run_id, params=batch)


def _clean_tags(tags: Mapping[str, str]) -> dict[str, str]:
    return {plain_key(key): str(masked(key, value))[:5000] for key, value in tags.items()}


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
