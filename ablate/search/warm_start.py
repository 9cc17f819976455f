"""Cells of earlier studies that inform a search: which of them fit, and why others do not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from ablate.errors import PlanError, RecordError
from ablate.records.folder import find_study
from ablate.study import Factor, Search, Study, parse_study
from ablate.study.table import CellRow, read_table


@dataclass(frozen=True, slots=True)
class Earlier:
    """One earlier study, as this one can use it."""

    source: str
    """Its folder, as written in the study file."""
    cells: tuple[tuple[Mapping[str, str], tuple[float, ...]], ...]
    """(levels of this study, its mean score, then its mean cost if this study weighs one)."""
    left: Mapping[str, int]
    """Why a cell was not taken -> how many."""

    @property
    def sentence(self) -> str:
        total = len(self.cells) + sum(self.left.values())
        text = f"{self.source}: {len(self.cells)} of {total} cells inform the sampler"
        reasons = "; ".join(f"{count} not: {reason}" for reason, count in self.left.items())
        return text + (f" ({reasons})" if reasons else "")


def earlier_studies(study: Study) -> tuple[Earlier, ...]:
    """The studies that `warm_start` of a search names; none for other designs.

    A cell is told apart by its resolved configuration, not by the names of its levels: it fits if
    every factor of this study stands at one of its levels, or within its range, there. A factor
    that was fixed in the earlier study counts with the value it had.

    Raises:
        PlanError: an earlier study has another recipe or objective.
        RecordError: there is no study in a folder.
    """
    if not isinstance(study.design, Search):
        return ()
    return tuple(_read(study, source) for source in study.design.warm_start)


def look_ahead(study: Study) -> list[str]:
    """What the earlier studies bring, a line each; also that one is not on this machine.

    Raises:
        PlanError: an earlier study has another recipe or objective.
    """
    try:
        return [f"warm start: {found.sentence}" for found in earlier_studies(study)]
    except RecordError as error:
        return [f"warm start: {error}"]


def _read(study: Study, source: str) -> Earlier:
    record = find_study(Path(study.root) / source)
    content = record.study()
    assert content is not None
    other = parse_study(content["text"], path=content["path"], root=content["root"])
    for what, mine, theirs in (
        ("recipe", study.recipe, other.recipe),
        ("objective", study.objective.metric, other.objective.metric),
        ("objective.at", study.objective.at, other.objective.at),
        ("objective.cost", study.objective.cost, other.objective.cost),
    ):
        if mine != theirs and not (what == "objective.cost" and mine is None):
            raise PlanError(
                f"{study.source.path}: design.warm_start: {source} has {what} {theirs}, this study "
                f"{mine}: its scores say nothing here. Leave it out of warm_start."
            )
    table = read_table(other, record, curves=False)
    cells = []
    left: Counter[str] = Counter()
    for cell in table.cells:
        score = cell.score(table.chance)
        costs = [row.cost.weighed for row in cell.trials if row.cost.weighed is not None]
        if score is None:
            left["not every seed has ended with a score"] += 1
            continue
        if study.objective.cost is not None and not costs:
            left["its cost was not measured"] += 1
            continue
        found = _translate(study, cell)
        if isinstance(found, str):
            left[found] += 1
            continue
        cells.append((found, (score,) if study.objective.cost is None else (score, fmean(costs))))
    return Earlier(source, tuple(cells), dict(left))


def _translate(study: Study, cell: CellRow) -> dict[str, str] | str:
    """This study's levels for an earlier cell's configuration, or why there are none."""
    config = next(row.config for row in cell.trials if row.config is not None)
    levels = {}
    for factor in study.factors:
        name = _level_of(study, factor, config)
        if name is None:
            return f"{_written(factor, config)} is no level here"
        levels[factor.name] = name
    return levels


def _level_of(study: Study, factor: Factor, config: Mapping[str, Any]) -> str | None:
    if factor.range is not None:
        value = config.get(factor.name)
        inside = isinstance(value, (int, float)) and factor.range.low <= value <= factor.range.high
        return repr(value) if inside else None
    for level in factor.levels:
        mine = study.config(study.cell({factor.name: level.name}), seed=study.seeds[0])
        if all(mine.get(field) == config.get(field) for field in factor.fields):
            return level.name
    return None


def _written(factor: Factor, config: Mapping[str, Any]) -> str:
    return ", ".join(f"{field}={config.get(field)}" for field in sorted(factor.fields))
