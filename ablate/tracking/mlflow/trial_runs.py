"""The runs of trials: rows as they come, and at the end everything that came of it."""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

from ablate.records.folder import TrialRecord
from ablate.records.masking import reason_of
from ablate.study.results import result_of
from ablate.tracking.mlflow import runs
from ablate.tracking.mlflow.artifacts import write_artifacts
from ablate.tracking.mlflow.curves import curves_of
from ablate.tracking.mlflow.door import Door
from ablate.tracking.mlflow.known import Known
from ablate.tracking.mlflow.notes import trial_note
from ablate.tracking.mlflow.rows import TrialRun, begun_at, keeps, metrics_of, milliseconds
from ablate.tracking.mlflow.runs import Ended, News, changed_tags
from ablate.trial.identity import Outcome, Trial

_MOST_OF_MACHINE = 200
"""Rows about the machine that are told of a trial."""


def sync_trial(door: Door, known: Known, trial: Trial, *, running: bool, closing: bool) -> bool:
    """Bring a trial's run up to date; True when there is nothing more to come of it."""
    folder = known.record.record(trial.id)
    outcome = folder.outcome()  # before the logs: an outcome says that they are complete
    if outcome is not None and trial.id not in known.ended:
        known.ended[trial.id] = _judge(known, trial, outcome, folder)
        known.changes += 1
    run = known.runs.get(trial.id)
    if run is not None and run.complete:
        if outcome is not None:
            return True
        _begin_anew(door, known, trial, run)  # ended early, and then wanted after all
        known.changes += known.ended.pop(trial.id, None) is not None
        known.curves.pop(trial.id, None)
        run = None
    attempts = folder.attempts()
    if not attempts and outcome is None:
        return False
    run = run or _create(door, known, trial, folder)
    news = runs.read_news(folder, attempts, run, known.measures)
    if news is None:
        _begin_anew(door, known, trial, run)
        run = _create(door, known, trial, folder)
        news = runs.read_news(folder, attempts, run, known.measures)
        assert news is not None, "a run without rows has none that repeat"
    if outcome is not None:
        _finish(door, known, trial, folder, news, outcome)
        return True
    stopped = closing or not running
    tags = {
        "outcome": "stopped" if stopped else "running",
        "attempt": str(attempts[-1] if attempts else 0),
    }
    _send(door, known, trial, news, tags)
    door.set_status(news.run, "KILLED" if stopped else "RUNNING")
    return False


def _judge(known: Known, trial: Trial, outcome: Mapping[str, Any], folder: TrialRecord) -> Ended:
    result = result_of(trial, folder, outcome)
    try:
        value = known.score(result)
    except (ValueError, OSError) as error:  # chance level is counted from the data
        value = None
        known.complaints.append(
            f"{known.name(trial)} ({trial.id}) has no score: {reason_of(error)}"
        )
    finite = value if value is not None and math.isfinite(value) else None
    markers = sorted({str(event["marker"]) for event in folder.events()})
    return Ended(result, float(outcome["time"]), finite, tuple(markers))


def _begin_anew(door: Door, known: Known, trial: Trial, run: TrialRun) -> None:
    """MLflow cannot delete a point: what was told and no longer holds goes with its run."""
    door.delete(run.run_id)
    del known.runs[trial.id]


def _create(door: Door, known: Known, trial: Trial, folder: TrialRecord) -> TrialRun:
    start = milliseconds(begun_at(folder))
    tags = runs.trial_tags(known.study, trial, folder.trial())
    run = door.create(known.name(trial), tags, start=start)
    made = known.runs[trial.id] = TrialRun(run.info.run_id, "RUNNING", run.info.artifact_uri)
    made.tags = dict(run.data.tags)
    return made


def _finish(
    door: Door,
    known: Known,
    trial: Trial,
    folder: TrialRecord,
    news: News,
    outcome: Mapping[str, Any],
) -> None:
    run, ended = news.run, known.ended[trial.id]
    trace, events, measures = folder.trace(), folder.events(), known.measures
    if trace and not keeps(trace[-1]["step"]) and trace[-1]["step"] not in run.shown:
        news.metrics.extend(metrics_of(measures.of_step(trace[-1]), trace[-1]))
    workers = known.study.gang.workers
    news.metrics.extend(
        runs.final_numbers(ended, outcome, events, measures=measures, workers=workers)
    )
    machine = folder.machine()
    for row in machine[:: 1 + len(machine) // _MOST_OF_MACHINE]:
        news.metrics.extend(metrics_of(measures.of_machine(row), row))
    known.curves[trial.id] = curves_of(trace, folder.evaluations(), measures)
    with _artifacts(run.artifact_uri, door.uri) as place:
        write_artifacts(
            place,
            trial,
            folder,
            outcome,
            trace=trace,
            events=events,
            title=known.name(trial),
            verdict=ended.result.verdict,
        )
        is_drawn = (place / "timeline.png").exists()
    door.set_status(run, runs.STATUS[Outcome(ended.result.outcome)], when=ended.time)
    tags = runs.final_tags(ended, outcome, folder.learned())
    tags["mlflow.note.content"] = trial_note(
        ended.result, outcome, events, measures=measures, run_id=run.run_id, is_drawn=is_drawn
    )
    # Last of all: once this has arrived, the run is never looked at again.
    _send(door, known, trial, news, tags, complete=True)


@contextlib.contextmanager
def _artifacts(uri: str, tracking_uri: str) -> Iterator[Path]:
    """A folder whose files become a run's artifacts: where they lie on this disk, their own."""
    artifacts = get_artifact_repository(uri, tracking_uri=tracking_uri)
    if isinstance(artifacts, LocalArtifactRepository):
        place = Path(artifacts.artifact_dir)
        place.mkdir(parents=True, exist_ok=True)
        yield place
        return
    with tempfile.TemporaryDirectory(prefix="ablate-") as scratch:
        yield Path(scratch)
        artifacts.log_artifacts(scratch)


def _send(
    door: Door,
    known: Known,
    trial: Trial,
    news: News,
    tags: Mapping[str, str],
    *,
    complete: bool = False,
) -> None:
    """Tell MLflow what is new of a trial, in as few requests as it takes."""
    run = news.run
    if complete:
        tags = {**tags, runs.PROGRESS: runs.COMPLETE}
    elif news.rows:
        tags = {**tags, **runs.progress_tag(run)}
    params: Mapping[str, Any] = {}
    if not run.described:
        params = {**known.setting(trial.cell.levels), "seed": trial.seed}
    changed = changed_tags(tags, run.tags)
    door.log(run.run_id, metrics=news.metrics, params=params, tags=changed)
    run.described = True
    if complete:
        run = TrialRun(run.run_id, run.status, complete=True)  # a study may have thousands
    else:
        run.tags.update(changed)
    known.runs[trial.id] = run
