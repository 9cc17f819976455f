"""A table with a row for each run, as W&B, MLflow, Optuna and pandas export it; CSV or parquet.

Settings are the columns that say so (``config.lr``, ``params.lr``, ``params_lr``), or those that
are named as factors: W&B's own export mixes settings and measurements.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ablate.errors import AnalysisError
from ablate.markers.foreign.evidence import is_empty
from ablate.records.source import at_header, read_csv, read_text
from ablate.study.elsewhere import ENDED, Made, flat, number

SETTING = ("config.", "config/", "params.", "params_", "param.", "hparams.")
MEASURED = ("summary.", "summary/", "metrics.", "metric.", "user_attrs_")
_NAMES = ("name", "run_name", "tags.mlflow.runname", "display_name", "run_id", "id", "number")
_STATES = ("state", "status", "outcome")


def read_runs(file: Path, *, metric: str, factors: Sequence[str] = ()) -> list[Made]:
    """The runs that have ended.

    Raises:
        AnalysisError: no column is known to be a setting, the metric's holds text, or the file is
            no table.
    """
    rows = list(_parquet(file) if file.suffix == ".parquet" else _csv(file))
    if not rows:
        raise AnalysisError(f"{file} has no rows; give a row for each run")
    columns = dict.fromkeys(name for row in rows for name in row)
    if missing := [name for name in factors if name not in map(bare, columns)]:
        raise AnalysisError(
            f"{file} has no column {', '.join(missing)}; it has {', '.join(columns)}"
        )
    if not factors and not any(name.startswith(SETTING) for name in columns):
        no_setting = (*_NAMES, *_STATES)
        others = (name for name in columns if name != metric and name.lower() not in no_setting)
        raise AnalysisError(
            f"{file} does not say which columns are settings; name each of them: "
            f"--factor {shlex.quote(next(others, 'NAME'))}. Its columns: {', '.join(columns)}"
        )
    _refuse_text(file, rows, [name for name in columns if bare(name) == metric])
    return [made for place, row in enumerate(rows, 1) if (made := _made(row, place, factors))]


def _refuse_text(file: Path, rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    """A cell of the metric's that is neither a number nor empty would be a run without a result."""
    for place, row in enumerate(rows, 1):
        for name in names:
            value = row.get(name)
            if not is_empty(value) and isinstance(number(value), str | bool):
                raise AnalysisError(
                    f"{file}: {name} is {value!r} in row {place}, which is no number; write it "
                    "as one, like 51.2, and leave the cell empty where nothing was measured"
                )


def bare(column: str) -> str:
    """A column's name without what says that it is a setting or a measurement."""
    start = next((mark for mark in (*SETTING, *MEASURED) if column.startswith(mark)), "")
    return column.removeprefix(start)


def _made(row: Mapping[str, Any], place: int, factors: Sequence[str]) -> Made | None:
    by_lower = {name.lower(): value for name, value in row.items()}
    state = next((str(by_lower[name]).lower() for name in _STATES if by_lower.get(name)), "")
    outcome = ENDED.get(state.removeprefix("trialstate.")) if state else "completed"
    if outcome is None:
        return None
    named = next((str(by_lower[name]) for name in _NAMES if by_lower.get(name) is not None), None)
    settings = {
        bare(name): value
        for name, value in row.items()
        if name.startswith(SETTING) or bare(name) in factors
    }
    values = {
        bare(name): float(value)
        for name, text in row.items()
        if bare(name) not in settings and type(value := number(text)) in (int, float)
    }
    return Made(name=named or f"row {place}", settings=settings, values=values, outcome=outcome)


def _csv(file: Path) -> Iterator[dict[str, Any]]:
    text, _, delimiter = at_header(read_text(file, error=AnalysisError))
    lines = read_csv(text, file, error=AnalysisError, delimiter=delimiter)
    header = [name.strip() for name in next(lines, (1, []))[1]]
    for _, cells in lines:
        yield dict(zip(header, cells, strict=False))


def _parquet(file: Path) -> Iterator[dict[str, Any]]:
    """Columns that hold mappings, as W&B's API gives config and summary, are spread out."""
    import pyarrow
    from pyarrow import parquet

    try:
        rows = parquet.read_table(file).to_pylist()
    except pyarrow.ArrowException as error:
        raise AnalysisError(f"{file} is no whole parquet file ({error})") from None
    for row in rows:
        spread: dict[str, Any] = {}
        for name, value in row.items():
            inner = _mapping(value) if name in ("config", "summary") else None
            spread |= {f"{name}.{key}": item for key, item in flat(inner or {}).items()}
            if inner is None:
                spread[name] = value
        yield spread


def _mapping(value: Any) -> Mapping[str, Any] | None:
    if isinstance(value, str) and value.startswith("{"):
        value = json.loads(value)
    return value if isinstance(value, Mapping) else None
