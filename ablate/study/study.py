"""A study as the rest of the house sees it: validated, resolved and frozen."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ablate import recipes
from ablate.factors import Sameness
from ablate.study.schema import Budget, Design, GangSpec, Objective, Range, SequentialSeeds
from ablate.trial import Cell, Levels, Trial, identify


@dataclass(frozen=True, slots=True)
class Level:
    """One value of a factor: fields that change together, under a name."""

    name: str
    fields: tuple[tuple[str, Any], ...]


@dataclass(frozen=True, slots=True)
class Factor:
    """One thing varied. `levels` is empty for a factor that is drawn from `range`."""

    name: str
    levels: tuple[Level, ...]
    baseline: str
    """Name of the level that leaves the baseline unchanged."""
    range: Range | None = None

    is_nuisance: bool = False
    """Tuned inside every cell; never compared."""
    twins: Mapping[str, tuple[str, Sameness]] = field(default_factory=dict)
    """Level -> the earlier level that is provably the same experiment whatever the other factors
    are, and why; controls have none."""

    def level(self, name: str) -> Level:
        return next(level for level in self.levels if level.name == name)

    @property
    def fields(self) -> frozenset[str]:
        """Fields of the configuration that its levels set."""
        return frozenset(key for level in self.levels for key, _ in level.fields) or frozenset(
            {self.name}
        )

    def distinct(self) -> tuple[str, ...]:
        """Names of the levels that differ from each other, the baseline's first."""
        names = [self.baseline, *(item.name for item in self.levels)]
        return tuple(name for name in dict.fromkeys(names) if name not in self.twins)


@dataclass(frozen=True, slots=True)
class Study:
    """What one study file asks, validated and resolved."""

    name: str
    path: str
    recipe: str
    baseline: Mapping[str, Any]
    """Fields as written; `config` resolves them."""
    factors: tuple[Factor, ...]
    """What is compared, then the nuisance settings."""
    candidates: tuple[Mapping[str, str], ...]
    """Levels of the nuisance settings that are tried inside every cell; empty without any."""
    tuning_seeds: tuple[int, ...]
    """Seeds on which the candidates are tried."""
    controls: frozenset[tuple[str, str]]
    """(factor, level) of levels that are run although they are the same as another one."""
    design: Design
    seeds: tuple[int, ...]
    """All seeds, or with sequential seeds all that may be used."""
    sequential: SequentialSeeds | None
    objective: Objective
    gang: GangSpec
    budget: Budget
    markers: Mapping[str, Any]
    root: str
    checkpoints: str | None
    """Place in an object store that checkpoints are copied to."""
    text: str
    """The file itself, kept with the results."""

    def checkpoints_of(self, trial_id: str) -> str | None:
        """Where a trial's checkpoints are copied to; None when nowhere."""
        return self.checkpoints and f"{self.checkpoints}/{self.name}/{trial_id}"

    def factor(self, name: str) -> Factor:
        return next(factor for factor in self.factors if factor.name == name)

    @property
    def compared(self) -> tuple[Factor, ...]:
        """The factors that the study is about: all but the nuisance settings."""
        return tuple(factor for factor in self.factors if not factor.is_nuisance)

    @property
    def nuisance(self) -> tuple[Factor, ...]:
        """The settings that are tuned inside every cell."""
        return tuple(factor for factor in self.factors if factor.is_nuisance)

    def baseline_levels(self) -> dict[str, str]:
        return {factor.name: factor.baseline for factor in self.factors}

    def compared_baseline(self) -> dict[str, str]:
        """The baseline's level of every factor that is compared."""
        return {factor.name: factor.baseline for factor in self.compared}

    def compared_levels(self, levels: Levels) -> Levels:
        """These levels without the nuisance settings."""
        settings = self.nuisance_levels(levels)
        return tuple((name, level) for name, level in levels if name not in settings)

    def nuisance_levels(self, levels: Levels) -> dict[str, str]:
        """The nuisance settings among these levels."""
        names = {factor.name for factor in self.nuisance}
        return {name: level for name, level in levels if name in names}

    def untuned(self, levels: Levels) -> Levels:
        """These levels with the nuisance settings at the baseline."""
        usual = {factor.name: factor.baseline for factor in self.nuisance}
        return tuple((name, usual.get(name, level)) for name, level in levels)

    def change_name(self, levels: Mapping[str, str]) -> str:
        """What differs from the baseline, for people: ``beta2=0.999, warmup=1`` or ``baseline``."""
        usual = self.baseline_levels()
        changed = [f"{name}={level}" for name, level in levels.items() if usual.get(name) != level]
        return ", ".join(changed) or "baseline"

    def cell(self, levels: Mapping[str, str]) -> Cell:
        """The cell of these levels; factors that are not named stand at the baseline.

        A level of a range factor is its value, written as text.
        """
        named: list[tuple[str, str]] = []
        fields: dict[str, Any] = {}
        for factor in self.factors:
            name = levels.get(factor.name, factor.baseline)
            named.append((factor.name, name))
            if factor.range is not None:
                if name != factor.baseline:
                    fields[factor.name] = float(name)
                continue
            fields.update(factor.level(name).fields)
        return Cell(tuple(named), tuple(sorted(fields.items())))

    def config(self, cell: Cell, *, seed: int) -> dict[str, Any]:
        """The fully resolved configuration of a cell and seed."""
        recipe = recipes.load(self.recipe)
        fields = {**self.baseline, **dict(cell.fields), "seed": seed}
        config: dict[str, Any] = recipe.Config(**fields).model_dump(mode="json")
        return config

    def trial(self, cell: Cell, *, seed: int) -> Trial:
        """A cell with a seed, resolved and identified."""
        recipe = recipes.load(self.recipe)
        config = self.config(cell, seed=seed)
        return Trial(
            id=identify(
                self.recipe,
                config,
                workers=self.gang.workers,
                not_identity=recipe.NOT_IDENTITY,
            ),
            study=self.name,
            cell=cell,
            seed=seed,
            recipe=self.recipe,
            config=config,
            gang=self.gang.model_dump(exclude_none=True),
            objective=self.objective.model_dump(),
            markers=self.markers,
            root=self.root,
        )

    def recall(self, content: Mapping[str, Any]) -> Trial | None:
        """The trial of a trial.json as the study sees it today; None if it wants it no more.

        Factors that were added since stand at their baseline level, removed ones are dropped; the
        hash of the resolved configuration decides whether it is still the same experiment.
        """
        levels: dict[str, str] = {}
        for factor in self.factors:
            level = content["levels"].get(factor.name, factor.baseline)
            if factor.range is None and level not in {item.name for item in factor.levels}:
                return None
            levels[factor.name] = level
        if content["seed"] not in (*self.seeds, *self.tuning_seeds):
            return None
        trial = self.trial(self.cell(levels), seed=content["seed"])
        return trial if trial.id == content["id"] else None


def name_level(value: Any) -> str:
    """The name of a level that is written as a plain value."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return repr(value)
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value)
