"""The same markers over a finished trace: what a monitor would have said, row by row."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ablate.markers.event import Context, Event
from ablate.markers.monitor import Monitor, Verdict
from ablate.markers.thresholds import Thresholds

Measured = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Judgement:
    """A verdict with its events, and what could not be judged."""

    verdict: Verdict
    events: Sequence[Event]
    missing: Mapping[str, Sequence[str]]
    """Marker -> inputs it did not have."""
    rows: int
    evaluations: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: what ``ablate markers --json`` prints."""
        verdict = self.verdict
        return {
            "verdict": verdict.called,
            "flags": list(verdict.flags),
            "stop": {"step": verdict.stop.step, "marker": verdict.stop.marker}
            if verdict.stop
            else None,
            "message": verdict.message,
            "events": [item.to_dict() for item in self.events],
            "silent": list(verdict.silent),
            "missing": {marker: list(names) for marker, names in self.missing.items()},
            "rows": self.rows,
            "evaluations": self.evaluations,
            "thresholds": {name: dict(values) for name, values in verdict.thresholds.items()},
            "version": verdict.version,
        }


def judge(
    rows: Iterable[Measured],
    evaluations: Iterable[Measured] = (),
    *,
    thresholds: Thresholds | None = None,
    context: Context | None = None,
) -> Judgement:
    """Judge a trace by the rules that judge it live.

    Rows may come from several attempts and in any order (``settle``). Reading goes on after a
    stop, so that the events of a run that was not ended are all there.
    """
    steps, evals = settle(rows, evaluations)
    monitor = Monitor(thresholds, context)
    pending = iter([*evals, None])
    evaluation = next(pending)
    for row in steps:
        while evaluation is not None and evaluation["step"] < row["step"]:
            monitor.evaluate(evaluation)
            evaluation = next(pending)
        monitor.observe(row)
    while evaluation is not None:
        monitor.evaluate(evaluation)
        evaluation = next(pending)
    monitor.finish()
    return Judgement(
        verdict=monitor.verdict(),
        events=monitor.events,
        missing=monitor.missing(),
        rows=len(steps),
        evaluations=len(evals),
    )


def settle(
    rows: Iterable[Measured], evaluations: Iterable[Measured] = ()
) -> tuple[list[Measured], list[Measured]]:
    """Rows and evaluations of the course that the run finally took, in order of steps.

    An attempt resumes from a checkpoint and replays what came after it: from its first row on,
    whatever earlier attempts had measured is void, also beyond the last step it reached.
    """
    row_list, eval_list = list(rows), list(evaluations)
    begins: dict[int, int] = {}
    for row in row_list:
        attempt, step = int(row.get("attempt") or 0), int(row["step"])
        begins[attempt] = min(step, begins.get(attempt, step))
    ends: dict[int, int] = {}
    void_from: int | None = None
    for attempt in sorted(begins, reverse=True):
        if void_from is not None:
            ends[attempt] = void_from
        begin = begins[attempt]
        void_from = begin if void_from is None else min(void_from, begin)

    def kept(items: list[Measured]) -> list[Measured]:
        chosen: dict[int, Measured] = {}
        for item in sorted(items, key=lambda one: int(one.get("attempt") or 0)):
            attempt, step = int(item.get("attempt") or 0), int(item["step"])
            if attempt not in ends or step < ends[attempt]:
                chosen[step] = item
        return [chosen[step] for step in sorted(chosen)]

    return kept(row_list), kept(eval_list)
