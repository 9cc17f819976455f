"""Two studies side by side: what they ask differently, on which code and data, and what each found.

Where both ran the same cells, their runs are judged together: a cell is the same where the resolved
configuration of its runs is, the seed left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ablate.analysis.analysis import Analysis, Contrast, analyze_results
from ablate.analysis.results import Objective, Result
from ablate.errors import AnalysisError
from ablate.records.folder import StudyRecord
from ablate.report.page import read_page
from ablate.report.questions import verdict_words
from ablate.report.scale import NONE, Scale, scale_of
from ablate.study import Study
from ablate.study.table import StudyTable, read_table
from ablate.trial.identity import Levels
from ablate.words import counted


@dataclass(frozen=True, slots=True)
class Difference:
    """Something that is not the same in both."""

    kind: str
    """question, code or data."""
    name: str
    one: str
    two: str


@dataclass(frozen=True, slots=True)
class Effect:
    """A level against its reference, as a study found it."""

    delta: float | None
    ci: tuple[float, float] | None
    verdict: str
    runs: int
    said: str
    """All of it as the report's tables say it."""


@dataclass(frozen=True, slots=True)
class Pair:
    """The same level in both studies; None where one has not asked."""

    factor: str
    level: str
    one: Effect | None
    two: Effect | None
    pooled: Effect | None
    """Of the runs of both together, where level and baseline are the same cells in both."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """What `ablate compare` says."""

    one: str
    two: str
    metric: str
    differences: tuple[Difference, ...]
    effects: tuple[Pair, ...]
    shared_cells: int
    """Cells that both ran."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def compare(one: tuple[Study, StudyRecord], two: tuple[Study, StudyRecord]) -> Comparison:
    """Two study folders against each other.

    Raises:
        AnalysisError: they are judged by different measurements.
    """
    first, second = one[0], two[0]
    if first.objective.metric != second.objective.metric:
        raise AnalysisError(
            f"{first.name} is judged by {first.objective.metric} and {second.name} by "
            f"{second.objective.metric}: their effects have different units. Name the same "
            "objective.metric in both files, and write the reports again"
        )
    tables = read_table(*one), read_table(*two)
    cells = _cells(tables[0]), _cells(tables[1])
    effects = _effects(tables[0]), _effects(tables[1])
    pooled = _pool(tables, cells)
    return Comparison(
        one=first.name,
        two=second.name,
        metric=first.objective.metric,
        differences=tuple([*_questions(first, second), *_provenance(tables)]),
        effects=tuple(
            Pair(*key, effects[0].get(key), effects[1].get(key), pooled.get(key))
            for key in dict.fromkeys([*effects[0], *effects[1]])
        ),
        shared_cells=len(set(cells[0]) & set(cells[1])),
    )


def _questions(one: Study, two: Study) -> Iterable[Difference]:
    sides = [_asked(study) for study in (one, two)]
    for name in dict.fromkeys([*sides[0], *sides[1]]):
        values = [side.get(name, "not there") for side in sides]
        if values[0] != values[1]:
            yield Difference("question", name, *values)


def _asked(study: Study) -> dict[str, str]:
    """What a study asks, by the place in its file."""
    baseline = study.config(study.cell({}), seed=study.seeds[0])
    baseline.pop("seed", None)
    said: dict[str, Any] = {
        "recipe": study.recipe,
        **{f"baseline.{name}": value for name, value in baseline.items()},
        **{
            f"factors.{factor.name}": [level.name for level in factor.levels]
            or (factor.range and factor.range.model_dump())
            for factor in study.factors
        },
        "design": study.design.model_dump(),
        "seeds": list(study.seeds),
        "objective": study.objective.model_dump(),
        "gang.workers": study.gang.workers,
        "markers": dict(study.markers),
    }
    return {name: _text(value) for name, value in said.items()}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def _provenance(tables: tuple[StudyTable, StudyTable]) -> Iterable[Difference]:
    """Versions and data of the runs, each side's all named where they are several."""
    sides = [_facts(table) for table in tables]
    for kind, name in dict.fromkeys([*sides[0], *sides[1]]):
        values = [", ".join(sorted(side.get((kind, name), ()))) or "unknown" for side in sides]
        if values[0] != values[1]:
            yield Difference(kind, name, *values)


def _facts(table: StudyTable) -> dict[tuple[str, str], set[str]]:
    found: dict[tuple[str, str], set[str]] = {}
    for row in table.rows:
        if not row.ended:
            continue
        for name, version in (row.fingerprint or {}).items():
            found.setdefault(("code", name), set()).add(str(version))
        trial = table.record.record(row.id)
        result = trial.result(max(trial.attempts(), default=0)) or {}
        facts = result.get("facts") or {}
        for name in ("data", "device"):
            if (fact := facts.get(name)) is not None:
                kind = "data" if name == "data" else "code"
                found.setdefault((kind, name), set()).add(str(fact)[:12])
        found.setdefault(("code", "processors"), set()).update(facts.get("makes") or ())
    return found


def _effects(table: StudyTable) -> dict[tuple[str, str], Effect]:
    found: dict[tuple[str, str], Effect] = {}
    questions = read_page(table).questions
    scale = scale_of(table.study, (question.analysis for question in questions))
    for question in questions:
        for contrast in question.analysis.contrasts:
            key = (contrast.factor, contrast.level)
            found.setdefault(key, _effect(contrast, scale))
    return found


def _effect(contrast: Contrast, scale: Scale) -> Effect:
    said = verdict_words(contrast)
    if contrast.delta is not None:
        said += f" {scale.delta(contrast.delta)} {scale.unit}".rstrip()
    if (interval := scale.interval(contrast.ci)) != NONE:
        said += f" ({interval})"
    said += f", {counted(contrast.n, 'run')}"
    return Effect(contrast.delta, contrast.ci, str(contrast.verdict), contrast.n, said)


def _cells(table: StudyTable) -> dict[str, Levels]:
    """Cells by what they train, in a text; the workers belong to it."""
    found = {}
    for cell in table.cells:
        for row in cell.trials:
            if row.ended and row.config is not None:
                config = {name: value for name, value in row.config.items() if name != "seed"}
                content = [table.study.gang.workers, config]
                found[json.dumps(content, sort_keys=True)] = cell.levels
                break
    return found


def _pool(
    tables: tuple[StudyTable, StudyTable], cells: tuple[Mapping[str, Levels], Mapping[str, Levels]]
) -> dict[tuple[str, str], Effect]:
    """Effects of the runs of both, over the cells that both have; a run counts once."""
    study = tables[0].study
    usual = tuple(study.compared_baseline().items())
    shared = {cells[0][key]: cells[1][key] for key in cells[0] if key in cells[1]}
    if usual not in shared or len(shared) < 2:
        return {}
    runs: dict[tuple[Levels, int], Result] = {}
    for place, table in enumerate(tables):
        back = {levels[place]: levels[0] for levels in shared.items()}
        for result in table.results:
            if (home := back.get(result.levels)) is not None:
                moved = Result(
                    levels=home, seed=result.seed, outcome=result.outcome, value=result.value
                )
                runs.setdefault((home, result.seed), moved)
    goal = study.objective
    analysis: Analysis = analyze_results(
        list(runs.values()),
        baseline=dict(usual),
        objective=Objective(goal.metric, goal.direction, goal.margin, tables[0].chance),
    )
    scale = scale_of(study, [analysis])
    return {(c.factor, c.level): _effect(c, scale) for c in analysis.contrasts}
