"""What all sources need once their columns are known: temperature, accuracy, attempts, interval."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

from ablate.markers.event import Context
from ablate.markers.foreign.columns import EXPECTED
from ablate.markers.foreign.run import Evaluated, Foreign

_LOG_LIMIT = math.log(100.0) + 0.1  # the parameter is clamped to ln 100 = 4.605


def finish(
    rows: list[dict[str, Any]],
    notes: list[str],
    context: Context,
    evaluated: Evaluated,
    evaluations: Iterable[Mapping[str, Any]] | None = None,
) -> Foreign:
    """What all sources need: temperature, accuracy, attempts, interval, and what is missing."""
    _unlog_scale(rows, notes)
    _number_attempts(rows, notes)
    evals = [dict(item) for item in evaluations or ()] or list(_split_evaluations(rows, evaluated))
    _as_fractions(evals, evaluated.fractions, notes)
    present = {name for row in (*rows, *evals) for name in row}
    missing = [name for name in (*EXPECTED, *evaluated.accuracies) if name not in present]
    if missing:
        notes.append("missing: " + ", ".join(missing))
    steps = sorted({row["step"] for row in rows})
    apart = [after - before for before, after in zip(steps, steps[1:], strict=False)]
    interval = max(1, round(median(apart))) if apart else 1
    if interval > 1:
        notes.append(
            f"there is a row every {interval} steps only: what happens between them is not seen"
        )
    accuracy = next((name for name in evaluated.accuracies if name in present), None)
    context = replace(context, row_interval=interval, accuracy=context.accuracy or accuracy)
    if context.steps_total is None and steps:
        context = replace(context, steps_total=max(1, steps[-1]))
    return Foreign(rows, evals, context, notes)


def _unlog_scale(rows: list[dict[str, Any]], notes: list[str]) -> None:
    """Our temperature is exp of the parameter; a parameter never exceeds ln 100."""
    scales = [row["logit_scale"] for row in rows if math.isfinite(row.get("logit_scale", math.nan))]
    if not scales or max(scales) > _LOG_LIMIT:
        return
    for row in rows:
        if "logit_scale" in row:
            row["logit_scale"] = math.exp(row["logit_scale"])
    notes.append(
        f"logit_scale never exceeds {max(scales):.3g}: taken as the logarithm, and exponentiated"
    )


def _number_attempts(rows: list[dict[str, Any]], notes: list[str]) -> None:
    """Steps that go back were replayed after a resume."""
    if any("attempt" in row for row in rows):
        return
    attempt, before = 1, -math.inf
    for row in rows:
        attempt += row["step"] < before
        before = row["step"]
        row["attempt"] = attempt
    if attempt > 1:
        notes.append(f"steps go back {attempt - 1} times: taken as resumed, the later rows count")


def _split_evaluations(
    rows: list[dict[str, Any]], evaluated: Evaluated
) -> Iterator[dict[str, Any]]:
    """Accuracies as rows of their own; one that is repeated on every row counts once."""
    told: dict[str, Any] = {}
    accuracies = set(evaluated.accuracies)
    filled = sum(not accuracies.isdisjoint(row) for row in rows) > len(rows) / 2
    for row in rows:
        found = {name: row.pop(name) for name in evaluated.names if name in row}
        if not accuracies.isdisjoint(found) and not (filled and found == told):
            told = found
            yield {"step": row["step"], "attempt": row["attempt"], **found}


def _as_fractions(
    evaluations: list[dict[str, Any]], names: Sequence[str], notes: list[str]
) -> None:
    values = [item[name] for item in evaluations for name in names if name in item]
    if not any(value > 1.0 for value in values):
        return
    for item in evaluations:
        item.update({name: item[name] / 100.0 for name in names if name in item})
    notes.append("accuracies above 1 are taken as per cent")
