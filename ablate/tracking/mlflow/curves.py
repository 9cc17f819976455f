"""Curves of settings: mean, lowest and highest of the seeds, at steps that all of them reached."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

import mlflow.entities as entities

from ablate.tracking.mlflow.measures import Measures
from ablate.tracking.mlflow.rows import keeps, milliseconds

Point = tuple[float, int]
"""Value, and when it was measured (unix ms)."""
Curves = Mapping[str, Mapping[int, Point]]
"""Key -> step -> point."""


def curves_of(
    trace: Iterable[Mapping[str, Any]], evals: Iterable[Mapping[str, Any]], measures: Measures
) -> Curves:
    """A trial's curves that its setting has, too; thinned as all that is told of a trace."""
    found: dict[str, dict[int, Point]] = {key: {} for key in measures.curves}
    told = [(row, measures.of_step(row)) for row in trace if keeps(row["step"])]
    told += [(row, measures.of_evaluation(row)) for row in evals]
    for row, values in told:
        for key in found.keys() & values.keys():
            if math.isfinite(values[key]):
                when = milliseconds(row.get("time") or 0.0)
                found[key][int(row["step"])] = (values[key], when)
    return found


def spread_of(seeds: Sequence[Curves], measures: Measures) -> list[entities.Metric]:
    """The curves of a setting; with one seed there is nothing beside the mean."""
    points: list[entities.Metric] = []
    for key in measures.curves:
        first, *others = [curves.get(key, {}) for curves in seeds]
        for step in sorted(set(first).intersection(*others)):
            values = [curve[step][0] for curve in (first, *others)]
            when = max(curve[step][1] for curve in (first, *others))
            told = {key: fmean(values)}
            if others:
                told |= {f"{key}_low": min(values), f"{key}_high": max(values)}
            points += [entities.Metric(name, value, when, step) for name, value in told.items()]
    return points
