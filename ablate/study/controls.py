"""Levels that are run to be compared with, and what may never be handed out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from ablate.errors import PlanError
from ablate.study.study import Study
from ablate.trial.identity import Cell
from ablate.trial.recipe import Role, fields_of, find_ability, load
from ablate.trial.same import Rules, Sameness, same_experiment


def controls(study: Study) -> list[tuple[str, str, Sameness]]:
    """(control, what it repeats, why), by ``factor=level``, of the levels kept as controls."""
    found = []
    for factor in study.factors:
        for level in factor.levels:
            if (factor.name, level.name) not in study.controls:
                continue
            mine = study.cell({factor.name: level.name})
            for home in dict.fromkeys([factor.baseline, *(item.name for item in factor.levels)]):
                why = sameness(study, study.cell({factor.name: home}), mine)
                if home != level.name and why is not None:
                    names = (f"{factor.name}={level.name}", f"{factor.name}={home}")
                    found.append((*names, why))
                    break
    return found


def withheld(study: Study, levels: Mapping[str, str]) -> list[str]:
    """Why a setting with these levels is never handed out, in clauses; empty if it may be.

    Controls are run to be compared with: a repeat of another level shows the noise, a level that
    is known to be wrong shows what wrong costs. Their good luck is no reason to use them.
    """
    usual = study.baseline_levels()
    changed = {name: level for name, level in levels.items() if usual.get(name, level) != level}
    if not changed:
        return []
    repeated = {name: home for name, home, _ in controls(study)}
    found = []
    for name, level in changed.items():
        key = f"{name}={level}"
        if key in repeated:
            found.append(f"{key} is a control, the same experiment as {repeated[key]}")
        elif (name, level) in study.controls:
            found.append(f"{key} is a control")
    # What is wrong with the baseline already is the user's own decision.
    known = _unsound(study, study.cell({}))
    return found + [why for why in _unsound(study, study.cell(changed)) if why not in known]


def _unsound(study: Study, cell: Cell) -> list[str]:
    judge = find_ability(study.recipe, "unsound")
    if judge is None:
        return []
    config = load(study.recipe).Config(**study.config(cell, seed=study.seeds[0]))
    return list(judge(config, workers=study.gang.workers))


def sameness(study: Study, one: Cell, two: Cell) -> Sameness | None:
    """Why two cells are provably one experiment; None if they are not."""
    return same_experiment(
        experiment(study, one),
        experiment(study, two),
        rules=rules_of(study),
        workers=study.gang.workers,
    )


def rules_of(study: Study) -> Rules:
    """The recipe's rules by which configurations are provably one experiment."""
    ask = find_ability(study.recipe, "same_rules")
    return ask() if ask is not None else ()


def experiment(study: Study, cell: Cell) -> dict[str, Any]:
    """The fields of a cell's configuration that can change a result.

    Raises:
        PlanError: its levels contradict each other.
    """
    ignored = fields_of(load(study.recipe).Config, Role.FREE)
    try:
        config = study.config(cell, seed=study.seeds[0])
    except ValidationError as error:
        raise PlanError(
            f"{study.source.path}: {study.change_name(dict(cell.levels))} cannot be run: "
            + "; ".join(str(item["msg"]) for item in error.errors(include_url=False))
            + ". Leave one of these levels out, or set design: one_at_a_time"
        ) from error
    return {name: value for name, value in config.items() if name not in ignored}
