"""Which of a source's columns is which of our quantities, and records as rows.

No column is guessed twice: where two may be the same quantity, or none is the loss, the source is
refused with its columns named, and ``chosen`` (``--column loss=NAME``) says which is which.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ablate.markers.event import ACCURACY, number
from ablate.markers.foreign.evidence import HELD_OUT, is_empty, of_training, refuse_holes
from ablate.markers.foreign.run import NONE_KNOWN, Evaluated, ForeignError, Record, Source
from ablate.markers.foreign.steps import number_records, step_of, whole_step
from ablate.markers.rules import RULES

EXPECTED = ("loss", "grad_norm", "logit_scale", "lr")
"""What a foreign run should bring beside ``step`` and an accuracy; what it lacks is said."""

_MEASURED = {name for rule in RULES for name in rule.reads} - {ACCURACY} | {*EXPECTED, "samples"}
_NOISE = frozenset(
    "train training trainer global average avg mean reduced step metrics lm total running "
    "batch".split()
)
"""Words that say nothing about what a number is."""
_CORES = {
    frozenset({"loss"}): "loss",
    frozenset({"loss", "scale"}): "scaler_scale",
    frozenset({"grad", "norm"}): "grad_norm",
    frozenset({"gradient", "norm"}): "grad_norm",
    frozenset({"gradnorm"}): "grad_norm",
    frozenset({"gnorm"}): "grad_norm",
    frozenset({"lr"}): "lr",
    frozenset({"learning", "rate"}): "lr",
    frozenset({"logit", "scale"}): "logit_scale",
    frozenset({"scale"}): "logit_scale",
}
_SPREAD = ("__MIN", "__MAX")  # beside a column of a W&B panel
_OPTIMIZERS = frozenset(
    "adam adamw decoupledadamw sgd decoupledsgdw lars lamb lion rmsprop group0 pg1".split()
)
"""What stands beside ``lr`` where each optimizer, or the first of its groups, has a curve."""
_MANY, _FEW = 5, 1  # a column of one number beside one of many is a summary, no series
_MANY_REPEATS = 20  # a row in so many may repeat its step, as where a run was resumed


def quantity_of(name: str, evaluated: Evaluated = NONE_KNOWN) -> tuple[str | None, bool]:
    """(our name of a column or tag, whether it was measured on held-out data)."""
    name = name.strip().rsplit(" - ", 1)[-1]  # "<run> - <column>" of a W&B panel
    lower = re.sub(r" #\d+$", "", name.lower())  # a name that stands several times in a line
    if ours := evaluated.find(lower):
        return ours, False
    prefix, slash, _ = name.partition("/")
    grouped = f"{prefix}/" in _MEASURED or prefix == "grad_norm"
    if name in _MEASURED or (slash and grouped):
        return name, False
    bare = re.sub(r"^(train|training|val)/", "", lower)
    if ours := evaluated.find(bare):
        return ours, False
    if name.endswith(_SPREAD):
        return None, False
    words = [word for word in re.split(r"[^a-z0-9]+", lower) if word]
    core = frozenset(words) - _NOISE - HELD_OUT
    if "lr" in core:
        core -= _OPTIMIZERS
    return _CORES.get(core), bool(HELD_OUT & set(words))


def rows_of(source: Source, chosen: Mapping[str, str]) -> list[dict[str, Any]]:
    """The records as rows of ours; what was left out is added to the source's notes.

    Records of one step that have no quantity in common are one row: many trainers write training
    and validation on lines of their own.

    Raises:
        ForeignError: no loss; a quantity that two columns may be; a cell that is no number.
    """
    records = of_training(source)
    names = _filled(records)
    for quantity, name in chosen.items():
        if name not in names:
            raise ForeignError(
                f"--column {quantity}={name}: {source.place} has no such column; it has "
                f"{', '.join(names) or 'none'}"
            )
    step = chosen.get("step") or step_of(names)
    columns = _assign(source, names, {k: v for k, v in chosen.items() if k != "step"})
    if not {"loss", "grad_norm"} & set(columns.values()):
        raise ForeignError(_no_loss(source, names))
    evaluated = {
        name
        for name in names
        if quantity_of(name, source.evaluated)[1] or columns.get(name) in source.evaluated.names
    }
    for name, quantity in columns.items():
        if quantity == "loss":
            beside = evaluated - {name}
            refuse_holes(records, name, trained=set(columns) - evaluated, evaluated=beside)
    skipped = {step, "attempt", *columns}
    ignored = [
        name
        for name in names
        if name
        and name not in skipped
        and not name.endswith(_SPREAD)
        and not quantity_of(name, source.evaluated)[1]
    ]
    if ignored:
        source.notes.append("ignored columns: " + ", ".join(ignored))
    return _merged(source, records, step, columns)


def _filled(records: Sequence[Record]) -> dict[str, int]:
    """Column -> how many records have a value in it."""
    names: dict[str, int] = {}
    for record in records:
        for name, value in record.values.items():
            names[name] = names.get(name, 0) + (not is_empty(value))
    return names


def _assign(source: Source, names: Mapping[str, int], chosen: Mapping[str, str]) -> dict[str, str]:
    """Column -> quantity."""
    columns = {name: quantity for quantity, name in chosen.items()}
    candidates: dict[str, list[str]] = {}
    held_out = []
    for name in names:
        quantity, validation = quantity_of(name, source.evaluated)
        if validation:
            held_out.append(name)
        elif quantity is None or quantity in chosen or name in columns:
            continue
        else:
            candidates.setdefault(quantity, []).append(name)
    for quantity, found in candidates.items():
        most = max(names[name] for name in found)
        series = [name for name in found if most < _MANY or names[name] > _FEW]
        if len(series) > 1:
            raise ForeignError(
                f"{source.place}: {' and '.join(map(repr, series))} may both be {quantity}; say "
                f"which: --column {quantity}={series[0]!r}"
            )
        columns[series[0]] = quantity
    if held_out:
        source.notes.append(
            "measured on held-out data, and no part of the verdict: "
            + ", ".join(name + _holes(source.records, name, num=names[name]) for name in held_out)
        )
    return columns


def _holes(records: Sequence[Record], name: str, *, num: int) -> str:
    """How many of a column's values are no finite number, where some are."""
    found = [number(record.values.get(name)) for record in records]
    broken = sum(value is not None and not math.isfinite(value) for value in found)
    return f" ({broken} of {num} not finite)" if broken else ""


def _no_loss(source: Source, names: Mapping[str, int]) -> str:
    near = [name for name in names if "loss" in name.lower()]
    what = f"its columns are {', '.join(names)}" if any(names) else "it is empty"
    near = near or difflib.get_close_matches("loss", names, n=1)
    values = [name for name in names if name.rpartition("/")[2].lower() in ("value", "metricvalue")]
    hint = next(iter(near or values), "NAME")
    broken = [
        name
        for name in near
        if any(not math.isfinite(number(r.values.get(name)) or 0.0) for r in source.records)
    ]
    return (
        f"{source.place}: no loss was found, and without one there is no verdict; {what}. Call one "
        f"of them loss, or say which it is: --column loss={hint!r}"
        + (f" ({', '.join(broken)} has values that are not finite)" if broken else "")
    )


def _merged(
    source: Source, records: Sequence[Record], step: str | None, columns: Mapping[str, str]
) -> list[dict[str, Any]]:
    filled = [
        record
        for record in records
        if any(not is_empty(record.values.get(name)) for name in columns)
    ]
    rows: list[dict[str, Any]] = []
    repeated = 0
    for record, at in zip(filled, number_records(source, filled, step), strict=True):
        row: dict[str, Any] = {
            quantity: _cell(record.at, quantity, record.values[name])
            for name, quantity in columns.items()
            if not is_empty(record.values.get(name))
        }
        row["step"] = at
        if not is_empty(record.values.get("attempt")):
            row["attempt"] = whole_step(record.at, record.values["attempt"])
        before = rows[-1] if rows else {}
        if before.get("step") != row["step"]:
            rows.append(row)
        else:
            repeated += _contradicts(before, row)
            before.update(row)
    if repeated > max(_FEW, len(rows) // _MANY_REPEATS):
        raise ForeignError(
            f"{source.place}: {repeated} of {len(filled)} rows give another value for the step of "
            "the row before them: two series, of several processes or data sets, or steps that "
            "were not counted? Give the rows of one"
        )
    if repeated:
        source.notes.append(
            f"{repeated} lines repeat the step of the line before them; the later one counts"
        )
    return rows


def _contradicts(before: Mapping[str, Any], row: Mapping[str, Any]) -> bool:
    """Whether two rows of one step give a quantity different values."""
    return any(
        before[name] != row[name] and not (math.isnan(before[name]) and math.isnan(row[name]))
        for name in set(before) & set(row) - {"step", "attempt"}
    )


def _cell(at: str, quantity: str, value: Any) -> float:
    found = number(value.strip() if isinstance(value, str) else value)
    if found is None:
        raise ForeignError(
            f"{at}: {quantity} is {str(value).strip()!r}, not a number; leave the cell empty where "
            "nothing was measured (nan and inf are numbers)"
        )
    return found
