"""What is known of a study: its trials from the folder, and which runs stand for them in MLflow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import takewhile
from typing import Any

from ablate.analysis.results import Result, Score
from ablate.records.folder import StudyRecord
from ablate.study import Study
from ablate.tracking.mlflow import runs
from ablate.tracking.mlflow.answer import Answer
from ablate.tracking.mlflow.curves import Curves
from ablate.tracking.mlflow.door import Door
from ablate.tracking.mlflow.measures import Measures
from ablate.tracking.mlflow.rows import TrialRun
from ablate.tracking.mlflow.runs import CellRun, Ended
from ablate.trial.identity import Levels, Trial


@dataclass(slots=True)
class StudyRun:
    """What is known of the study's run."""

    run_id: str = ""
    """Empty while there is none."""
    status: str = ""
    tags: dict[str, str] = field(default_factory=dict)


@dataclass
class Known:
    """One study as the mirror knows it."""

    study: Study
    record: StudyRecord
    score: Score
    trials: dict[str, Trial] = field(default_factory=dict)
    by_cell: dict[Levels, list[Trial]] = field(default_factory=dict)
    ended: dict[str, Ended] = field(default_factory=dict)
    curves: dict[str, Curves] = field(default_factory=dict)
    """Of trials that have ended, until their cell's curves are told."""
    changes: int = 0
    """How often an outcome came, or went because its trial goes on."""
    answer: Answer | None = None
    """What was last read of the study's results."""
    study_run: StudyRun = field(default_factory=StudyRun)
    cells: dict[Levels, CellRun] = field(default_factory=dict)
    runs: dict[str, TrialRun] = field(default_factory=dict)
    """Of trials, by trial id."""
    _settings: dict[Levels, dict[str, Any]] = field(default_factory=dict)
    unreadable: set[str] = field(default_factory=set)
    """Trials whose records cannot be read, so that their cells' curves are drawn without them."""
    complaints: list[str] = field(default_factory=list)
    """Of this round: what cannot be shown, each with its trial or cell and why."""

    @cached_property
    def measures(self) -> Measures:
        return Measures(self.study)

    def name(self, trial: Trial) -> str:
        """What a trial is called."""
        return f"{self.study.change_name(dict(trial.cell.levels))} · seed {trial.seed}"

    def setting(self, levels: Levels) -> dict[str, Any]:
        """The parameters of a cell, which its trials share."""
        if levels not in self._settings:
            self._settings[levels] = runs.setting_of(self.study, levels)
        return self._settings[levels]

    def first_ended(self, levels: Levels) -> list[Trial]:
        """A cell's trials, from the first seed on, that have ended: what its numbers are of."""
        trials = runs.in_order_of_seeds(self.study, self.by_cell[levels])
        return list(takewhile(lambda trial: trial.id in self.ended, trials))

    def is_due(self, levels: Levels) -> bool:
        """Whether a cell's run must be told now: all seeds have ended, or fewer than it shows."""
        ended, cell = len(self.first_ended(levels)), self.cells.get(levels)
        return ended == len(self.by_cell[levels]) or (cell is not None and ended < cell.seeds)

    def run_id(self, trial: Trial) -> str:
        """Of the run that stands for a trial; empty where there is none."""
        run = self.runs.get(trial.id)
        return run.run_id if run is not None else ""

    def result(self, trial: Trial) -> Result | None:
        """What came of a trial, once it has ended."""
        ended = self.ended.get(trial.id)
        return ended.result if ended is not None else None

    def take_in(self, trials: Sequence[Trial]) -> list[str]:
        """Add trials; the ids of those that are new."""
        new = []
        for trial in trials:
            if trial.id not in self.trials:
                self.trials[trial.id] = trial
                self.by_cell.setdefault(trial.cell.levels, []).append(trial)
                new.append(trial.id)
        return new

    def look(self, door: Door, *, fresh: bool) -> None:
        """Learn which runs are there; what was made twice, or is to be made anew, is deleted."""
        self.study_run, self.cells, self.runs = StudyRun(), {}, {}
        fresh = fresh and not door.is_rebuilding  # what an earlier one told is fresh enough
        named = {trials[0].cell.name: levels for levels, trials in self.by_cell.items()}
        surplus: list[str] = []  # deleted in the end: pages are counted from the first run
        for run in door.runs():
            tags, run_id = run.data.tags, run.info.run_id
            kind, trial_id = tags.get("kind"), tags.get("trial_id")
            levels = named.get(tags.get(runs.CELL, ""))
            form, told_as = runs.TOLD_AS
            if fresh or tags.get(form) != told_as:
                surplus.append(run_id)
            elif kind == "study" and not self.study_run.run_id:
                self.study_run = StudyRun(run_id, tags=dict(tags))
            elif kind == "cell" and levels is not None:
                if levels in self.cells:
                    surplus.append(run_id)  # made twice: the answer to the first was lost
                else:
                    self.cells[levels] = runs.recalled_cell(run)
            elif kind == "trial" and trial_id in self.trials:
                if trial_id in self.runs:
                    surplus.append(run_id)
                else:
                    self.runs[trial_id] = runs.recalled_trial(run)
        _delete(door, surplus)
        if fresh:
            door.begin_rebuilding()

    def compare(self, door: Door) -> set[str]:
        """Trials that have ended and do not stand in MLflow with all that is told of them; what
        was made twice is deleted, as its client asks again by itself where an answer is lost."""
        ours = {("study", ""): self.study_run.run_id}
        ours |= {("trial", trial_id): run.run_id for trial_id, run in self.runs.items()}
        for levels, cell in self.cells.items():
            ours["cell", self.by_cell[levels][0].cell.name] = cell.run_id
        there, surplus = set(), []
        for run in door.runs():
            tags = run.data.tags
            kind = tags.get("kind", "")
            name = tags.get({"trial": "trial_id", "cell": runs.CELL}.get(kind, ""), "")
            mine = ours.get((kind, name))
            if mine and mine != run.info.run_id:
                surplus.append(run.info.run_id)
            elif tags.get(runs.PROGRESS) == runs.COMPLETE:
                there.add(name)
        _delete(door, surplus)
        return self.ended.keys() - there


def _delete(door: Door, run_ids: Sequence[str]) -> None:
    for run_id in run_ids:
        door.patience.look_on()
        door.delete(run_id)
