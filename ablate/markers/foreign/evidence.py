"""Which records speak of training, and whether the loss is there as long as training goes on."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from statistics import median
from typing import Any

from ablate.markers.event import number
from ablate.markers.foreign.run import ForeignError, Record, Source

HELD_OUT = frozenset({"val", "valid", "validation", "eval", "evaluation", "test", "dev"})
"""Words for data that are not trained on."""
_PARTS = frozenset("mode split phase stage set subset partition dataset type".split())
"""Columns that say in a word which data a line was measured on."""
_EMPTY = frozenset({"", "none", "null", "<na>", "n/a", "na", "-", "--", "no log"})
"""What programs write where there is no value. Whether that was nan is asked by `refuse_holes`."""
_HOLE = 5
"""Records without a loss, beyond what lies between two losses anyway, that are a hole."""


def is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, str) and value.strip().lower() in _EMPTY)


def refuse_no_course(place: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Raise ForeignError where finite losses are no course of a training: a summary of one row, or
    one number throughout, without a gradient norm that would say more."""
    losses = [row["loss"] for row in rows if "loss" in row]
    if not losses or not all(map(math.isfinite, losses)) or any("grad_norm" in r for r in rows):
        return
    if len(losses) == 1:
        raise ForeignError(
            f"{place}: one row with a loss is the summary of a run and not its course; give "
            "a row for each step or epoch"
        )
    if len(set(losses)) == 1:
        raise ForeignError(
            f"{place}: loss is {losses[0]:g} in each of its {len(losses)} rows: it was not "
            "trained, or this is no loss; say which column is: --column loss=NAME"
        )


def of_training(source: Source) -> list[Record]:
    """The records without those that say that they were measured on held-out data."""
    kept, parts = [], set[str]()
    for record in source.records:
        part = _held_out_part(record)
        if part is None:
            kept.append(record)
        else:
            parts.add(part)
    if parts:
        left = len(source.records) - len(kept)
        source.notes.append(
            f"{left} rows were measured on held-out data ({', '.join(sorted(parts))}), and are no "
            "part of the verdict"
        )
    return kept


def _held_out_part(record: Record) -> str | None:
    for name, value in record.values.items():
        if name.strip().lower() in _PARTS and isinstance(value, str):
            if HELD_OUT & set(re.split(r"[^a-z]+", value.lower())):
                return f"{name}={value.strip()}"
    return None


def refuse_holes(
    records: Sequence[Record], loss: str, *, trained: Collection[str], evaluated: Collection[str]
) -> None:
    """Raise ForeignError where the loss is missing while training goes on.

    pandas, parquet and many writers of JSON leave a cell empty that was not a number, and
    Megatron-LM prints no loss there. Lines with a column of `evaluated` lack a loss rightly, and
    those in which another column of `trained` is not finite say what happened.
    """
    asked = [
        record
        for record in records
        if not is_empty(record.values.get(loss))
        or all(is_empty(record.values.get(name)) for name in evaluated)
    ]
    there = [
        k
        for k, record in enumerate(asked)
        if not is_empty(record.values.get(loss))
        or any(not math.isfinite(number(record.values.get(name)) or 0.0) for name in trained)
    ]
    apart = [b - a for a, b in zip(there, [*there[1:], len(asked)], strict=False)]
    for begin, gap in zip(there, apart, strict=False):
        if gap - 1 >= _HOLE + 2 * median(apart):
            raise ForeignError(
                f"{asked[begin + 1].at}: {loss} is empty here and in the {gap - 2} rows that "
                "follow: was it nan, which many programs write as an empty cell? Write nan there, "
                "or leave out rows in which nothing was measured"
            )
