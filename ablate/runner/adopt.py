"""Runs made elsewhere as the trials of a study folder: the records that our own would have left.

The markers judge the curves that were logged; what nobody logged is missing, and is made up by
nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ablate.analysis.results import is_score
from ablate.errors import RecordError
from ablate.markers import Context, Thresholds
from ablate.markers.judge import judge
from ablate.records.attempt import AttemptWriter
from ablate.records.folder import StudyRecord
from ablate.runner.attempts import write_end, write_outcome
from ablate.runner.endings import outcome_of
from ablate.runner.tenant import write_study
from ablate.study import Study
from ablate.study.elsewhere import Made
from ablate.trial.identity import Trial


def adopt(
    study: Study,
    record: StudyRecord,
    runs: Sequence[Made],
    trials: Sequence[Trial],
    *,
    source: str,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write the study folder: `trials` are the places of `runs`, one each.

    Raises:
        RecordError: there is a study already.
    """
    if record.study() is not None:
        raise RecordError(
            f"{record.folder} holds a study; give the import another name with --name, or remove it"
        )
    write_study(study, record)
    for number, (run, trial) in enumerate(zip(runs, trials, strict=True), start=1):
        _write(study, record, run, trial, source=source)
        tell(number, len(runs))


def _write(study: Study, record: StudyRecord, run: Made, trial: Trial, *, source: str) -> None:
    origin = {"source": source, "run": run.name, "notes": list(run.notes)}
    folder = record.write_trial({**trial.to_json(), "fingerprint": {}, "origin": origin})
    number = record.new_attempt(folder)
    writer = AttemptWriter(folder.folder, number)
    writer.step({**row, "attempt": number} for row in run.rows)
    result = _result(study, run, writer)
    for row in _evaluations(run, study.objective.metric, last=result["step"]):
        writer.evaluation({**row, "attempt": number})
    writer.result(result)
    writer.close()
    write_end(record, folder, number, kind="ended", detail="made elsewhere", wall_s=run.wall_s)
    write_outcome(
        record, folder, workers=study.gang.workers, **outcome_of(result, study.objective.metric)
    )


def _evaluations(run: Made, metric: str, *, last: int) -> list[Mapping[str, Any]]:
    """The course of the metric; its last value alone where no course was logged."""
    if metric not in run.values:
        return []
    course = [row for row in run.curves if metric in row]
    if course and course[-1][metric] == run.values[metric]:
        return course
    return [*course, {"step": last, metric: run.values[metric]}]


def _result(study: Study, run: Made, writer: AttemptWriter) -> dict[str, Any]:
    said: dict[str, Any] = {}
    if run.rows:
        context = Context(**run.about)
        found = judge(run.rows, thresholds=Thresholds(study.markers), context=context)
        for event in found.events:
            writer.event(event.to_dict())
        verdict = found.verdict
        said = {
            "verdict": verdict.called,
            "flags": list(verdict.flags),
            "markers": verdict.to_dict(),
            "context": asdict(context),
        }
    steps = [int(row["step"]) for row in (*run.rows, *run.curves)]
    value = run.values.get(study.objective.metric)
    lost = run.outcome == "completed" and value is not None and not is_score(value)
    return {
        "status": "diverged" if lost else run.outcome,
        "reason": f"made elsewhere: {run.name}",
        "step": max(steps, default=0),
        "steps_total": None,
        "final": dict(run.values),
        "best": {},
        "wall_s": run.wall_s,
        **said,
    }
