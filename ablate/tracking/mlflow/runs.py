"""What a run should show, from what is known: tags, parameters and numbers; nothing is asked."""

from __future__ import annotations

import contextlib
import getpass
import math
import os
import re
import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from statistics import fmean
from typing import Any

import mlflow.entities as entities

from ablate import __version__
from ablate.analysis.results import Result
from ablate.records.folder import StudyRecord, TrialRecord
from ablate.records.masking import masked
from ablate.report.bundle import leave_defaults_out
from ablate.study import Study
from ablate.tracking.mlflow.measures import Measures, short
from ablate.tracking.mlflow.rows import (
    TrialRun,
    bytes_of_events,
    keeps,
    metrics_of,
    milliseconds,
    new_rows,
    plain_key,
    repeats,
)
from ablate.tracking.mlflow.views import compares
from ablate.trial.identity import Levels, Outcome, Trial
from ablate.trial.recipe import load

PROGRESS = "mlflow.ablate.mirrored"
"""Tag that says how far a run is mirrored; MLflow's page hides tags whose name begins so."""
COMPLETE = "complete"
"""Its value where there is nothing more to come."""
CELL = "mlflow.ablate.cell"
"""Tag that says which cell a run is of."""
TOLD_AS = ("mlflow.ablate.form", "2")
"""Tag of every run: the form in which it is told. What has another one is told anew."""

STATUS = {
    Outcome.COMPLETED: "FINISHED",
    Outcome.DIVERGED: "FAILED",  # red in the list; the tags tell what failed
    Outcome.PRUNED: "KILLED",
    Outcome.FAILED: "FAILED",
    Outcome.INFEASIBLE: "FAILED",
    Outcome.LOST: "FAILED",
}

_LONGEST = 5000
"""Characters of a tag that are told."""


@dataclass(frozen=True, slots=True)
class Ended:
    """A trial that has an outcome."""

    result: Result
    time: float
    """When it was recorded (unix s)."""
    score: float | None
    markers: tuple[str, ...] = ()
    """Names of the markers that saw something."""


@dataclass(slots=True)
class CellRun:
    """What is known of a cell's run."""

    run_id: str
    status: str
    seeds: int = 0
    """Seeds, counted from the first, whose mean is mirrored."""
    is_drawn: bool = False
    """Its curves are mirrored: they are of these seeds, and cannot be told again."""
    described: bool = False
    """Its parameters are mirrored."""
    tags: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class News:
    """What a trial's logs hold that its run does not."""

    run: TrialRun
    """The run as it will be when this has arrived."""
    metrics: list[entities.Metric]
    rows: bool
    """Whether the logs have grown."""


def recalled_trial(run: entities.Run) -> TrialRun:
    """What a trial's run says of how far it is mirrored."""
    tags = dict(run.data.tags)
    mirrored = tags.get(PROGRESS, "")
    if mirrored == COMPLETE:
        return TrialRun(run.info.run_id, run.info.status, complete=True)
    known = TrialRun(
        run.info.run_id,
        run.info.status,
        run.info.artifact_uri,
        described=bool(run.data.params),
        tags=tags,
    )
    if mirrored:
        numbers = [int(number) for number in re.findall(r"-?\d+", mirrored)]
        known.step_attempt, known.step, known.eval_attempt, known.eval_step = numbers
    return known


def recalled_cell(run: entities.Run) -> CellRun:
    """What a cell's run says of how far it is mirrored."""
    tags = dict(run.data.tags)
    seeds, _, drawn = tags.get(PROGRESS, "0").partition(" ")
    return CellRun(
        run.info.run_id,
        run.info.status,
        int(seeds),
        is_drawn=bool(drawn),
        described=bool(run.data.params),
        tags=tags,
    )


# --------------------------------------------------------------------------- tags


def study_tags(study: Study, record: StudyRecord) -> dict[str, str]:
    return {
        **_common("study"),
        "mlflow.source.name": f"ablate launch {study.source.path}",
        "mlflow.source.type": "LOCAL",
        "recipe": study.recipe,
        "design": study.design.name,
        "objective": study.objective.metric,
        "folder": f"{socket.gethostname()}:{record.folder.absolute()}",
        **_versions(),
    }


def cell_tags(study: Study, levels: Levels, *, name: str) -> dict[str, str]:
    return {**_common("cell"), CELL: name, "compares": _compares(study, levels)}


def trial_tags(study: Study, trial: Trial, content: Mapping[str, Any]) -> dict[str, str]:
    """Tags of a trial's run, from its trial.json. What can be searched for is there from the start:
    ``tags.x != 'y'`` leaves out runs without the tag."""
    commit = (content.get("fingerprint") or {}).get("git_commit")
    return {
        **_common("trial"),
        CELL: trial.cell.name,
        "compares": _compares(study, trial.cell.levels),
        "trial_id": trial.id,
        "outcome": "running",
        "verdict": "",
        "markers": "",
        **({"mlflow.source.git.commit": commit} if commit else {}),
    }


def _common(kind: str) -> dict[str, str]:
    return {
        "kind": kind,
        TOLD_AS[0]: TOLD_AS[1],
        "mlflow.source.name": "ablate",
        "mlflow.user": _user(),
    }


def _compares(study: Study, levels: Levels) -> str:
    usual = study.baseline_levels()
    return compares(study, [name for name, level in levels if level != usual[name]])


def final_tags(
    ended: Ended, outcome: Mapping[str, Any], learned: Mapping[str, Any] | None
) -> dict[str, str]:
    result = ended.result
    return {
        "outcome": result.outcome,
        "verdict": result.verdict,
        "flags": ", ".join(result.flags),
        "markers": ", ".join(ended.markers),
        "attempt": str(outcome.get("attempt", "")),
        "reason": str(outcome.get("reason") or ""),
        "learning": str((learned or {}).get("verdict", "")),
    }


def cell_state(ended: Sequence[Ended], *, running: int) -> dict[str, str]:
    """Tags of a cell's run that change: what came of its seeds, and what was seen in them."""
    outcomes = Counter(item.result.outcome for item in ended)
    counts = [f"{name} {count}" for name, count in sorted(outcomes.items())]
    if running:
        counts.append(f"running {running}")
    return {
        "outcome": ", ".join(counts) or "waiting",
        "markers": ", ".join(sorted({name for item in ended for name in item.markers})),
        "flags": ", ".join(sorted({flag for item in ended for flag in item.result.flags})),
    }


def cell_status(ended: Sequence[Ended], *, is_whole: bool, closing: bool) -> str:
    """Red where every seed diverged."""
    if not is_whole:
        return "KILLED" if closing else "RUNNING"
    diverged = all(item.result.outcome == Outcome.DIVERGED for item in ended)
    return "FAILED" if diverged else "FINISHED"


def progress_tag(run: TrialRun) -> dict[str, str]:
    """How far a run is mirrored, for whoever looks again."""
    return {PROGRESS: f"{run.step_attempt}:{run.step} {run.eval_attempt}:{run.eval_step}"}


def clean_tags(tags: Mapping[str, str]) -> dict[str, str]:
    return {plain_key(key): str(masked(key, value))[:_LONGEST] for key, value in tags.items()}


def changed_tags(tags: Mapping[str, str], known: Mapping[str, str]) -> dict[str, str]:
    """What differs from what is known to stand there; nothing is not told first."""
    return {k: v for k, v in clean_tags(tags).items() if known.get(k, "") != v}


# --------------------------------------------------------------------------- parameters


def setting_of(study: Study, levels: Levels) -> dict[str, Any]:
    """The parameters of a cell: its levels by their factors' names, then what differs from the
    recipe's defaults. All the rest is in config.yaml, among the artifacts."""
    named = dict(levels)
    config = study.config(study.cell(named), seed=study.seeds[0])
    changed = {
        name: value
        for name, value in leave_defaults_out(load(study.recipe).Config, config).items()
        if name not in ("seed", *named)
    }
    return {"cell": study.change_name(named), **named, **_said(changed)}


def _said(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` without what says nothing."""
    return {
        name: _said(value) if isinstance(value, Mapping) else value
        for name, value in config.items()
        if value is not None
    }


# --------------------------------------------------------------------------- numbers


def in_order_of_seeds(study: Study, trials: Sequence[Trial]) -> list[Trial]:
    """A cell's trials in the study's order of seeds; those of other seeds (tuning) come last."""
    place = {seed: number for number, seed in enumerate(study.seeds)}
    return sorted(trials, key=lambda trial: (place.get(trial.seed, len(place)), trial.seed))


def cell_numbers(
    counted: Sequence[Ended], *, known: int, measures: Measures
) -> list[entities.Metric]:
    """Mean, lowest and highest over the first seeds, told once for each number of seeds; the first
    `known` are there. The last that was told is what the page shows.

    In the order of seeds, whatever order they ended in, so that it can be told again; all at step
    0, where the page draws bars.
    """
    metrics: list[entities.Metric] = []
    for number in range(known + 1, len(counted) + 1):
        first = counted[:number]
        when = milliseconds(max(item.time for item in first)) + number
        scores = [measures.factor * item.score for item in first if item.score is not None]
        costs = [item.result.cost for item in first if item.result.cost is not None]
        numbers = {
            "seeds": float(number),
            "diverged": float(sum(item.result.outcome == Outcome.DIVERGED for item in first)),
        }
        if scores:
            numbers[measures.score] = fmean(scores)
            numbers[f"{measures.score}_low"] = min(scores)
            numbers[f"{measures.score}_high"] = max(scores)
        if costs:
            numbers["cost"] = fmean(costs)
        metrics += [entities.Metric(key, short(n), when, 0) for key, n in numbers.items()]
    return metrics


def read_news(
    folder: TrialRecord, attempts: Sequence[int], run: TrialRun, measures: Measures
) -> News | None:
    """Rows that are new; None when an attempt repeated mirrored steps, and the run begins anew.

    Of two attempts' rows at one step the later one counts.
    """
    trace, evals, offsets = new_rows(folder, attempts, run)
    if repeats(trace, run, step=run.step, attempt=run.step_attempt) or repeats(
        evals, run, step=run.eval_step, attempt=run.eval_attempt
    ):
        return None
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
    metrics = [metric for row in kept for metric in metrics_of(measures.of_step(row), row)]
    metrics += [m for row in evals for m in metrics_of(measures.of_evaluation(row), row)]
    return News(after, metrics, bool(trace or evals))


def final_numbers(
    ended: Ended,
    outcome: Mapping[str, Any],
    events: Sequence[Mapping[str, Any]],
    *,
    measures: Measures,
    workers: int,
) -> list[entities.Metric]:
    """What a trial's run says at its end, all at step 0, where the page draws bars."""
    objective, factor = measures.study.objective, measures.factor
    best = (outcome.get("best") or {}).get(objective.metric)
    worked_s = outcome.get("worker_s", (outcome.get("wall_s") or 0.0) * workers)
    final = {
        measures.score: None if ended.score is None else factor * ended.score,
        measures.best: None if best is None else factor * best,
        "markers": len(events),
        "first_marker_step": min((event["first_step"] for event in events), default=None),
        "gpu_hours": worked_s / 3600,
        "peak_memory_gib": outcome.get("peak_memory_gib"),
        "cost": ended.result.cost,
    }
    when = milliseconds(ended.time)
    return [
        entities.Metric(name, short(value), when, 0)
        for name, value in final.items()
        if isinstance(value, (int, float)) and math.isfinite(value)
    ]


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
