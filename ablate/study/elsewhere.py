"""Runs that were made elsewhere, and the study file that they fit into.

What varied between the runs are the factors; the cell with the most runs is the baseline, unless
one is named. Where cells have several runs they are compared one with another (design `observed`);
runs that all differ are what a sweep leaves, and are read as a search.
"""

from __future__ import annotations

import json
import math
import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ablate.errors import AnalysisError, suggest
from ablate.study.begin import inline
from ablate.study.study import name_level

MOST_RUNS = 1000
_MOST_LEVELS = 8
"""More numbers than this are taken as drawn from a range, where every run has its own setting."""
_SEEDS = re.compile(r"(^|[._/])((random|manual|global|torch|data|np)_?)?(seed|rng)$", re.IGNORECASE)
_CAUTION = (
    "Imported, not planned: nobody gave settings to runs by a plan, so a difference may come from "
    "whatever else was changed between them, and no two runs are paired."
)

ENDED = {
    **dict.fromkeys(("finished", "complete", "completed", "success", "succeeded"), "completed"),
    **dict.fromkeys(("failed", "fail", "crashed", "killed", "error", "preempted"), "failed"),
    "diverged": "diverged",
    "pruned": "pruned",
}
"""What trackers call the end of a run; a state that is not here has not ended."""

Simple = int | float | str | bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """A run that was made elsewhere, as its reader found it."""

    name: str
    """What its maker called it."""
    settings: Mapping[str, Any]
    """What it was set to, flat: a name and a simple value."""
    values: Mapping[str, float]
    """Its last measurements, by the names its maker gave them."""
    outcome: str = "completed"
    """completed | diverged | pruned | failed."""
    rows: Sequence[Mapping[str, Any]] = ()
    """Its steps in our names (:mod:`ablate.markers.foreign`), where there is a loss."""
    curves: Sequence[Mapping[str, Any]] = ()
    """{"step": ..., name: value} of what was measured along the way, by its maker's names."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """What the markers should know (:class:`ablate.markers.Context`)."""
    wall_s: float = 0.0
    notes: Sequence[str] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A study file, and each run's place in the study."""

    text: str
    places: Sequence[tuple[Mapping[str, str], int]]
    """(levels, seed) of each run."""


def draft(
    runs: Sequence[Made],
    *,
    source: str,
    metric: str,
    minimize: bool = False,
    margin: float = 0.005,
    factors: Sequence[str] = (),
    baseline: Mapping[str, str] | None = None,
) -> Draft:
    """The study of these runs, judged by `metric`.

    `factors`: names of the settings to compare; all that differ if left out. `baseline`: levels of
    the setting that all others are compared with.

    Raises:
        AnalysisError: no run measured the metric, nothing differs, or a name is not theirs.
    """
    _check(runs, source, metric)
    table = _settings(runs)
    varied = {name: column for name, column in table.items() if len(dict.fromkeys(column)) > 1}
    chosen, cautions = _choose(varied, factors, source=source)
    cells = [tuple(name_level(varied[name][i]) for name in chosen) for i in range(len(runs))]
    usual = _baseline(cells, chosen, baseline or {})
    is_sweep = not _compares(cells, usual)
    numbers = _numbered(cells, apart=not is_sweep)
    text = _text(
        source=source,
        cautions=[_CAUTION, *cautions],
        metric=metric,
        minimize=minimize,
        margin=margin,
        baseline={_field(n): varied[n][cells.index(usual)] for n in chosen}
        | {_field(n): column[0] for n, column in table.items() if n not in varied},
        factors={_field(name): _levels(varied[name], is_sweep=is_sweep) for name in chosen},
        design="observed" if not is_sweep else f"{{name: search, cells: {len(set(cells))}}}",
        seeds=max(numbers) + 1,
    )
    places = [
        (dict(zip(map(_field, chosen), cell, strict=True)), number)
        for cell, number in zip(cells, numbers, strict=True)
    ]
    return Draft(text=text, places=places)


def _choose(
    varied: Mapping[str, Sequence[Simple]], factors: Sequence[str], *, source: str
) -> tuple[list[str], list[str]]:
    """The settings to compare, and what is to be known of the others."""
    if wrong := next((name for name in factors if name not in varied), None):
        raise AnalysisError(
            f"--factor {wrong}: no setting of that name differs between the runs; "
            f"{suggest(wrong, varied)}"
        )
    seeds = [name for name in varied if _SEEDS.search(name)]
    if factors:
        left = [name for name in varied if name not in (*factors, *seeds)]
        mixed = f"Also differed, and is mixed with what is compared: {', '.join(left)}."
        return list(factors), [mixed] if left else []
    labels = [name for name in varied if _is_label(varied[name]) and name not in seeds]
    chosen = [name for name in varied if name not in (*labels, *seeds)]
    if not chosen:
        raise AnalysisError(
            f"{source}: all runs have the same settings, so there is nothing to compare; what "
            f"differs is {', '.join((*seeds, *labels)) or 'nothing'}"
        )
    return chosen, [f"Taken as names, not as settings: {', '.join(labels)}."] if labels else []


def _check(runs: Sequence[Made], source: str, metric: str) -> None:
    if not runs:
        raise AnalysisError(f"{source} holds no run")
    if len(runs) > MOST_RUNS:
        raise AnalysisError(
            f"{source} holds {len(runs)} runs; {MOST_RUNS} at most are read as one study"
        )
    measured = Counter(name for run in runs for name in run.values)
    if not measured[metric]:
        names = [name for name, _ in measured.most_common(20)]
        raise AnalysisError(
            f"{source}: no run measured {metric!r}; "
            f"{suggest(metric, names) if names else 'none measured anything'}"
        )


def _settings(runs: Sequence[Made]) -> dict[str, list[Simple]]:
    """Name -> the value in each run; None where a run does not say. Text that is a number is one:
    trackers keep numbers as text."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    return {name: _alike([simple(run.settings.get(name)) for run in runs]) for name in names}


def simple(value: Any) -> Simple:
    """A setting's value as a plain one; lists and the like as their text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if value is None or isinstance(value, (bool, int)):
        return value
    text = str(value).strip()
    if text.lower() in ("none", "null", ""):
        return None
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            found = kind(text)
        except ValueError:
            continue
        return found if math.isfinite(found) else text
    return text


def number(value: Any) -> Any:
    """NaN and infinity are numbers of runs that diverged; empty cells are none."""
    if isinstance(value, float):
        return value
    found = simple(value)
    if isinstance(found, str) and found.lower().lstrip("+-") in ("nan", "inf", "infinity"):
        return math.nan
    return found


def flat(content: Mapping[str, Any], within: str = "") -> dict[str, Any]:
    """Names joined with points, down to plain values; lists as their text."""
    found: dict[str, Any] = {}
    for key, value in content.items():
        name = f"{within}{key}"
        if isinstance(value, Mapping):
            inner = value["value"] if set(value) == {"desc", "value"} else None  # W&B's config.yaml
            found |= flat(value, f"{name}.") if inner is None else {name: inner}
        else:
            found[name] = json.dumps(value) if isinstance(value, (list, tuple)) else value
    return found


def _alike(column: list[Simple]) -> list[Simple]:
    """1 and 1.0 are one level where a setting has fractions."""
    numbers = [value for value in column if type(value) in (int, float)]
    if any(isinstance(value, float) for value in numbers):
        return [float(value) if type(value) is int else value for value in column]
    return column


def _is_label(column: Sequence[Simple]) -> bool:
    """Text that is another in nearly every run names runs: a folder, a date, a host."""
    texts = [value for value in column if isinstance(value, str)]
    return len(texts) > 3 and len(set(texts)) > 0.8 * len(column)


def _baseline(
    cells: Sequence[tuple[str, ...]], chosen: Sequence[str], wanted: Mapping[str, str]
) -> tuple[str, ...]:
    """The cell with the most runs among those that have the wanted levels; of several, the one
    from which the most others differ in one setting, then the first."""
    for name, level in wanted.items():
        known = {cell[chosen.index(name)] for cell in cells} if name in chosen else set()
        if level not in known:
            raise AnalysisError(
                f"--baseline {name}={level}: "
                + (suggest(level, sorted(known)) if known else suggest(name, chosen))
            )
    able = [
        cell
        for cell in dict.fromkeys(cells)
        if all(cell[chosen.index(name)] == level for name, level in wanted.items())
    ]
    if not able:
        raise AnalysisError(
            "no run has the baseline "
            + ", ".join(f"{name}={level}" for name, level in wanted.items())
        )
    counts = Counter(cells)
    return max(able, key=lambda cell: (counts[cell], _neighbours(cell, counts)))


def _neighbours(cell: tuple[str, ...], cells: Iterable[tuple[str, ...]]) -> int:
    return sum(sum(a != b for a, b in zip(cell, other, strict=True)) == 1 for other in cells)


def _compares(cells: Sequence[tuple[str, ...]], usual: tuple[str, ...]) -> bool:
    """Whether some setting can be held against the baseline: one of them has several runs."""
    counts = Counter(cells)
    return any(
        sum(a != b for a, b in zip(usual, cell, strict=True)) == 1
        and max(counts[usual], counts[cell]) > 1
        for cell in counts
    )


def _numbered(cells: Sequence[tuple[str, ...]], *, apart: bool) -> list[int]:
    """Each run's number in place of a seed: its own where nothing is to pair."""
    if apart:
        return list(range(len(cells)))
    seen: Counter[tuple[str, ...]] = Counter()
    numbers = []
    for cell in cells:
        numbers.append(seen[cell])
        seen[cell] += 1
    return numbers


def _field(name: str) -> str:
    plain = re.sub(r"\W+", "_", name).strip("_") or "setting"
    return f"{plain}_" if plain in ("metrics", "seed") or plain[0].isdigit() else plain


def _levels(column: Sequence[Simple], *, is_sweep: bool) -> Any:
    values = list(dict.fromkeys(column))
    numbers = [float(v) for v in values if isinstance(v, (int, float)) and not isinstance(v, bool)]
    if not is_sweep or len(numbers) < len(values) or len(values) <= _MOST_LEVELS:
        return values
    low, high = min(numbers), max(numbers)
    return {"low": low, "high": high, "log": low > 0 and high >= 10 * low}


def _text(
    *,
    source: str,
    cautions: Sequence[str],
    metric: str,
    minimize: bool,
    margin: float,
    baseline: Mapping[str, Any],
    factors: Mapping[str, Any],
    design: str,
    seeds: int,
) -> str:
    direction = "minimize" if minimize else "maximize"
    header = [f"What did these runs show? From {source}.", *cautions]
    lines = [f"# {line}" for part in header for line in textwrap.wrap(part, 96)]
    lines += ["recipe: elsewhere", "baseline:", f"  metrics: {inline({metric: direction})}"]
    lines += [f"  {inline(name)}: {inline(value)}" for name, value in baseline.items()]
    lines.append("factors:")
    lines += [f"  {inline(name)}: {inline(levels)}" for name, levels in factors.items()]
    lines += [
        f"design: {design}",
        f"seeds: {seeds}   # numbers of runs, not of generators",
        f"objective: {inline({'metric': metric, 'direction': direction, 'margin': margin})}",
    ]
    return "\n".join(lines) + "\n"
