"""A study as the rest of the house sees it: validated, resolved and frozen."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ablate.analysis.hypothesis import Expectation
from ablate.study.schema import Budget, Design, GangSpec, Objective, Range, Search, SequentialSeeds
from ablate.trial.identity import Cell, Levels, Trial, identify
from ablate.trial.metrics import Metric
from ablate.trial.recipe import describe, load, no_identity
from ablate.trial.same import Sameness
from ablate.words import name_levels

_FRESH_SEED = 2000
"""The first of the seeds that confirm a search, unless its own go further."""
_NUM_FRESH = 3
_NUM_SPARE = 3


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

    only_if: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Other factor -> its levels with which this one is varied; it stands at the baseline else."""
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
class Source:
    """The file that a study was read from."""

    path: str
    text: str
    """Kept with the results."""


@dataclass(frozen=True, slots=True)
class Candidates:
    """What the nuisance settings may be inside every cell; empty without any."""

    levels: tuple[Mapping[str, str], ...] = ()
    seeds: tuple[int, ...] = ()
    """Seeds on which they are tried."""


@dataclass(frozen=True, slots=True)
class Study:
    """What one study file asks, validated and resolved."""

    name: str
    source: Source
    recipe: str
    baseline: Mapping[str, Any]
    """Fields as written; `config` resolves them."""
    factors: tuple[Factor, ...]
    """What is compared, then the nuisance settings."""
    candidates: Candidates
    controls: frozenset[tuple[str, str]]
    """(factor, level) of levels that are run to be compared with and never handed out."""
    hypothesis: tuple[Expectation, ...]
    """What was expected before the runs."""
    design: Design
    confirm: bool
    """Whether the changes that look better alone are run together at the end."""
    seeds: tuple[int, ...]
    """All seeds, or with sequential seeds all that may be used."""
    sequential: SequentialSeeds | None
    objective: Objective
    metrics: tuple[Metric, ...]
    """What the recipe's runs may be judged by."""
    gang: GangSpec
    budget: Budget
    markers: Mapping[str, Any]
    root: str
    checkpoints: str | None
    """Place in an object store that checkpoints are copied to."""
    notify: tuple[str, ...] = ()
    """Who is told what happens: addresses, or env:NAME."""

    def checkpoints_of(self, trial_id: str) -> str | None:
        """Where a trial's checkpoints are copied to; None when nowhere."""
        return self.checkpoints and f"{self.checkpoints}/{self.name}/{trial_id}"

    def price(self, worker_hours: float) -> float | None:
        """What so many worker-hours cost; None where the study names no price."""
        price = self.budget.price_per_gpu_hour
        return None if price is None else worker_hours * max(self.gang.gpus_per_worker, 1) * price

    def factor(self, name: str) -> Factor:
        return next(factor for factor in self.factors if factor.name == name)

    @property
    def fresh_seeds(self) -> tuple[int, ...]:
        """Seeds that confirm a search: none of those by which it chose."""
        if not isinstance(self.design, Search):
            return ()
        first = max(_FRESH_SEED, max(self.spare_seeds) + 1)
        return tuple(range(first, first + _NUM_FRESH))

    @property
    def spare_seeds(self) -> tuple[int, ...]:
        """Seeds on which a search may run a promising cell again before it has chosen."""
        if not isinstance(self.design, Search):
            return ()
        first = max(self.seeds) + 1
        return tuple(range(first, first + _NUM_SPARE))

    @property
    def compared(self) -> tuple[Factor, ...]:
        """The factors that the study is about: all but the nuisance settings."""
        return tuple(factor for factor in self.factors if not factor.is_nuisance)

    @property
    def nuisance(self) -> tuple[Factor, ...]:
        """The settings that are tuned inside every cell."""
        return tuple(factor for factor in self.factors if factor.is_nuisance)

    @property
    def file(self) -> str:
        """The study file's name, for commands to type."""
        return self.source.path.replace("\\", "/").rsplit("/", 1)[-1]

    def describe(self, metric: str) -> Metric | None:
        """What the recipe declares of a measurement."""
        return describe(self.metrics, metric)

    def is_share(self, metric: str) -> bool:
        """Whether a measurement is a fraction, which people are told in per cent."""
        declared = self.describe(metric)
        return declared is not None and declared.unit == "fraction"

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
        changed = {name: level for name, level in levels.items() if usual.get(name) != level}
        return name_levels(changed) or "baseline"

    def cell(self, levels: Mapping[str, str]) -> Cell:
        """The cell of these levels; factors that are not named stand at the baseline.

        A level of a range factor is its value, written as text. So do those that do not count
        with the levels of others (`only_if`).
        """
        named: dict[str, str] = {}
        fields: dict[str, Any] = {}
        # What counts under a condition is set last: it may narrow what the condition's level sets.
        for factor in sorted(self.factors, key=lambda factor: bool(factor.only_if)):
            name = levels.get(factor.name, factor.baseline)
            if not self.counts(factor, levels):
                name = factor.baseline
            named[factor.name] = name
            if factor.range is not None:
                if name != factor.baseline:
                    fields[factor.name] = float(name)
                continue
            fields.update(factor.level(name).fields)
        levels_of = tuple((factor.name, named[factor.name]) for factor in self.factors)
        return Cell(levels_of, tuple(sorted(fields.items())))

    def counts(self, factor: Factor, levels: Mapping[str, str]) -> bool:
        """Whether a factor is varied in a cell of these levels."""
        usual = {other.name: other.baseline for other in self.factors}
        return all(levels.get(n, usual[n]) in wanted for n, wanted in factor.only_if.items())

    def config(self, cell: Cell, *, seed: int) -> dict[str, Any]:
        """The fully resolved configuration of a cell and seed."""
        recipe = load(self.recipe)
        fields = {**self.baseline, **dict(cell.fields), "seed": seed}
        config: dict[str, Any] = recipe.Config(**fields).model_dump(mode="json")
        return config

    def trial(self, cell: Cell, *, seed: int) -> Trial:
        """A cell with a seed, resolved and identified."""
        recipe = load(self.recipe)
        config = self.config(cell, seed=seed)
        return Trial(
            id=identify(
                self.recipe,
                config,
                workers=self.gang.workers,
                not_identity=no_identity(recipe.Config, config),
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
        known = (*self.seeds, *self.candidates.seeds, *self.spare_seeds, *self.fresh_seeds)
        if content["seed"] not in known:
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
