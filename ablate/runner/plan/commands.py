"""The line that runs each trial outside of here."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from ablate.records.folder import StudyRecord
from ablate.runner.agenda import planned
from ablate.study import Study
from ablate.trial.recipe import ability, load


@dataclass(frozen=True, slots=True)
class Line:
    """A trial's own command."""

    trial_id: str
    name: str
    seed: int
    command: str
    """For a POSIX shell; empty where there is none."""
    why_not: str = ""


def commands_of(study: Study, record: StudyRecord) -> list[Line]:
    """The lines of all trials that are known, in the plan's order.

    Raises:
        AbilityError: the recipe has no line outside of here.
    """
    write = ability(study.recipe, "command")
    recipe = load(study.recipe)
    lines = []
    for trial in planned(study, record):
        name = study.change_name(dict(trial.cell.levels))
        try:
            words = write(recipe.Config(**trial.config), workers=study.gang.workers)
        except ValueError as error:
            lines.append(Line(trial.id, name, trial.seed, "", str(error)))
        else:
            lines.append(Line(trial.id, name, trial.seed, shlex.join(words)))
    return lines
