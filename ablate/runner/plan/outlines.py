"""What each cell amounts to before it runs, and every cell that cannot run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ablate.errors import PlanError
from ablate.records.folder import StudyRecord
from ablate.study import Study
from ablate.trial.identity import Trial
from ablate.trial.recipe import Note, Outline, Role, fields_of, load
from ablate.words import counted


@dataclass(frozen=True, slots=True)
class Remark:
    """A line that the recipe adds to the plan: which parameters are decayed, say."""

    label: str
    cells: tuple[str, ...]
    """Names of the cells that it holds for."""
    counts: Mapping[str, Any]
    """The same in numbers."""
    sentence: str


def outline_cells(study: Study, trials: Sequence[Trial], *, deep: bool) -> dict[str, Outline]:
    """What each cell amounts to, by its name.

    Raises:
        PlanError: every cell that cannot run, or that does not measure the objective.
    """
    recipe = load(study.recipe)
    found: dict[str, Outline] = {}
    refused: dict[str, list[str]] = {}
    cells = {study.change_name(dict(trial.cell.levels)): trial for trial in trials}
    for name, trial in cells.items():
        try:
            outline = recipe.outline(
                recipe.Config(**trial.config),
                workers=study.gang.workers,
                gpus=study.gang.gpus_per_worker,
                root=Path(study.root),
                deep=deep,
            )
            refuse_unmeasured(study, outline.measures)
            refuse_same_data(study, outline)
        except ValueError as error:
            refused.setdefault(str(error), []).append(name)
        else:
            found[name] = outline
    _refuse(study, refused, cells)
    return found


def look_at(study: Study) -> list[str]:
    """Warnings about the baseline, and about the baseline with each other level alone.

    Raises:
        PlanError: every one of them that cannot run.
    """
    alone: list[dict[str, str]] = [
        {factor.name: level.name}
        for factor in study.factors
        for level in factor.levels
        if not factor.only_if
    ]
    trials = [study.trial(study.cell(named), seed=study.seeds[0]) for named in [{}, *alone]]
    return warnings_of(outline_cells(study, trials, deep=False))


def warnings_of(outlines: Mapping[str, Outline]) -> list[str]:
    """Warnings over all cells, each with the cells it concerns."""
    concerned: dict[str, list[str]] = {}
    for name, outline in outlines.items():
        for warning in outline.warnings:
            concerned.setdefault(warning, []).append(name)
    return [f"{which(names, list(outlines))}{warning}" for warning, names in concerned.items()]


def remarks_of(outlines: Mapping[str, Outline]) -> tuple[Remark, ...]:
    """What the recipe adds to the plan, each line with its cells."""
    told: dict[tuple[str, str], tuple[list[str], Note]] = {}
    for name, outline in outlines.items():
        for note in outline.notes:
            told.setdefault((note.label, note.text), ([], note))[0].append(name)
    return tuple(
        Remark(note.label, tuple(names), note.facts, note.text) for names, note in told.values()
    )


def _refuse(study: Study, refused: Mapping[str, Sequence[str]], cells: Iterable[str]) -> None:
    if refused:
        raise PlanError(
            "\n".join(
                f"{study.source.path}: {which(names, list(cells))}{why}"
                for why, names in refused.items()
            )
        )


def which(names: Sequence[str], cells: Sequence[str]) -> str:
    """The cells that a warning concerns, as the shorter list."""
    others = [name for name in cells if name not in names]
    if not others:
        return ""
    if len(others) < len(names):
        return f"all but {'; '.join(others)}: "
    return f"{'; '.join(names)}: "


def refuse_unmeasured(study: Study, measured: Sequence[str]) -> None:
    if study.objective.metric in measured:
        return
    given = f"gives {', '.join(measured)}" if measured else "has no evaluation"
    raise ValueError(
        f"the objective {study.objective.metric} is not measured: the configuration {given}. "
        "Add the evaluation to the baseline, or name another objective.metric"
    )


def refuse_same_data(study: Study, outline: Outline) -> None:
    """Refuse a choice of evaluations by the data that they are reported on, or of too few."""
    goal = study.objective
    if goal.at == "mean_last_k" and 1 < outline.evaluations < goal.k:
        raise ValueError(
            f"objective.k: {goal.k} evaluations are to be averaged, and a run has "
            f"{outline.evaluations}; evaluate more often, or set k to at most that"
        )
    if goal.heldout is None:
        return
    if goal.heldout not in outline.measures:
        raise ValueError(
            f"heldout {goal.heldout} is not measured: the configuration gives "
            f"{', '.join(outline.measures)}. Add the evaluation, or name another"
        )
    mine, its = (outline.measured_on.get(name) for name in (goal.metric, goal.heldout))
    if mine is not None and mine == its:
        raise ValueError(
            f"heldout {goal.heldout} is measured on {its}, as {goal.metric} is: the best of what "
            "is reported would be reported. Give an evaluation with a path of its own, or set at: "
            "mean_last_k"
        )


def not_resumed(study: Study, record: StudyRecord, trials: Sequence[Trial]) -> list[str]:
    """Begun trials of the folder that differ from a wanted one in the optimizer's settings alone.

    Resuming them with the new settings is what one might expect, and what would silently keep the
    old ones: an optimizer's load_state_dict overwrites betas, wd and lr with those it was saved
    with.
    """
    config_type = load(study.recipe).Config
    settings = fields_of(config_type, Role.OPTIMIZER)
    ignored = fields_of(config_type, Role.FREE) | settings

    def key(config: Mapping[str, Any]) -> str:
        return json.dumps({k: v for k, v in config.items() if k not in ignored}, sort_keys=True)

    new = {key(t.config): t for t in trials if not record.record(t.id).attempts()}
    mine = {trial.id for trial in trials}
    changed: set[str] = set()
    count = 0
    for folder in record.records() if new else ():
        if folder.trial_id in mine or not folder.attempts():
            continue
        content = folder.trial()["config"]
        twin = new.get(key(content))
        if twin is not None:
            changed |= {name for name in settings if content.get(name) != twin.config.get(name)}
            count += 1
    if not count:
        return []
    names = ", ".join(sorted(changed))
    return [
        f"{counted(count, 'begun trial')} in the folder had another {names}; those of today start "
        "from the first step and do not resume them, since a checkpoint's optimizer brings its old "
        f"{names} along and overwrites the new"
    ]
