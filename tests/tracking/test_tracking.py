"""The MLflow mirror: what it shows, that it can be told again, that no outage reaches a study."""

from __future__ import annotations

import contextlib
import gzip
import http.client
import json
import math
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest
import sqlalchemy
import yaml
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

from ablate.analysis.results import Result
from ablate.errors import TrackingError
from ablate.records.attempt import AttemptWriter
from ablate.records.folder import StudyRecord
from ablate.records.masking import artifact_path
from ablate.study import Study, design, parse_study
from ablate.tracking.mlflow.server import serve
from ablate.tracking.mlflow.store import default_uri, one_at_a_time
from ablate.tracking.tracker import Tracker
from ablate.trial.identity import Trial

CHANCE = 0.0016
BEGUN = 1_790_000_000.0

STUDY = """
recipe: openclip
baseline: {model: RN50, train_data: "https://me:hunter2@host/x.tar", beta2: 0.999, warmup: 10}
factors:
  beta2: [0.999, 0.98]
  loss:
    default: {}
    local_only: {local_loss: true}
gang: {workers: 2}
seeds: [0, 1]
"""


def score(result: Result) -> float | None:
    if result.outcome == "diverged":
        return CHANCE
    return result.value if result.outcome == "completed" else None


class Folder:
    """A study folder that is filled by hand, as trials would."""

    def __init__(self, root: Path, *, store: Path | None = None, seeds: int = 2) -> None:
        text = STUDY.replace("[0, 1]", str(list(range(seeds))))
        self.study: Study = parse_study(text, path="studies/two.yaml", root="/")
        self.record = StudyRecord(root / "runs" / self.study.name)
        self.record.write_study({"format": 1, "name": self.study.name, "text": text})
        if store is not None:
            shutil.copy(store, self.record.folder.parent / "mlflow.db")
        self.trials: list[Trial] = sorted(
            design.propose(self.study),
            key=lambda trial: (trial.cell != self.study.cell({}), trial.cell.levels, trial.seed),
        )
        self.writers: list[AttemptWriter] = []
        for trial in self.trials:
            self.record.write_trial({**trial.to_json(), "fingerprint": FINGERPRINT})

    def trial(self, changed: str, *, seed: int) -> Trial:
        name, _, level = changed.partition("=")
        levels = {name: level} if level else {}
        cell = self.study.cell(levels)
        return next(t for t in self.trials if t.cell == cell and t.seed == seed)

    def attempt(self, trial: Trial, number: int) -> AttemptWriter:
        self.writers.append(AttemptWriter(self.record.record(trial.id).folder, number))
        return self.writers[-1]

    def end(self, trial: Trial, outcome: str, value: float | None = None, **facts: Any) -> None:
        after = self.trials.index(trial)
        content = {"attempt": 1, "wall_s": 12.5, "time": BEGUN + 1000 + after, **facts}
        self.record.write_outcome(
            self.record.record(trial.id), {"outcome": outcome, "value": value, **content}
        )

    def run(self, trial: Trial, *, steps: int = 30, value: float = 0.2) -> None:
        """A whole trial that completes."""
        writer = self.attempt(trial, 1)
        writer.step(rows(1, steps))
        writer.machine({"step": 2, "time": BEGUN + 2, "system/cpu_utilization_percentage": 40.0})
        writer.evaluation(evaluation(steps, value))
        writer.close()
        self.end(trial, "completed", value, step=steps, verdict="STABLE", best={})

    def tracker(self, **more: Any) -> Tracker:
        return Tracker(self.study, self.record, score=score, **more)

    @property
    def uri(self) -> str:
        return default_uri(self.record.folder.parent)


FINGERPRINT = {
    "git_commit": "0123abc",
    "env": {"AWS_SECRET_ACCESS_KEY": "hunter2", "PROXY": "http://u:hunter2@proxy:80"},
}


def rows(first: int, last: int, *, attempt: int = 1) -> list[dict[str, Any]]:
    """Rows of a trace; a later attempt measures the same at a later time."""
    return [
        {
            "step": step,
            "attempt": attempt,
            "time": BEGUN + step + 500 * (attempt - 1),
            "epoch": step / 10,
            "samples": step * 64,
            "loss": 5.0 / step,
            "grad_norm": 1.0 + step % 3,
            "grad_norm/visual": 0.5,
            "rms/visual.conv1.weight": 1.0,
        }
        for step in range(first, last + 1)
    ]


def evaluation(step: int, value: float, *, attempt: int = 1) -> dict[str, Any]:
    when = BEGUN + step + 0.5 + 500 * (attempt - 1)
    return {
        "step": step,
        "attempt": attempt,
        "time": when,
        "epoch": step / 10,
        "imagenet_top1": value,
        "imagenet_top5": 2 * value,
    }


def event(step: int, *, last: int | None = None) -> dict[str, Any]:
    return {
        "marker": "loss_spike",
        "first_step": step,
        "last_step": last or step,
        "severity": "warning",
        "evidence": {"kind": "jump", "quantity": "loss"},
        "detected_at": (last or step) + 1,
        "message": "loss jumped",
    }


def wait_for(condition: Callable[[], object], *, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.05)


def runs_in(uri: str, study: str) -> dict[str, Any]:
    """Run name and kind -> run, of all that are not deleted."""
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
        return {}  # looking would create the store, in the middle of the mirror's doing so
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name(study)
    if experiment is None:
        return {}
    found = client.search_runs([experiment.experiment_id], max_results=1000)
    named = {f"{run.data.tags['kind']} {run.info.run_name}": run for run in found}
    assert len(named) == len(found), "a run stands there twice"
    return named


def num_runs(uri: str, study: str) -> int:
    """All that are not deleted, those that stand there twice too."""
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name(study)
    return len(client.search_runs([experiment.experiment_id])) if experiment is not None else 0


def content(uri: str, study: str) -> dict[str, Any]:
    """Everything that a reader sees, without ids that MLflow draws."""
    client = MlflowClient(uri)
    runs = runs_in(uri, study)
    names = {run.info.run_id: name for name, run in runs.items()}
    seen = {}
    for name, run in runs.items():
        tags = {key: named(value, names) for key, value in run.data.tags.items()}
        history = {
            key: [(m.step, m.timestamp, repr(m.value)) for m in points]
            for key in run.data.metrics
            if (points := client.get_metric_history(run.info.run_id, key))
        }
        for key, points in history.items():
            places = {point[0] or point for point in points}  # a final number may be told again
            assert len(places) == len(points), f"{name}: {key} twice"
        assert run.info.start_time <= (run.info.end_time or math.inf), (
            f"{name} ends before it began"
        )
        seen[name] = {
            "status": run.info.status,
            "params": run.data.params,
            "tags": tags,
            "metrics": history,
            "files": sorted(item.path for item in client.list_artifacts(run.info.run_id)),
        }
    return seen


def named(text: str, names: Mapping[str, str]) -> str:
    """`text` with the names of runs in place of their ids."""
    for run_id, name in names.items():
        text = text.replace(run_id, name)
    return text


def mirrored_step(uri: str, study: str, run: str, metric: str = "train/loss") -> int:
    """Last step of a metric that MLflow has; 0 before there is any."""
    found = runs_in(uri, study).get(run)
    if found is None:
        return 0
    points = MlflowClient(uri).get_metric_history(found.info.run_id, metric)
    return max((point.step for point in points), default=0)


# --------------------------------------------------------------------------- what is shown


@pytest.fixture
def folder(tmp_path: Path, empty_store: Path) -> Iterator[Folder]:
    made = Folder(tmp_path, store=empty_store)
    yield made
    for writer in made.writers:
        writer.close()


def test_study_cells_and_trials_stand_side_by_side(folder: Folder) -> None:
    """One run for the study, one for each cell, one for each trial, and none is another's child,
    which a fresh page would hide.

    Diverged is a result, scored at chance and red; so is a cell of which every seed diverged. A
    trial that never began has no run; the study as a whole was stopped, because trials are missing.
    """
    base0, base1 = folder.trial("", seed=0), folder.trial("", seed=1)
    beta0, beta1 = folder.trial("beta2=0.98", seed=0), folder.trial("beta2=0.98", seed=1)
    loss0 = folder.trial("loss=local_only", seed=0)
    folder.run(base0, value=0.20)
    folder.run(base1, steps=9, value=0.22)
    writer = folder.attempt(beta0, 1)
    bad = rows(1, 9)
    bad[-1] |= {"loss": math.nan, "grad_norm": math.inf}
    writer.step(bad)
    writer.event(event(9))
    writer.event(event(8) | {"marker": "rms_spike"})
    writer.close()
    writer.learning({"verdict": "collapsed", "reasons": ["weights are not finite"]})
    diverged = {"step": 9, "verdict": "NUMERIC_FAIL", "flags": ["SATURATED"]}
    folder.end(beta0, "diverged", reason="loss is NaN", **diverged)
    folder.end(beta1, "diverged", reason="loss is NaN", **diverged)
    (folder.record.record(loss0.id).folder / "attempts/1").mkdir(parents=True)
    log = folder.record.record(loss0.id).folder / "attempts/1/log-0.txt"
    log.write_text("Traceback: no such disk")
    folder.end(loss0, "failed", reason="crashed")
    tracker = folder.tracker()
    tracker.update(folder.trials, [])
    assert tracker.close(patience_s=120), tracker.trouble

    seen = content(folder.uri, "two")
    assert {name: run["status"] for name, run in seen.items()} == {
        "study study: two": "KILLED",
        "cell baseline": "FINISHED",
        "cell beta2=0.98": "FAILED",
        "cell loss=local_only": "KILLED",
        "trial baseline · seed 0": "FINISHED",
        "trial baseline · seed 1": "FINISHED",
        "trial beta2=0.98 · seed 0": "FAILED",
        "trial beta2=0.98 · seed 1": "FAILED",
        "trial loss=local_only · seed 0": "FAILED",
    }
    assert not any("mlflow.parentRunId" in run["tags"] for run in seen.values())
    good = seen["trial baseline · seed 0"]
    assert good["params"] == {
        "cell": "baseline",
        "seed": "0",
        "beta2": "0.999",
        "loss": "default",
        "train_data": "https://***@host/x.tar",
        "warmup": "10",
    }
    assert good["metrics"]["train/loss"][2] == (3, int((BEGUN + 3) * 1000), repr(5.0 / 3))
    told = [(30, int((BEGUN + 30.5) * 1000), "20.0")]
    assert good["metrics"]["eval/imagenet_top1_pct"] == told
    assert set(good["metrics"]) == {
        "train/loss", "train/grad_norm", "train/epoch", "eval/imagenet_top1_pct",
        "eval/imagenet_top5_pct", "score_pct", "markers", "gpu_hours",
        "system/cpu_utilization_percentage",
    }  # fmt: skip
    assert good["tags"]["mlflow.source.git.commit"] == "0123abc"
    assert (good["tags"]["markers"], good["tags"]["compares"]) == ("", "|beta2|loss|")

    ended = seen["trial beta2=0.98 · seed 0"]
    assert ended["metrics"]["score_pct"][0][2] == repr(100 * CHANCE)
    assert ended["metrics"]["markers"][0] == (0, ended["metrics"]["score_pct"][0][1], "2.0")
    assert ended["metrics"]["first_marker_step"][0][2] == "8.0"
    assert [value for *_, value in ended["metrics"]["train/loss"]][-1] == "nan"
    assert [value for *_, value in ended["metrics"]["train/grad_norm"]][-1] == "nan"
    expected = {
        "kind": "trial",
        "trial_id": beta0.id,
        "outcome": "diverged",
        "verdict": "NUMERIC_FAIL",
        "flags": "SATURATED",
        "markers": "loss_spike, rms_spike",
        "compares": "|beta2|",
        "reason": "loss is NaN",
        "attempt": "1",
        "learning": "collapsed",
    }
    assert expected.items() <= ended["tags"].items()
    assert "loss jumped" in ended["tags"]["mlflow.note.content"]
    files = ["command.txt", "config.yaml", "evals.jsonl", "events.jsonl", "outcome.json"]
    assert good["files"] == sorted([*files, "trace.jsonl", "trial.json"])
    more = ["learning.json", "log.txt", "timeline.png", "trace.jsonl", "trial.json"]
    assert ended["files"] == sorted({*files, *more} - {"log.txt"})
    assert "log.txt" in seen["trial loss=local_only · seed 0"]["files"]

    cell = seen["cell baseline"]
    finals = {key: points[-1] for key, points in cell["metrics"].items()}
    assert finals["score_pct"][::2] == (0, "21.0")
    assert (finals["score_pct_low"][2], finals["score_pct_high"][2]) == ("20.0", "22.0")
    assert [step for step, *_ in cell["metrics"]["train/loss"]] == list(range(1, 10))
    assert cell["tags"]["outcome"] == "completed 2" and cell["tags"]["verdict"] == "the baseline"
    assert "seed" not in cell["params"]
    lost = seen["cell beta2=0.98"]["tags"]
    assert (lost["outcome"], lost["verdict"]) == ("diverged 2", "inconclusive")
    assert lost["difference"] == "diverges in 2 of 2"
    study = seen["study study: two"]
    assert study["tags"]["use"] == "baseline" and "Use the baseline" in study["tags"]["use_why"]
    marked = [name for name, run in seen.items() if run["tags"].get("use") == "yes"]
    assert len(marked) == 1 and marked[0].startswith("trial baseline")
    assert study["tags"]["progress"] == "5 of 6 trials"
    assert study["files"] == ["command.txt", "study.yaml"]
    client = MlflowClient(folder.uri)
    found = client.get_experiment_by_name("two")
    assert found is not None
    note = found.tags["mlflow.note.content"]
    assert note.startswith("5 of 6 trials, so far: diverges: beta2=0.98 (2 of 2). [Settings](#")
    for search, count in (
        ("tags.outcome = 'diverged' and attributes.status = 'FAILED'", 2),
        ("params.`beta2` = '0.98' and tags.kind = 'trial'", 2),
        ("tags.kind = 'trial' and tags.markers != ''", 1),
        ("tags.kind = 'trial' and tags.verdict != 'STABLE'", 3),
        ("tags.kind = 'trial' and tags.compares LIKE '%|beta2|%'", 4),
    ):
        assert len(client.search_runs([found.experiment_id], search)) == count, search


def test_a_long_trace_is_thinned_by_the_stated_rule(folder: Folder) -> None:
    """Doubling strides, the steps of an event, and the last; the artifact holds every row.

    Every evaluation and every final value is there.
    """
    trial = folder.trials[0]
    writer = folder.attempt(trial, 1)
    writer.step(rows(1, 6001))
    evaluated = [*range(601, 6001, 600), 6001]
    for step in evaluated:
        writer.evaluation(evaluation(step, step / 1e4))
    writer.event(event(5001, last=5003))
    writer.close()
    folder.end(trial, "completed", 0.2, step=6001, best={"imagenet_top1": 0.6})
    tracker = folder.tracker()
    tracker.update(folder.trials[:1], [])
    assert tracker.close(patience_s=200)
    name = "trial baseline · seed 0"
    metrics = content(folder.uri, "two")[name]["metrics"]
    steps = {step for step, *_ in metrics["train/loss"]}
    expected = {*range(1, 129), *range(130, 257, 2), *range(260, 513, 4), *range(520, 1025, 8)}
    expected |= {*range(1040, 2049, 16), *range(2080, 4097, 32), *range(4160, 6002, 64)}
    assert steps == expected | {5001, 5003, 6001}
    assert [step for step, *_ in metrics["eval/imagenet_top1_pct"]] == evaluated
    assert metrics["best_imagenet_top1_pct"][0][::2] == (0, "60.0")
    client = MlflowClient(folder.uri)
    run_id = runs_in(folder.uri, "two")[name].info.run_id
    path = client.download_artifacts(run_id, "trace.jsonl.gz")
    with gzip.open(path, "rt") as file:
        assert [json.loads(line)["step"] for line in file] == list(range(1, 6002))


def test_the_study_run_shows_report_and_best(folder: Folder) -> None:
    """Once they exist, report, figures and the best configuration stand with the study's run."""
    for trial in folder.trials:
        folder.run(trial, steps=3)
    (folder.record.folder / "best").mkdir()
    (folder.record.folder / "figures").mkdir()
    for name in (
        "report.html", "report.md", "figures/pair.pdf", "best/train.sh", "best/model.bin"
    ):  # fmt: skip
        (folder.record.folder / name).write_text("curl https://me:hunter2@host/x")
    tracker = folder.tracker()
    tracker.update(folder.trials, [])
    assert tracker.close(patience_s=120)
    study = content(folder.uri, "two")["study study: two"]
    assert study["status"] == "FINISHED"
    files = ["best", "command.txt", "figures", "report.html", "report.md", "study.yaml"]
    assert study["files"] == files
    client = MlflowClient(folder.uri)
    run_id = runs_in(folder.uri, "two")["study study: two"].info.run_id
    assert [f.path for f in client.list_artifacts(run_id, "best")] == ["best/train.sh"]
    assert [f.path for f in client.list_artifacts(run_id, "figures")] == ["figures/pair.pdf"]
    uri = runs_in(folder.uri, "two")["study study: two"].info.artifact_uri
    command = Path(uri.removeprefix("file://")) / "command.txt"
    assert command.read_text() == "curl https://***@host/x", "the page shows no .sh"
    assert (
        f"{run_id}/artifacts/command.txt" in client.get_run(run_id).data.tags["mlflow.note.content"]
    )


def test_secrets_stay_out_of_mlflow(folder: Folder) -> None:
    """No byte of a password in the configuration, the environment or a log reaches the store."""
    trial = folder.trials[0]
    folder.attempt(trial, 1).step(rows(1, 3))
    log = folder.record.record(trial.id).folder / "attempts/1/log-0.txt"
    log.write_text("Traceback: cannot read https://me:hunter2@host/x.tar?X-Signature=hunter2&a=b")
    folder.end(trial, "failed", reason="GET https://me:hunter2@host/x.tar")
    tracker = folder.tracker()
    tracker.update(folder.trials, [])
    assert tracker.close(patience_s=120)
    runs = folder.record.folder.parent
    files = [p for p in runs.rglob("*") if p.is_file() and folder.record.folder not in p.parents]
    assert any(path.name == "mlflow.db" for path in files)
    assert any(path.name == "log.txt" for path in files)
    assert [path for path in files if b"hunter2" in path.read_bytes()] == []


# --------------------------------------------------------------------------- told again


def test_live_mirroring_equals_a_rebuild(folder: Folder) -> None:
    """A trial that is killed, resumed three steps back, and ends, looks as if told at its end.

    MLflow holds one point per step and metric, those of the attempt that counts, and someone who
    reads all the while is never turned away.
    """
    trial = folder.trial("beta2=0.98", seed=0)
    name = "trial beta2=0.98 · seed 0"
    tracker = folder.tracker()
    first = folder.attempt(trial, 1)
    first.step(rows(1, 10))
    tracker.update(folder.trials, [trial.id])
    wait_for(lambda: mirrored_step(folder.uri, "two", name) == 10)
    assert runs_in(folder.uri, "two")[name].info.status == "RUNNING"
    first.step(rows(11, 14))
    first.evaluation(evaluation(12, 0.1))
    tracker.update(folder.trials, [trial.id])
    wait_for(lambda: mirrored_step(folder.uri, "two", name) == 14)

    second = folder.attempt(trial, 2)
    tracker.update(folder.trials, [trial.id])
    second.step(rows(11, 20, attempt=2))
    second.evaluation(evaluation(12, 0.1, attempt=2))
    second.event(event(13))
    tracker.update(folder.trials, [trial.id])
    wait_for(lambda: mirrored_step(folder.uri, "two", name) == 20)
    folder.end(trial, "completed", 0.2, attempt=2, step=20, verdict="SPIKY")
    folder.run(folder.trial("", seed=1), value=0.22)  # ends before seed 0
    tracker.update(folder.trials, [folder.trial("", seed=1).id])
    folder.run(folder.trial("", seed=0), value=0.20)
    tracker.update(folder.trials, [folder.trial("", seed=0).id])
    assert tracker.close(patience_s=120)
    live = content(folder.uri, "two")
    times = [when for _, when, _ in live[name]["metrics"]["train/loss"]]
    assert times == [row["time"] * 1000 for row in [*rows(1, 10), *rows(11, 20, attempt=2)]]

    rebuilt = folder.tracker(fresh=True)
    rebuilt.update(folder.trials, [])
    assert rebuilt.close(patience_s=120)
    assert content(folder.uri, "two") == live


def test_a_cell_is_told_now_and_then_and_at_once_when_it_is_whole(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a cell's first seeds come to waits for a while, since it costs as much as a trial; what
    all of them come to does not."""
    monkeypatch.setattr("ablate.tracking.mlflow.mirror._CELL_S", 3600.0)
    tracker = folder.tracker()
    first, second = (folder.trial("", seed=seed) for seed in (0, 1))
    folder.run(first)
    tracker.update(folder.trials, [first.id])
    wait_for(lambda: "trial baseline · seed 0" in runs_in(folder.uri, "two"))
    monkeypatch.setattr("ablate.tracking.mlflow.mirror._CELL_S", 0.0)
    assert "cell baseline" not in runs_in(folder.uri, "two")
    tracker.update(folder.trials, [])
    wait_for(lambda: "cell baseline" in runs_in(folder.uri, "two"))
    monkeypatch.setattr("ablate.tracking.mlflow.mirror._CELL_S", 3600.0)
    folder.run(second)
    tracker.update(folder.trials, [second.id])
    wait_for(lambda: runs_in(folder.uri, "two")["cell baseline"].info.status == "FINISHED")
    assert tracker.close(patience_s=120)


def test_mirroring_again_changes_nothing(folder: Folder) -> None:
    """A controller that dies anywhere is followed by one that repeats no point and no run."""
    running, ended = folder.trials[:2]
    folder.run(ended)
    writer = folder.attempt(running, 1)
    writer.step(rows(1, 10))
    writer.evaluation(evaluation(10, 0.1))
    for _ in range(2):
        tracker = folder.tracker()
        tracker.update(folder.trials, [running.id])
        assert tracker.close(patience_s=120)
        before = content(folder.uri, "two")
        assert before["trial baseline · seed 0"]["status"] == "KILLED"
        assert before["trial baseline · seed 0"]["tags"]["outcome"] == "stopped"
        tracker = folder.tracker()
        tracker.update(folder.trials, [running.id])
        assert tracker.close(patience_s=120)
        assert content(folder.uri, "two") == before

    writer.step(rows(11, 15))
    folder.end(running, "completed", 0.2, step=15)
    tracker = folder.tracker()
    tracker.update(folder.trials, [])
    assert tracker.close(patience_s=120)
    after = content(folder.uri, "two")["trial baseline · seed 0"]
    assert after["status"] == "FINISHED"
    assert [step for step, *_ in after["metrics"]["train/loss"]] == list(range(1, 16))


def test_a_reopened_trial_begins_anew(folder: Folder) -> None:
    """A trial that was ended early and is wanted after all looks as if it had never ended."""
    trial = folder.trial("beta2=0.98", seed=0)
    record = folder.record.record(trial.id)
    name = "trial beta2=0.98 · seed 0"
    folder.run(folder.trial("beta2=0.98", seed=1))
    folder.attempt(trial, 1).step(rows(1, 10))
    folder.end(trial, "pruned", step=10, reason="too far behind at step 10")
    tracker = folder.tracker()
    tracker.update(folder.trials, [])
    wait_for(lambda: name in runs_in(folder.uri, "two"))
    wait_for(lambda: runs_in(folder.uri, "two")[name].info.status == "KILLED")

    folder.record.reopen(record)
    folder.attempt(trial, 2).step(rows(11, 14, attempt=2))
    tracker.update(folder.trials, [trial.id])
    wait_for(lambda: mirrored_step(folder.uri, "two", name) == 14)
    live = runs_in(folder.uri, "two")
    assert live[name].info.status == "RUNNING"
    assert live[name].data.tags["outcome"] == "running"
    assert "reason" not in live[name].data.tags and "gpu_hours" not in live[name].data.metrics
    folder.end(trial, "completed", 0.3, attempt=2, step=14, verdict="STABLE")
    tracker.update(folder.trials, [trial.id])
    assert tracker.close(patience_s=120)
    seen = content(folder.uri, "two")
    rebuilt = folder.tracker(fresh=True)
    rebuilt.update(folder.trials, [])
    assert rebuilt.close(patience_s=120)
    again = content(folder.uri, "two")
    assert seen == again
    assert seen["cell beta2=0.98"]["metrics"]["score_pct"][-1][2] == "25.0"


def test_a_run_that_someone_deleted_comes_back(folder: Folder) -> None:
    """What is deleted on the page is mirrored again from the folder while the study runs."""
    trial = folder.trials[0]
    name = "trial baseline · seed 0"
    writer = folder.attempt(trial, 1)
    writer.step(rows(1, 5))
    tracker = folder.tracker()
    tracker.update(folder.trials, [trial.id])
    wait_for(lambda: mirrored_step(folder.uri, "two", name) == 5)
    MlflowClient(folder.uri).delete_run(runs_in(folder.uri, "two")[name].info.run_id)

    writer.step(rows(6, 8))
    tracker.update(folder.trials, [trial.id])
    wait_for(lambda: mirrored_step(folder.uri, "two", name) == 8)
    assert tracker.close(patience_s=120)
    history = content(folder.uri, "two")[name]["metrics"]["train/loss"]
    assert [step for step, *_ in history] == list(range(1, 9))


def test_closing_takes_as_long_as_something_arrives(tmp_path: Path, empty_store: Path) -> None:
    """Forty trials take longer than the patience of who waits, and all of them are told; the
    count goes up to the last. What is deleted before the end is noticed and told again."""
    folder = Folder(tmp_path, store=empty_store, seeds=14)
    for trial in folder.trials[:-1]:
        folder.run(trial, steps=5)
    name = "trial baseline · seed 3"
    begun = time.monotonic()
    tracker = folder.tracker()
    tracker.update(folder.trials, [])
    wait_for(lambda: getattr(runs_in(folder.uri, "two").get(name), "info", None))
    gone = runs_in(folder.uri, "two")[name].info.run_id
    folder.run(folder.trials[-1], steps=5)
    tracker.update(folder.trials, [folder.trials[-1].id])
    wait_for(lambda: "score_pct" in runs_in(folder.uri, "two")[name].data.metrics)
    MlflowClient(folder.uri).delete_run(gone)
    assert tracker.close(patience_s=120), tracker.trouble
    took_s = time.monotonic() - begun
    back = runs_in(folder.uri, "two")[name]
    assert back.info.run_id != gone and back.data.metrics

    told: list[tuple[int, int]] = []
    tracker = folder.tracker(fresh=True)
    tracker.update(folder.trials, [])
    assert tracker.close(patience_s=took_s / 2, tell=lambda *pair: told.append(pair))
    assert told[-1] == (len(folder.trials), len(folder.trials))
    counts = [done for done, _ in told]
    assert counts == sorted(counts) and counts[0] < len(folder.trials)


def test_a_rebuild_goes_on_where_it_stopped(tmp_path: Path, empty_store: Path) -> None:
    """Ended in the middle it says so; the next one keeps what was told and tells the rest. One
    after that begins anew."""
    folder = Folder(tmp_path, store=empty_store, seeds=40)
    for trial in folder.trials:
        folder.run(trial, steps=3)

    def rebuild(*, until: int = 10**9) -> dict[str, str]:
        tracker = folder.tracker(fresh=True)
        done = 0

        def tell(number: int, total: int) -> None:
            nonlocal done
            done = number

        tracker.update(folder.trials, [])
        whole = tracker.close(patience_s=120, tell=tell, give_up=lambda: done >= until)
        assert whole == (until > len(folder.trials)), tracker.trouble
        found = runs_in(folder.uri, "two")
        return {
            name: run.info.run_id
            for name, run in found.items()
            if run.data.tags.get("outcome") == "completed" and name.startswith("trial")
        }

    first = rebuild(until=30)
    assert 20 <= len(first) < len(folder.trials)
    second = rebuild()
    assert len(second) == len(folder.trials) and first.items() <= second.items()
    assert not rebuild().items() & second.items()


def test_a_folder_that_moved_gets_a_mirror_of_its_own(folder: Folder, tmp_path: Path) -> None:
    """Artifacts are written beside the study, wherever it has gone."""
    folder.run(folder.trials[0], steps=3)
    tracker = folder.tracker()
    tracker.update(folder.trials, [])
    assert tracker.close(patience_s=120)
    (tmp_path / "runs").rename(tmp_path / "moved")
    record = StudyRecord(tmp_path / "moved" / "two")
    tracker = Tracker(folder.study, record, score=score)
    tracker.update(folder.trials, [])
    assert tracker.close(patience_s=120)
    seen = content(default_uri(tmp_path / "moved"), "two")
    assert "trace.jsonl" in seen["trial baseline · seed 0"]["files"]
    assert not (tmp_path / "runs").exists()


# --------------------------------------------------------------------------- outages


@contextmanager
def broken_server(answer: str) -> Iterator[str]:
    """A server that answers every request with this status, or never."""
    release = threading.Event()

    class Broken(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if answer == "never":
                release.wait(120)
            self.send_response(500 if answer == "never" else int(answer))
            self.end_headers()

        do_POST = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Broken)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        release.set()
        server.shutdown()
        server.server_close()


@contextmanager
def forgetful(port: int, *paths: str, slow: bool) -> Iterator[str]:
    """A server that hands on to the one at `port`, and loses its first answer on each of `paths`:
    what was asked is done, and the caller hears 503; from a slow one nothing until it gives up."""
    lost: list[str] = []

    class Forgetful(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            asked = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            headers = {k: v for k, v in self.headers.items() if k.lower() != "host"}
            asked.request(self.command, self.path, body, headers)
            answer = asked.getresponse()
            said, status = answer.read(), answer.status
            asked.close()
            if self.path.partition("?")[0] in paths and self.path not in lost:
                lost.append(self.path)
                said, status = b"", 503
                if slow:
                    assert self.connection.recv(1) == b"", "the caller has closed, and asks anew"
                    self.close_connection = True
                    return
            self.send_response(status)
            self.send_header("Content-Type", answer.headers.get("Content-Type") or "text/plain")
            self.send_header("Content-Length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)

        do_POST = do_PUT = do_PATCH = do_DELETE = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Forgetful)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
    assert len(lost) == len(paths), "no answer was lost"


@pytest.mark.exhaustive
@pytest.mark.parametrize("slow", [True, False])
def test_a_lost_answer_leaves_no_run_behind(
    folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow: bool
) -> None:
    """The experiment and a run are made and the answer is lost, as by a proxy that gives up on a
    slow server, or by a client that does: asked again, each stands there once, and none is left
    running."""
    if slow:
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    writer = folder.attempt(folder.trials[0], 1)
    made = ("/api/2.0/mlflow/experiments/create", "/api/2.0/mlflow/runs/create")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with (
        serve(f"sqlite:///{tmp_path / 'm.db'}", port=port, log=tmp_path / "server.log") as server,
        forgetful(port, *made, slow=slow) as uri,
    ):
        server.wait_ready(120)
        tracker = folder.tracker(uri=uri)
        writer.step(rows(1, 3))
        tracker.update(folder.trials, [folder.trials[0].id])
        wait_for(lambda: num_runs(server.url, "two") > 1)
        folder.end(folder.trials[0], "completed", 0.2, step=3)
        tracker.update(folder.trials, [])
        assert tracker.close(patience_s=120), tracker.trouble
        seen = content(server.url, "two")
    assert {run["status"] for run in seen.values()}.isdisjoint({"RUNNING", "SCHEDULED"})


@pytest.mark.parametrize(("answer", "said"), [("401", "asks who you are"), ("403", "not allow")])
def test_a_refusal_is_final_at_once(folder: Folder, answer: str, said: str) -> None:
    """It is said while the study runs, and its end does not wait for a server to think again."""
    writer = folder.attempt(folder.trials[0], 1)
    with broken_server(answer) as uri:
        tracker = folder.tracker(uri=uri)
        writer.step(rows(1, 3))
        tracker.update(folder.trials, [folder.trials[0].id])
        wait_for(lambda: tracker.trouble)
        begun = time.monotonic()
        assert tracker.close(patience_s=600) is False
        assert time.monotonic() - begun < 300.0
        assert said in str(tracker.trouble)


@pytest.mark.parametrize("answer", ["500", "never"])
def test_a_broken_server_holds_nothing_up(folder: Folder, answer: str) -> None:
    """Each update of 200 returns at once, and closing within its time; nothing is raised."""
    writer = folder.attempt(folder.trials[0], 1)
    with broken_server(answer) as uri:
        tracker = folder.tracker(uri=uri)
        slowest = 0.0
        for step in range(1, 201):
            writer.step(rows(step, step))
            begun = time.perf_counter()
            tracker.update(folder.trials, [folder.trials[0].id])
            slowest = max(slowest, time.perf_counter() - begun)
        if answer == "500":
            wait_for(lambda: tracker.trouble)
            assert "is behind" in str(tracker.trouble)
        begun = time.monotonic()
        assert tracker.close(patience_s=1.0) is False
        assert time.monotonic() - begun < 60.0
        assert tracker.trouble
    assert slowest < 5.0


def test_a_store_that_cannot_be_written_holds_nothing_up(folder: Folder, tmp_path: Path) -> None:
    """Also without any server: the trouble is told, and closing gives up in time."""
    (tmp_path / "file").write_text("in the way")
    tracker = folder.tracker(uri=f"sqlite:///{tmp_path}/file/mlflow.db")
    tracker.update(folder.trials, [])
    wait_for(lambda: tracker.trouble)
    assert tracker.close(patience_s=1.0) is False


_KILLED_IN_THE_TABLES = """
import os, signal, sys
import sqlalchemy
from ablate.tracking.mlflow.store import load_tables, one_at_a_time

@sqlalchemy.event.listens_for(sqlalchemy.engine.Engine, "after_cursor_execute")
def end(connection, cursor, statement, *rest):
    if statement.split()[:3] == ["CREATE", "TABLE", "jobs"]:
        os.kill(os.getpid(), signal.SIGKILL)

load_tables()
if sys.argv[2] == "ours":
    with one_at_a_time(sys.argv[1]):
        pass
else:
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
    SqlAlchemyStore(sys.argv[1], "/nowhere")
"""


def kill_in_the_tables(uri: str, creator: str) -> None:
    """Let a process create the store's tables, and kill it when one of the last stands."""
    code = subprocess.run(
        [sys.executable, "-c", _KILLED_IN_THE_TABLES, uri, creator],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        capture_output=True,
        check=False,
    )
    assert code.returncode == -signal.SIGKILL, code.stderr.decode()


@pytest.mark.parametrize("creator", ["ours", "mlflow"])
def test_a_kill_while_the_tables_are_created_costs_nothing(folder: Folder, creator: str) -> None:
    """The next launch makes the store whole, whoever had begun it."""
    folder.record.folder.mkdir(parents=True, exist_ok=True)
    uri = default_uri(folder.record.folder.parent)
    file = Path(uri.removeprefix("sqlite:///"))
    file.unlink()
    kill_in_the_tables(uri, creator)
    assert file.exists() == (creator == "mlflow")
    tracker = Tracker(folder.study, folder.record, score=score)
    tracker.update(folder.trials, [])
    assert tracker.close(patience_s=60), tracker.trouble
    assert MlflowClient(uri).get_experiment_by_name(folder.study.name) is not None
    assert not list(file.parent.glob("*.new*"))


def test_a_broken_store_with_runs_in_it_is_left_alone(tmp_path: Path) -> None:
    """What somebody has tracked is not ours to begin anew."""
    uri = default_uri(tmp_path)
    kill_in_the_tables(uri, "mlflow")
    file = Path(uri.removeprefix("sqlite:///"))
    with contextlib.closing(sqlite3.connect(file)) as connection:
        connection.execute("INSERT INTO experiments (experiment_id, name) VALUES (7, 'theirs')")
        connection.commit()
    with one_at_a_time(uri), contextlib.closing(sqlite3.connect(file)) as connection:
        [(name,)] = connection.execute("SELECT name FROM experiments WHERE experiment_id = 7")
    assert name == "theirs"


@pytest.mark.slow
@pytest.mark.drill
def test_a_server_that_dies_is_caught_up_with(
    folder: Folder, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A real server is killed in the middle and comes back: no point is missing or doubled.

    Nothing is printed meanwhile: standard output is for --json.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    store = f"sqlite:///{tmp_path / 'server' / 'mlflow.db'}"
    trial = folder.trials[0]
    name = "trial baseline · seed 0"
    writer = folder.attempt(trial, 1)
    server = serve(store, port=port, log=tmp_path / "server.log")
    try:
        server.wait_ready(120)
        check_doors(server.url, server.process.pid, port)
        tracker = folder.tracker(uri=server.url)
        writer.step(rows(1, 10))
        tracker.update(folder.trials, [trial.id])
        wait_for(lambda: mirrored_step(server.url, "two", name) == 10)
        server.close()

        slowest = 0.0
        for step in range(11, 60):
            writer.step(rows(step, step))
            begun = time.perf_counter()
            tracker.update(folder.trials, [trial.id])
            slowest = max(slowest, time.perf_counter() - begun)
        wait_for(lambda: tracker.trouble)
        folder.end(trial, "completed", 0.2, step=59)
        tracker.update(folder.trials, [])

        server = serve(store, port=port, log=tmp_path / "server.log")
        server.wait_ready(120)
        assert server.pages()["two"].startswith(f"{server.url}/#/experiments/")
        assert tracker.close(patience_s=120)
        assert tracker.trouble is None
        assert slowest < 5.0
        seen = content(server.url, "two")
        assert [step for step, *_ in seen[name]["metrics"]["train/loss"]] == list(range(1, 60))
        assert seen[name]["status"] == "FINISHED"
        assert capfd.readouterr().out == ""
        run_id = runs_in(server.url, "two")[name].info.run_id
        with urllib.request.urlopen(
            f"{server.url}/get-artifact?path=config.yaml&run_uuid={run_id}", timeout=30
        ) as answer:
            assert b"beta2: 0.999" in answer.read()
    finally:
        server.close()
    assert not psutil.pid_exists(server.process.pid)


def check_doors(url: str, pid: int, port: int) -> None:
    """Loopback only, no other host's name, no other page's requests."""
    processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    listening = {
        item.laddr
        for process in processes
        for item in process.net_connections()
        if item.status == psutil.CONN_LISTEN
    }
    assert listening == {("127.0.0.1", port)}

    def status(headers: Mapping[str, str], *, post: bool = False) -> int:
        target = f"{url}/api/2.0/mlflow/experiments/search" if post else url
        data = b'{"max_results": 1}' if post else None
        request = urllib.request.Request(target, data=data, headers=dict(headers))
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code

    json_type = {"Content-Type": "application/json"}
    assert status({}) == 200
    assert status({"Host": "evil.example"}) == 403
    assert status(json_type, post=True) == 200
    assert status({**json_type, "Origin": "http://evil.example"}, post=True) == 403


# --------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "mlruns",
        "file:///tmp/mlruns",
        "nosuch://host",
        "http://",
        "postgresql+nosuch://u:hunter2@h/db",
    ],
)
def test_a_uri_that_can_never_work_is_refused(folder: Folder, uri: str) -> None:
    """At once, with what to write instead, and without showing a password."""
    with pytest.raises(TrackingError, match="cannot be an MLflow tracking store") as error:
        folder.tracker(uri=uri)
    assert "hunter2" not in str(error.value)


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.0.7", "example.org"])
def test_the_page_is_not_served_beyond_loopback(tmp_path: Path, host: str) -> None:
    """MLflow asks nobody for a password, so nobody else may reach it."""
    with pytest.raises(TrackingError, match="loopback only"):
        serve("sqlite:///x.db", host=host, log=tmp_path / "log")
    assert list(tmp_path.iterdir()) == []


def test_a_taken_port_is_told(tmp_path: Path) -> None:
    """Another server that answers there must not be taken for ours."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(TrackingError, match=f"port {port} .* cannot be used.*--port"):
            serve("sqlite:///x.db", port=port, log=tmp_path / "log")


@pytest.mark.parametrize(
    "name",
    ["../secret", "/etc/passwd", "a/../../secret", "%2e%2e/secret", "a\0b", "x#y", "", ".", "link"],
)
def test_artifacts_are_plain_files_inside_the_folder(tmp_path: Path, name: str) -> None:
    """No name, and no link, leads out of the study folder."""
    inside = tmp_path / "study"
    inside.mkdir()
    (tmp_path / "secret").write_text("x")
    (inside / "link").symlink_to(tmp_path / "secret")
    (inside / "report.html").write_text("x")
    assert artifact_path(inside, name) is None
    assert artifact_path(inside, "report.html") == inside / "report.html"


# --------------------------------------------------------------------------- others around


def test_only_the_mirror_trusts_the_disk(tmp_path: Path) -> None:
    """Its transactions do not wait for the disk; those of any other database in the process do."""
    found = []
    for name in ("mlflow.db", "other.db"):
        uri = f"sqlite:///{tmp_path / name}"
        if name == "mlflow.db":
            with one_at_a_time(uri):
                pass
        engine = sqlalchemy.create_engine(uri)
        with engine.connect() as connection:
            found.append(connection.execute(sqlalchemy.text("PRAGMA synchronous")).scalar())
        engine.dispose()
    assert found == [1, 2]  # NORMAL, FULL


def test_studies_of_one_name_do_not_share_an_experiment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two folders whose studies have one name, in one store: neither sees or deletes the other's.

    A folder that moves stays who it is. Artifacts lie beside the store, not in the working
    directory.
    """
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    uri = f"sqlite:///{tmp_path}/shared.db"
    mine, theirs = Folder(tmp_path / "mine"), Folder(tmp_path / "theirs")
    mine.run(mine.trials[0], steps=3, value=0.2)
    theirs.run(theirs.trials[0], steps=5, value=0.3)

    def mirror(folder: Folder, record: StudyRecord, *, fresh: bool = False) -> None:
        tracker = Tracker(folder.study, record, score=score, uri=uri, fresh=fresh)
        tracker.update(folder.trials, [])
        assert tracker.close(patience_s=120), tracker.trouble

    mirror(mine, mine.record)
    mirror(theirs, theirs.record)
    names = {item.name for item in MlflowClient(uri).search_experiments()} - {"Default"}
    assert len(names) == 2 and "two" in names
    (other,) = names - {"two"}
    before = content(uri, "two")
    assert len(before["trial baseline · seed 0"]["metrics"]["train/loss"]) == 3
    assert len(content(uri, other)["trial baseline · seed 0"]["metrics"]["train/loss"]) == 5
    (tmp_path / "theirs").rename(tmp_path / "moved")
    mirror(theirs, StudyRecord(tmp_path / "moved/runs/two"), fresh=True)
    assert content(uri, "two") == before
    assert {item.name for item in MlflowClient(uri).search_experiments()} == {*names, "Default"}
    assert list((tmp_path / "elsewhere").iterdir()) == []
    assert len(list((tmp_path / "mlartifacts").glob("*/*/artifacts/trace.jsonl"))) == 3


def test_a_trials_setting_is_shown_whole(tmp_path: Path) -> None:
    """config.yaml is what trial.json asks for; the seeds of a cell differ in their seed alone."""
    mine = Folder(tmp_path / "mine")
    for trial in mine.trials[:3]:
        mine.run(trial, steps=3, value=0.2)
    tracker = Tracker(mine.study, mine.record, score=score, uri=f"sqlite:///{tmp_path}/shown.db")
    tracker.update(mine.trials, [])
    assert tracker.close(patience_s=120), tracker.trouble
    shown = [path.parent for path in (tmp_path / "mlartifacts").glob("*/*/artifacts/trial.json")]
    assert len(shown) == 3
    for place in shown:
        asked = json.loads((place / "trial.json").read_text(encoding="utf-8"))["config"]
        assert yaml.safe_load((place / "config.yaml").read_text(encoding="utf-8")) == asked


def test_views_that_mlflow_refuses_are_left_out(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The form of a saved view is MLflow's own business: without them everything else is there."""
    set_tag = MlflowClient.set_experiment_tag

    def refuse(self: MlflowClient, experiment: str, key: str, value: Any) -> None:
        if "sharedViewState" in key:
            raise MlflowException("no such thing", error_code=INVALID_PARAMETER_VALUE)
        set_tag(self, experiment, key, value)

    monkeypatch.setattr(MlflowClient, "set_experiment_tag", refuse)
    folder.run(folder.trials[0], steps=3)
    tracker = folder.tracker()
    tracker.update(folder.trials, [])
    assert tracker.close(patience_s=120)
    assert tracker.trouble is None
    assert content(folder.uri, "two")["trial baseline · seed 0"]["status"] == "FINISHED"
