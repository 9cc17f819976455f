"""Tables: CSV as people and trackers write it, and parquet."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ablate.markers.event import number
from ablate.markers.foreign.run import ForeignError, Record, Source
from ablate.markers.foreign.steps import Point, in_order, whole_step
from ablate.records.source import at_header, read_csv

_MLFLOW = {"key", "value", "step"}
_COMET = {"metricName": "key", "metricValue": "value"}
TENSORBOARD = ("Wall time", "Step", "Value")
"""The columns of TensorBoard's own export of a scalar."""


def read_table(place: Path, text: str) -> Source:
    """A CSV with a header: a column a quantity, or MLflow's and TensorBoard's export.

    Raises:
        ForeignError: no rows, a column that stands twice, several runs in one table.
    """
    text, header, delimiter = at_header(_without_rules(text), delimiters=",;|\t")
    plain = header.rstrip("\r").replace("\t", " ")
    if not plain.isprintable() or plain.count("\ufffd") * 3 > len(plain):
        raise ForeignError(f"{place}: no loss was found, and no verdict; it is no text")
    if "loss" in header.lower().split() and not re.search("[,;|\t]", header):
        text = re.sub(r"[ ]+", ",", re.sub(r"(?m)^ +| +$", "", text))  # columns between blanks
    reader = read_csv(text, place, delimiter=delimiter, error=ForeignError)
    names = [cell.strip() for cell in next(reader, (1, []))[1]]
    twice = sorted({name for name in names if name and names.count(name) > 1})
    if twice:
        places = [k for k, name in enumerate(names, start=1) if name == twice[0]]
        raise ForeignError(
            f"{place}: the column {twice[0]} stands twice, at {' and '.join(map(str, places))}; "
            "give each a name of its own"
        )
    records = []
    for line, cells in reader:
        if delimiter == ";":  # where the semicolon divides, the comma is the decimal point
            cells = [
                re.sub(r"^(-?\d+),(\d+(?:[eE][-+]?\d+)?)$", r"\1.\2", c.strip()) for c in cells
            ]
        if any(map(str.strip, cells[len(names) :])):
            raise ForeignError(
                f"{place}:{line}: {len(cells)} cells where the header names {len(names)} columns; "
                "write numbers with a point (0.25), or divide columns by semicolons"
            )
        records.append(Record(f"{place}:{line}", dict(zip(names, cells, strict=False))))
    if names and not records:
        raise ForeignError(f"{place} has a header but no rows; give a line for each step")
    return Source(str(place), in_columns(place, records))


def _without_rules(text: str) -> str:
    """The rows of a Markdown table, as model cards have them, without what is drawn around them."""
    lines = text.split("\n")
    if not any(re.fullmatch(r"\s*\|?(?:\s*:?-+:?\s*\|)+[\s:-]*", line) for line in lines[:20]):
        return text
    bars = [line.strip() for line in lines]
    kept = [line[1:-1] if line[:1] == line[-1:] == "|" else line for line in bars]
    return "\n".join("" if not re.search(r"[^\s|:-]", line) else line for line in kept)


def in_columns(place: Path, records: list[Record]) -> list[Record]:
    """The records with a column a quantity, where trackers export a line a value."""
    names = set(records[0].values) if records else set()
    if names >= {*_COMET, "step"}:
        records = [
            Record(r.at, {_COMET.get(name, name): value for name, value in r.values.items()})
            for r in records
        ]
        names = names - set(_COMET) | _MLFLOW
    if names >= _MLFLOW:
        return _one_run(place, records)
    return _named(place, records) if names == set(TENSORBOARD) else records


def read_parquet(place: Path) -> Source:
    """A table of the same kinds.

    Raises:
        ForeignError: pyarrow is not installed, or the file is cut.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ForeignError(
            f"reading {place} needs the pyarrow package: pip install pyarrow; or write it as CSV"
        ) from error
    try:
        rows: Sequence[dict[str, Any]] = parquet.read_table(place).to_pylist()
    except pyarrow.ArrowException as error:
        raise ForeignError(f"{place} is no whole parquet file ({error})") from None
    return Source(str(place), [Record(f"{place}:{k}", row) for k, row in enumerate(rows, start=1)])


def _one_run(place: Path, records: list[Record]) -> list[Record]:
    """MLflow's long form, a line for each metric and step."""
    runs = sorted({str(record.values.get("run_id", "")) for record in records})
    if len(runs) > 1:
        raise ForeignError(f"{place} holds {len(runs)} runs ({', '.join(runs[:5])}); give one")
    series: dict[str, list[Point]] = {}
    for record in records:
        values = record.values
        value = number(values["value"])
        if value is None:
            raise ForeignError(f"{record.at}: value is {values['value']!r}, not a number")
        point = whole_step(record.at, values["step"]), value
        series.setdefault(str(values["key"]), []).append(point)
    return in_order(series, str(place))


def _named(place: Path, records: list[Record]) -> list[Record]:
    """TensorBoard's own export of one scalar, whose tag stands in the file's name at best."""
    _, tag, name = place.stem.rpartition("tag-")
    if not tag:
        return [
            Record(r.at, {key: value for key, value in r.values.items() if key != "Wall time"})
            for r in records
        ]
    return [Record(r.at, {"step": r.values["Step"], name: r.values["Value"]}) for r in records]
