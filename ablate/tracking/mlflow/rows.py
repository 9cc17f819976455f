"""Which rows of a trial's logs are mirrored, and as what.

What is mirrored of a long trace: every step up to 128, then every 2nd up to 256, every 4th up to
512 and so on (at least 64 points in the last half of any curve, 750 in all for 100,000 steps), and
besides the first and last step of every event and the last step of all. Evaluations, final values
and events are never thinned. What is told of a row is said in ``measures``; the whole trace is an
artifact of the trial.

The rule does not ask how busy the mirror is, so that what stands in MLflow is the same whenever it
was told. MLflow draws a few hundred numbers of a curve, and takes 0.06 to 0.13 ms of a core for
each (docs/measurements.md). The mirror takes half a core at most: 100 trials that begin together
with 10 rows of 20 numbers a second are told later than they happen for their first minutes.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlflow.entities as entities

from ablate.records.files import dumps, read_rows_from
from ablate.records.folder import TrialRecord

_WHOLE_STEPS = 128
"""Steps of a trace that are mirrored one by one; see the module's text for the rest."""

_UNWELCOME = re.compile(r"[^\w.\- :/]")


@dataclass(slots=True)
class TrialRun:
    """What is known of a trial's run, and how far it is mirrored."""

    run_id: str
    status: str
    artifact_uri: str = ""
    attempt: int = 0
    """Newest attempt that was looked at; `offsets` are of its logs."""
    step: int = -1
    """Last step of the trace that was looked at, and its attempt. Before any: a program may count
    from 0, and one that says nothing of steps is evaluated at 0."""
    step_attempt: int = 0
    eval_step: int = -1
    eval_attempt: int = 0
    offsets: dict[str, int] = field(default_factory=dict)
    """Bytes read of the newest attempt's logs."""
    events_seen: int = -1
    """Bytes of events.jsonl of all attempts at the last look."""
    shown: set[int] = field(default_factory=set)
    """Thinned-out steps that were mirrored because of an event."""
    described: bool = False
    """Its parameters are mirrored."""
    complete: bool = False
    tags: dict[str, str] = field(default_factory=dict)


def keeps(step: int) -> bool:
    """Whether the thinning rule keeps this step of a trace."""
    doublings = max(0, (step - 1).bit_length() - (_WHOLE_STEPS - 1).bit_length())
    return step % (1 << doublings) == 0


def new_rows(
    folder: TrialRecord, attempts: Sequence[int], run: TrialRun
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


def repeats(rows: Sequence[Mapping[str, Any]], run: TrialRun, *, step: int, attempt: int) -> bool:
    """Whether an attempt went again through steps that are mirrored already.

    `step` and `attempt` are those of the last row that is mirrored. Without offsets (after a
    restart) the rows hold what is mirrored, too.
    """
    return any(row["step"] <= step and (run.offsets or row["attempt"] > attempt) for row in rows)


def begun_at(folder: TrialRecord) -> float:
    """When the trial's first attempt took its first step (unix s); of one that ended before it,
    when it was started; else now."""
    for number in folder.attempts()[:1]:
        row = folder.first_row(number)
        if row is not None:
            return float(row.get("time") or time.time())
    outcome = folder.outcome()
    if outcome is not None:
        return float(outcome["time"]) - float(outcome.get("wall_s") or 0.0)
    return time.time()


def begun_first(folders: Iterable[TrialRecord]) -> float:
    """When the first of several trials began (unix s)."""
    return min(map(begun_at, folders), default=time.time())


def bytes_of_events(folder: TrialRecord, attempts: Sequence[int]) -> int:
    total = 0
    for number in attempts:
        with contextlib.suppress(FileNotFoundError):
            total += (folder.attempt_folder(number) / "events.jsonl").stat().st_size
    return total


def metrics_of(told: Mapping[str, float], row: Mapping[str, Any]) -> list[entities.Metric]:
    """What is told of `row` as MLflow metrics, at the row's own step and time, so that a second
    telling is the same."""
    when, step = milliseconds(row.get("time") or 0.0), int(row["step"])
    return [entities.Metric(plain_key(key), value, when, step) for key, value in told.items()]


def plain_key(name: str) -> str:
    """`name` as MLflow takes it for a metric, a parameter or a tag."""
    return _UNWELCOME.sub("_", name)[:250]


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(dumps(row) + "\n")


def milliseconds(seconds: float) -> int:
    return int(seconds * 1000)
