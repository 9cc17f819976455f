"""The optimizer step of every record of a source: counted on over epochs, refused where unclear."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from ablate.markers.event import number
from ablate.markers.foreign.run import ForeignError, Record, Source

_STEPS = (
    "step", "steps", "iteration", "iterations", "iter", "iters", "num updates", "update", "updates",
)  # fmt: skip
"""Names of the optimizer step, the likeliest first, without the words of `_BESIDE`."""
_BESIDE = frozenset("train training trainer global optimizer completed current".split())
_TRACKER = "_step"
"""W&B's count of the lines it was told, which is the optimizer's step where no other column is."""
_EPOCHS = ("epoch", "train epoch", "trainer/epoch")
_MOST = 2**53  # beyond it a float skips whole numbers
_FEW_RESUMES = 4
"""A run that was resumed goes back in fewer than one of so many of its rows."""

Point = tuple[int, float]


def step_of(names: Mapping[str, int]) -> str | None:
    """Which column holds the step; `names`: how many values each column has.

    Of those with the most values the likeliest, so that a column of rare steps is none.
    """
    ranks = {name: _rank(name) for name, filled in names.items() if filled}
    found = [name for name, rank in ranks.items() if rank < len(_STEPS)]
    most = max((names[name] for name in found), default=0)
    usual = [name for name in found if names[name] == most]
    return min(
        usual, key=lambda name: (name.strip().lower() == _TRACKER, ranks[name]), default=None
    )


def _rank(name: str) -> int:
    words = [word for word in re.split(r"[^a-z0-9]+", name.lower()) if word]
    core = " ".join(word for word in words if word not in _BESIDE)
    return _STEPS.index(core) if core in _STEPS else len(_STEPS)


def number_records(source: Source, records: Sequence[Record], step: str | None) -> list[int]:
    """The step of each record.

    Only a step that goes back is a resume. One that begins anew with every epoch is counted on,
    and one that begins anew without an epoch is of another run.

    Raises:
        ForeignError: a step that is no whole number, several runs, rows in no order.
    """
    names = {name: 1 for record in records for name in record.values}
    epoch = _first(names, _EPOCHS)
    if step is None:
        passed = {_epoch(record, epoch) for record in records}
        each = ", one an epoch" if len(passed) == len(records) else ""
        source.notes.append(f"there is no column step: lines are numbered from 1 as steps{each}")
        return list(range(1, len(records) + 1))
    steps = [whole_step(record.at, record.values.get(step)) for record in records]
    back = [k for k in range(1, len(steps)) if steps[k] < steps[k - 1]]
    if not back or "attempt" in names:
        return steps
    epochs = [_epoch(record, epoch) for record in records]
    if any(epochs[k] > epochs[k - 1] for k in back):
        return _counted_on(source, steps, epochs, epoch or "")
    again = next((k for k in back if steps[k] <= min(steps[:k])), None)
    if again is not None:
        raise ForeignError(
            f"{records[again].at}: step begins anew at {steps[again]}: several runs in one source, "
            "or steps of an epoch each, or rows from the last to the first? Give the rows of one "
            "run in their order, numbered through, or with a column epoch"
        )
    if len(back) * _FEW_RESUMES > len(steps) and len(back) > 2:
        raise ForeignError(
            f"{source.place}: step goes back in {len(back)} of {len(steps)} rows, first at "
            f"{records[back[0]].at}; sort the rows by step"
        )
    return steps


def in_order(series: Mapping[str, Sequence[Point]], place: str) -> list[Record]:
    """Records of series that were written one after another, each a list of (step, value).

    Where a step of a series goes back it was resumed; a step that stands twice stays twice.
    """
    found: dict[tuple[int, int, int], dict[str, Any]] = {}
    for name, points in series.items():
        attempt, same, before = 1, 0, -1
        for step, value in points:
            attempt += step < before
            same = same + 1 if step == before else 0
            before = step
            found.setdefault((attempt, step, same), {"step": step})[name] = value
    return [Record(f"{place}: step {key[1]}", found[key]) for key in sorted(found)]


def whole_step(at: str, value: Any) -> int:
    text = str(value).strip()
    if re.fullmatch(r"\d{1,3}(,\d{3})+", text):
        text = text.replace(",", "")
    found = number(text)
    if found is None or not math.isfinite(found):
        raise ForeignError(f"{at}: step is {text!r}, not a number; number the steps from 1")
    if abs(found) >= _MOST:
        raise ForeignError(f"{at}: step is {text}, more than any run has: is it a time?")
    if found != int(found):
        raise ForeignError(
            f"{at}: step is {text}, no whole number: is it an epoch? Give the optimizer's steps, "
            "or say which column has them: --column step=NAME"
        )
    return int(found)


def _first(names: Mapping[str, int], wanted: Sequence[str]) -> str | None:
    by_lower = {name.strip().lower(): name for name in names if names[name]}
    return next((by_lower[name] for name in wanted if name in by_lower), None)


def _epoch(record: Record, column: str | None) -> int:
    found = number(record.values.get(column)) if column else None
    return math.floor(found) if found is not None and math.isfinite(found) else 0


def _counted_on(
    source: Source, steps: Sequence[int], epochs: Sequence[int], column: str
) -> list[int]:
    """Steps that begin anew with every epoch, counted on by the length of the longest one."""
    apart = [b - a for a, b in zip(steps, steps[1:], strict=False) if b > a]
    length = max(steps) - min(steps) + (round(median(apart)) if apart else 1)
    source.notes.append(
        f"steps begin anew with every {column}: counted on, {length} to one of them"
    )
    first = min(epochs)
    return [step + (at - first) * length for step, at in zip(steps, epochs, strict=True)]
