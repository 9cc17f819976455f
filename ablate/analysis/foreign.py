"""Results made elsewhere: `ablate analyze RESULTS.csv` judges them as if we had run them.

A CSV file with the columns factor, level, seed, value, outcome: one line per run, one factor
changed at a time. The baseline's lines have `baseline` as factor and as level. `outcome` may be
missing or empty for completed runs; `value` may be empty for runs that did not complete.
"""

from __future__ import annotations

import difflib
import math
from pathlib import Path
from typing import Any

from ablate.analysis.analysis import Analysis, analyze_results
from ablate.analysis.results import OUTCOMES, Objective, Result
from ablate.errors import AnalysisError
from ablate.source import read_csv, read_text

BASELINE = "baseline"
REQUIRED = ("factor", "level", "seed", "value")
OPTIONAL = ("outcome", "trial_id")
DEFAULT_MARGIN = 0.005
"""Half a percentage point of a metric given as a fraction."""


def analyze(
    path: str | Path,
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
    contrasts = analysis.to_dict()["contrasts"]
    return [{**{key: contrast[key] for key in first}, **contrast} for contrast in contrasts]


def analyze_file(
    path: str | Path,
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


def read_results(path: str | Path) -> list[Result]:
    """Read and check the file; every factor's unchanged level is called `baseline`."""
    file = Path(path)
    if file.is_dir():
        raise AnalysisError(
            f"{file} is a folder; give the CSV of the results. A study folder of ours: "
            f"ablate report {file}"
        )
    text = read_text(file, error=AnalysisError)
    lines = read_csv(text, file, error=AnalysisError)
    header = [name.strip() for name in next(lines, (1, []))[1]]
    _check_header(file, header)
    rows: list[tuple[int, dict[str, str]]] = []
    for line, cells in lines:
        if len(cells) != len(header):
            raise AnalysisError(
                f"{file}:{line}: {len(cells)} columns where the header has "
                f"{len(header)}; quote a level name that contains a comma"
            )
        row = dict(zip(header, (cell.strip() for cell in cells), strict=True))
        for name in ("factor", "level"):
            if row[name].lower() == BASELINE:
                row[name] = BASELINE
        rows.append((line, row))
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
    seen: dict[tuple[str, str, int], int] = {}
    results = []
    for line, row in rows:
        result = _result(f"{file}:{line}", row, factors)
        key = (row["factor"], row["level"], result.seed)
        if key in seen:
            raise AnalysisError(
                f"{file}:{line}: {row['factor']}={row['level']} with seed {result.seed} stands "
                f"already in line {seen[key]}; give each run its own seed or remove one line"
            )
        seen[key] = line
        results.append(result)
    return results


def _check_header(file: Path, header: list[str]) -> None:
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
    if len(set(header)) != len(header):
        raise AnalysisError(f"{file}:1: a column stands twice: {', '.join(header)}")


def _result(where: str, row: dict[str, str], factors: list[str]) -> Result:
    factor, level = row["factor"], row["level"]
    if not factor or not level:
        raise AnalysisError(f"{where}: factor and level must both be given")
    if (factor == BASELINE) != (level == BASELINE):
        raise AnalysisError(
            f"{where}: {factor},{level}: a baseline line reads `baseline,baseline`, and no level "
            "of another factor may be called baseline; the runs of the baseline stand for it"
        )
    try:
        seed = int(row["seed"])
    except ValueError:
        raise AnalysisError(
            f"{where}: seed {row['seed']!r} is not a whole number; runs with one seed are compared "
            "with each other"
        ) from None
    outcome = row.get("outcome", "").lower() or "completed"
    if outcome not in OUTCOMES:
        near = difflib.get_close_matches(outcome, OUTCOMES, n=1)
        raise AnalysisError(
            f"{where}: outcome {outcome!r}; "
            + (f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(OUTCOMES)}")
        )
    value: float | None = None
    if row["value"]:
        try:
            value = float(row["value"])
        except ValueError:
            raise AnalysisError(
                f"{where}: value {row['value']!r} is not a number; leave it empty for a run that "
                "did not complete"
            ) from None
    if outcome == "completed" and (value is None or not math.isfinite(value)):
        raise AnalysisError(
            f"{where}: a completed run with value {row['value']!r}; give its final number, or "
            "write `diverged` (counts as a result) or `failed` (counts as missing) as outcome"
        )
    return Result(
        levels=tuple((name, level if name == factor else BASELINE) for name in factors),
        seed=seed,
        outcome=outcome,
        value=value if outcome == "completed" else None,
        trial_id=row.get("trial_id", ""),
    )
