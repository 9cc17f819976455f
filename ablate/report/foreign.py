"""Results made elsewhere: `ablate analyze RESULTS.csv` judges them as if we had run them.

A CSV file with the columns factor, level, seed, value, outcome: one line per run, one factor
changed at a time, as people, spreadsheets, pandas and trackers write it. The baseline's lines have
`baseline` as factor and as level. `outcome` may be missing or empty for completed runs; `value` may
be empty for runs that did not complete.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ablate.analysis.analysis import Analysis, analyze_results
from ablate.analysis.answer import plain
from ablate.analysis.results import OUTCOMES, Objective, Result, is_score
from ablate.errors import AnalysisError
from ablate.records.names import find_fault, look_of
from ablate.records.source import at_header, read_csv, read_text

if TYPE_CHECKING:
    import pandas as pd

Levels = tuple[tuple[str, str], ...]
"""A cell: every factor with its level."""
BASELINE = "baseline"
REQUIRED = ("factor", "level", "seed", "value")
OUTCOME = "outcome"
OPTIONAL = (OUTCOME, "trial_id")
STATES = ("state", "status")
"""What trackers call the outcome of a run."""
SYNONYMS = {
    **dict.fromkeys(("finished", "complete", "success", "succeeded"), "completed"),
    **dict.fromkeys(("fail", "crashed", "killed", "error", "preempted"), "failed"),
}
UNENDED = ("running", "scheduled", "queued", "pending", "waiting")
MISSING = ("", "na", "nan", "n/a", "<na>", "none", "null")
"""How tables write that there is no number."""
DEFAULT_MARGIN = 0.005
"""Half a percentage point of a metric given as a fraction."""


def analyze(
    path: str | Path | pd.DataFrame,
    margin: float | None = DEFAULT_MARGIN,
    *,
    direction: str = "maximize",
    chance: float | None = None,
    adjustment: str = "dunnett",
    is_sequential: bool = False,
) -> list[dict[str, Any]]:
    """One dict per contrast: {factor, level, n, delta, ci: [low, high], p_adjusted, verdict,
    diverged: [k, n], needs_seeds} and, after these, the rest of the contrast's fields.

    Raises AnalysisError with ``file:line:`` for anything that cannot be read as asked.
    """
    analysis = analyze_file(
        path, margin, direction=direction, chance=chance, adjustment=adjustment,
        is_sequential=is_sequential,
    )  # fmt: skip
    first = (
        "factor", "level", "n", "delta", "ci", "p_adjusted", "verdict", "diverged", "needs_seeds",
    )  # fmt: skip
    contrasts = plain(analysis.contrasts)
    return [{**{key: contrast[key] for key in first}, **contrast} for contrast in contrasts]


def analyze_file(
    path: str | Path | pd.DataFrame,
    margin: float | None = DEFAULT_MARGIN,
    *,
    direction: str = "maximize",
    chance: float | None = None,
    adjustment: str = "dunnett",
    is_sequential: bool = False,
) -> Analysis:
    """The same as `analyze`, as the full Analysis that the report is made from."""
    results = read_results(path)
    return analyze_results(
        results,
        baseline=dict.fromkeys((factor for factor, _ in results[0].levels), BASELINE),
        objective=Objective("value", direction, margin, chance),
        adjustment=adjustment,
        is_sequential=is_sequential,
    )


def read_results(path: str | Path | pd.DataFrame) -> list[Result]:
    """Read and check the file, or a table of the same columns; every factor's unchanged level is
    called `baseline`."""
    if not isinstance(path, (str, Path)):
        return _read_lines(path.to_csv(index=False), Path("DataFrame"))
    file = Path(path)
    if file.is_dir():
        raise AnalysisError(
            f"{file} is a folder; give the CSV of the results. A study folder of ours: "
            f"ablate report {file}"
        )
    return _read_lines(read_text(file, error=AnalysisError), file)


def _read_lines(text: str, file: Path) -> list[Result]:
    text, _, delimiter = at_header(text)
    lines = read_csv(text, file, error=AnalysisError, delimiter=delimiter)
    header = _header(file, next(lines, (1, []))[1])
    rows: list[tuple[int, dict[str, str]]] = []
    for line, cells in lines:
        if len(cells) != len(header):
            raise AnalysisError(
                f"{file}:{line}: {len(cells)} columns where the header has {len(header)}; quote a "
                "level that contains a comma, and write numbers with a point (0.25), or columns "
                "between semicolons"
            )
        row = dict(zip(header, (cell.strip() for cell in cells), strict=True))
        if delimiter != ",":
            row["value"] = re.sub(r"^([-+]?\d*),(\d+)", r"\1.\2", row["value"])
        for name in ("factor", "level"):
            row[name] = _name(f"{file}:{line}", row[name])
        rows.append((line, row))
    _join_equal_levels(rows)
    return _results(file, rows)


def _name(where: str, given: str) -> str:
    """A factor or level as a study file would have it; `baseline` whatever its case."""
    name = unicodedata.normalize("NFC", given)
    if name and (fault := find_fault(name, derived=True)):
        raise AnalysisError(f"{where}: {fault}")
    return BASELINE if name.lower() == BASELINE else name


def _join_equal_levels(rows: list[tuple[int, dict[str, str]]]) -> None:
    """0.0003 and 3e-4, and the 1 that became 1.0 in a table, are one level: the first spelling."""
    spelt: dict[tuple[str, float], str] = {}
    for _, row in rows:
        try:
            number = float(row["level"])
        except ValueError:
            continue
        row["level"] = spelt.setdefault((row["factor"], number), row["level"])


def _results(file: Path, rows: list[tuple[int, dict[str, str]]]) -> list[Result]:
    factors = list(dict.fromkeys(row["factor"] for _, row in rows if row["factor"] != BASELINE))
    if not factors:
        raise AnalysisError(
            f"{file}: no line names a factor; besides the lines `baseline,baseline,...` give one "
            "line per run with its factor and level"
        )
    if all(row["factor"] != BASELINE for _, row in rows):
        raise AnalysisError(
            f"{file}: no baseline line; give the runs that all others are compared with as "
            "factor `baseline`, level `baseline`"
        )
    usual = {factor: (factor, BASELINE) for factor in factors}
    cells: dict[tuple[str, str], Levels] = {}  # one for all seeds: a cell names every factor
    looks: dict[tuple[str, ...], tuple[str, str]] = {}
    seen: dict[tuple[str, str, int], int] = {}
    results = []
    for line, row in rows:
        change = row["factor"], row["level"]
        if change not in cells:
            if (same := looks.setdefault(tuple(map(look_of, change)), change)) != change:
                raise AnalysisError(
                    f"{file}:{line}: {'='.join(change)} ({ascii('='.join(change))}) looks like "
                    f"{'='.join(same)} ({ascii('='.join(same))}); write both alike"
                )
            named = {} if change[0] == BASELINE else {change[0]: change}
            cells[change] = tuple({**usual, **named}.values())
        result = _result(f"{file}:{line}", row, cells[change])
        key = (*change, result.seed)
        if key in seen:
            raise AnalysisError(
                f"{file}:{line}: {row['factor']}={row['level']} with seed {result.seed} stands "
                f"already in line {seen[key]}; give each run its own seed or remove one line"
            )
        seen[key] = line
        results.append(result)
    return results


def _header(file: Path, given: list[str]) -> list[str]:
    """The columns by our names, whatever their case; `state` and `status` are the outcome."""
    header = [name.strip().lower() for name in given]
    if OUTCOME not in header:
        header = [OUTCOME if name in STATES else name for name in header]
    missing = [name for name in REQUIRED if name not in header]
    for name in header:
        if name in REQUIRED + OPTIONAL:
            continue
        near = difflib.get_close_matches(name, REQUIRED + OPTIONAL, n=1)
        if missing and near:
            raise AnalysisError(f"{file}:1: column {name!r}: did you mean {near[0]!r}?")
    if missing:
        raise AnalysisError(
            f"{file}:1: no column {', '.join(missing)}; the first line must name the columns "
            f"{', '.join(REQUIRED)} and, if not every run completed, outcome"
        )
    twice = [name for name in (*REQUIRED, *OPTIONAL) if header.count(name) > 1]
    if twice:
        raise AnalysisError(f"{file}:1: a column stands twice: {', '.join(twice)}")
    return header


def _result(where: str, row: dict[str, str], levels: Levels) -> Result:
    factor, level = row["factor"], row["level"]
    if not factor or not level:
        raise AnalysisError(f"{where}: factor and level must both be given")
    if (factor == BASELINE) != (level == BASELINE):
        raise AnalysisError(
            f"{where}: {factor},{level}: a baseline line reads `baseline,baseline`, and no level "
            "of another factor may be called baseline; the runs of the baseline stand for it"
        )
    outcome = _outcome(where, row.get(OUTCOME, ""))
    value: float | None = None
    if row["value"].lower() not in MISSING:
        try:
            value = float(row["value"])
        except ValueError:
            share = row["value"].endswith("%") and "; write shares (0.25) or points (25) throughout"
            advice = share or _comma(row["value"])
            raise AnalysisError(
                f"{where}: value {row['value']!r} is not a number"
                + (advice or "; leave it empty for a run that did not complete")
            ) from None
    if outcome == "completed" and (value is None or not is_score(value)):
        raise AnalysisError(
            f"{where}: a completed run with value {row['value']!r}; give its final number, or "
            "write `diverged` (counts as a result) or `failed` (counts as missing) as outcome"
        )
    return Result(
        levels=levels,
        seed=_seed(where, row["seed"]),
        outcome=outcome,
        value=value if outcome == "completed" else None,
        trial_id=row.get("trial_id", ""),
    )


def _comma(value: str) -> str:
    """What to write in place of a decimal comma; empty for another text."""
    if not re.fullmatch(r"[-+]?\d+,\d+", value):
        return ""
    return f"; write it with a point: {value.replace(',', '.')}"


def _seed(where: str, text: str) -> int:
    """A whole number, also as tables write it once a seed is missing: 0.0."""
    plain = re.fullmatch(r"([-+]?\d{1,40})(?:\.0*)?", text)
    if plain is None:
        raise AnalysisError(
            f"{where}: seed {text!r} is not a whole number; runs with one seed are compared with "
            "each other"
        )
    return int(plain.group(1))


def _outcome(where: str, text: str) -> str:
    """Our outcome of a run, also by the words of MLflow, W&B and Optuna."""
    given = text.lower() or "completed"
    outcome = SYNONYMS.get(given, given)
    if outcome in OUTCOMES:
        return outcome
    if given in UNENDED:
        raise AnalysisError(f"{where}: the run is {given}; leave the line out until it has ended")
    near = difflib.get_close_matches(given, OUTCOMES, n=1)
    others = f"{', '.join(OUTCOMES)} (or {', '.join(SYNONYMS)})"
    raise AnalysisError(
        f"{where}: outcome {text!r}; "
        + (f"did you mean {near[0]!r}?" if near else f"use one of {others}")
    )
