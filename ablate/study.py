"""A study file: YAML in, a validated and frozen `Study` out.

Everything a study can get wrong is said before anything starts, all at once, each with file and
line, what is allowed, and the nearest valid name.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ablate import metrics, recipes
from ablate.cluster import Gang
from ablate.errors import StudyError, suggest
from ablate.factors import FIELDS, Sameness, same_experiment
from ablate.markers import thresholds as markers
from ablate.source import Problems, parse_yaml
from ablate.stores import check_url
from ablate.trial import Cell, Levels, Trial, identify

_MAX_BYTES = 1_000_000

EARLIEST_RUNG = 0.25
"""Of the schedule; nothing is judged before."""

SAMPLER_OPTIONS: dict[str, frozenset[str]] = {
    "tpe": frozenset(
        {"n_startup_trials", "n_ei_candidates", "multivariate", "group", "constant_liar"}
    ),
    "gp": frozenset({"n_startup_trials", "deterministic_objective"}),
    "qmc": frozenset({"qmc_type", "scramble"}),
    "random": frozenset(),
    "grid": frozenset(),
}
"""Samplers of a search by name, and the options each takes; their meaning is Optuna's."""
_MOST_SETTINGS = 1024
"""Up to this many settings of other factors are gone through to prove that levels are the same."""


class _Spec(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Objective(_Spec):
    """What the study is judged by: one evaluation measurement at a trial's last step."""

    metric: str = "imagenet_top1"
    """Name of an evaluation measurement; a fraction."""
    direction: metrics.Direction = "maximize"
    """Which way is better."""
    margin: float = Field(default=0.005, gt=0)
    """Smallest difference that would matter to you, in the metric's unit; fixed before running."""
    cost: str | None = None
    """What the metric is weighed against: gpu_hours, mean_step_time_s, peak_memory_gib,
    num_parameters, or another evaluation measurement. A search then looks for the Pareto front."""

    @property
    def sign(self) -> float:
        """1 where more of the metric is better, -1 where less is."""
        return 1.0 if self.direction == "maximize" else -1.0

    @property
    def cost_direction(self) -> metrics.Direction:
        """Which way the cost is better."""
        entry = metrics.describe(self.cost) if self.cost else None
        return (entry.direction if entry else None) or "minimize"

    @model_validator(mode="after")
    def _known_cost(self) -> Objective:
        if self.cost is None:
            return self
        allowed = [name for name in metrics.costs() if name != self.metric]
        entry = metrics.describe(self.cost)  # also of knn_top1/NAME
        if entry is None or entry.name not in metrics.costs():
            raise ValueError(f"cost {self.cost!r} is not measured; {suggest(self.cost, allowed)}")
        if self.cost == self.metric:
            raise ValueError(f"cost {self.cost!r} is the metric itself; {suggest('', allowed)}")
        return self

    @model_validator(mode="after")
    def _known_metric(self) -> Objective:
        known = metrics.objectives()
        entry = metrics.describe(self.metric)  # also of knn_top1/NAME
        if entry is None or not entry.objective:
            raise ValueError(f"metric {self.metric!r} is not known; {suggest(self.metric, known)}")
        declared = entry.direction
        if declared != self.direction:
            raise ValueError(f"{self.metric} is better the other way: set direction: {declared}")
        return self


class GangSpec(_Spec):
    """The processes that train one trial together."""

    workers: int = Field(default=1, ge=1)
    """Processes (ranks); batch_size is per worker."""
    gpus_per_worker: int = Field(default=0, ge=0)
    """Whole accelerators of each; 0 trains on the CPU."""
    cpus_per_worker: float = Field(default=1, gt=0)
    """Cores reserved for each."""
    strategy: Literal["PACK", "STRICT_PACK", "SPREAD", "STRICT_SPREAD"] = "PACK"
    """How the workers are laid over nodes; PACK prefers few nodes."""
    min_workers: int | None = Field(default=None, ge=1)
    """Go on with fewer workers, down to these, while machines are missing; recorded and flagged.

    Only numbers that divide `workers`: each worker then does the work of several, one after the
    other, so that the global batch stays. All of them or none, if left out.
    """

    @model_validator(mode="after")
    def _divisible(self) -> GangSpec:
        if self.min_workers is not None and not self.smaller:
            raise ValueError(
                f"min_workers is {self.min_workers}, and no number from there up to below "
                f"{self.workers} divides the {self.workers} workers: the global batch would change"
            )
        return self

    @property
    def smaller(self) -> tuple[int, ...]:
        """Numbers of workers that may stand in for all of them, the most first."""
        lowest = self.min_workers or self.workers
        return tuple(n for n in range(self.workers - 1, lowest - 1, -1) if self.workers % n == 0)

    def shape(self, workers: int | None = None) -> Gang:
        """What a cluster is asked for; fewer `workers` if given."""
        return Gang(
            workers or self.workers, self.cpus_per_worker, self.gpus_per_worker, self.strategy
        )


class Budget(_Spec):
    """What the study may cost. A block of seeds that may not fit is not begun; trials that take
    longer than any before are stopped, with a checkpoint, before the budget is spent."""

    gpu_hours: float | None = Field(default=None, gt=0)
    """Most accelerator-hours (worker-hours on CPU) the study may spend in all."""
    ask_above: float = Field(default=1.0, ge=0)
    """`launch` asks first when what is left to run may cost more hours than this."""
    attempts: int = Field(default=5, ge=1)
    """Most attempts of one trial that crash in a row without getting further."""


class SequentialSeeds(_Spec):
    """Add seeds one block at a time, for the contrasts that are still open."""

    min: int = Field(default=3, ge=2)
    """Blocks that are always run."""
    max: int = Field(default=12, ge=2)
    """Blocks at most."""
    until: Literal["decided"] = "decided"

    @model_validator(mode="after")
    def _ordered(self) -> SequentialSeeds:
        if self.max < self.min:
            raise ValueError(f"max ({self.max}) is below min ({self.min})")
        return self


class OneAtATime(_Spec):
    """The baseline, and every other level alone: 1 + sum(levels - 1) cells."""

    name: Literal["one_at_a_time"] = "one_at_a_time"


class FullFactorial(_Spec):
    """Every combination of levels."""

    name: Literal["full_factorial"] = "full_factorial"


class FractionalFactorial(_Spec):
    """A balanced fraction of all combinations, with its alias table.

    Factors have two levels; at resolution III some may have three (an orthogonal array). Levels
    that are provably the same experiment count as one.
    """

    name: Literal["fractional_factorial"] = "fractional_factorial"
    resolution: Literal["III", "IV", "V"] = "IV"
    """III: main effects mixed with pairs; IV: main effects clear of pairs; V: pairs clear too."""


class PlackettBurman(_Spec):
    """A screening design for many two-level factors in few cells."""

    name: Literal["plackett_burman"] = "plackett_burman"
    fold_over: bool = True
    """Also run the mirror image, which frees main effects from two-factor interactions."""


class LeaveOneOut(_Spec):
    """From a target: revert each changed factor alone; paired with adding each alone."""

    name: Literal["leave_one_out"] = "leave_one_out"
    target: dict[str, str] = Field(min_length=1)
    """Level of each factor that differs from the baseline in the setting under test."""


class AblationPath(_Spec):
    """From the baseline to a target, one factor a step, each step the best of those left."""

    name: Literal["ablation_path"] = "ablation_path"
    target: dict[str, str] = Field(min_length=1)
    """Level of each factor that differs from the baseline at the end of the path."""


class Prune(_Spec):
    """End runs of a search early that are behind, where that is known to be safe."""

    rungs: list[float] = Field(min_length=1)
    """Fractions of the schedule at which runs are compared; a quarter at least, and a tenth of
    the schedule behind the longest warmup."""
    keep: float = Field(default=0.5, gt=0, lt=1)
    """Share of the runs that a rung lets through."""
    speed_sensitive: list[str] = []
    """Factors that change how fast a run learns: runs are compared within their level."""

    @field_validator("rungs")
    @classmethod
    def _within_the_schedule(cls, value: list[float]) -> list[float]:
        for rung in value:
            if not EARLIEST_RUNG <= rung < 1:
                raise ValueError(
                    f"rung {rung:g}: early scores tell how fast a setting learns, not how good it "
                    f"becomes; give fractions of the schedule from {EARLIEST_RUNG} to below 1"
                )
        if len(set(value)) < len(value):
            raise ValueError("a rung is listed twice; keep one")
        return value


class Search(_Spec):
    """Ask a sampler for cells instead of listing them; each runs with all its seeds."""

    name: Literal["search"] = "search"
    cells: int = Field(default=20, ge=1)
    """Distinct cells to run."""
    sampler: Literal["tpe", "gp", "qmc", "random", "grid"] = "tpe"
    """How the next cell is chosen."""
    sampler_seed: int = 0
    """Seed of the sampler itself; not a replicate."""
    options: dict[str, Any] = {}
    """Options of the sampler, by Optuna's names."""
    prune: Prune | None = None
    """When a run may be ended early; never, if left out."""
    warm_start: list[str] = []
    """Folders of earlier studies whose cells inform the sampler; relative to the study's root."""
    then: Literal["nothing", "leave_one_out"] = "nothing"
    """What to run on the best cell found."""


Design = Annotated[
    OneAtATime
    | FullFactorial
    | FractionalFactorial
    | PlackettBurman
    | LeaveOneOut
    | AblationPath
    | Search,
    Field(discriminator="name"),
]

_DESIGNS = (
    "one_at_a_time",
    "full_factorial",
    "fractional_factorial",
    "plackett_burman",
    "leave_one_out",
    "ablation_path",
    "search",
)


class Range(_Spec):
    """A numeric interval that a search may draw from."""

    low: float
    high: float
    log: bool = False
    """Draw uniformly in the logarithm."""

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if self.low >= self.high:
            raise ValueError(f"low ({self.low}) must be below high ({self.high})")
        if self.log and self.low <= 0:
            raise ValueError(f"log: true needs low above 0, not {self.low}")
        return self


class Nuisance(_Spec):
    """Settings that are tuned anew inside every cell, with the same small budget.

    A level may look bad only because it needs another learning rate. Every cell, the baseline's
    too, is run with the same candidates on `seeds`; the best of them is then run on the study's
    own seeds, which take no part in the choice, and only these are compared.
    """

    settings: dict[str, list[Any] | Range] = Field(min_length=1)
    """Field of the recipe -> values to try, or a numeric range to take `points` from."""
    points: int | None = Field(default=None, ge=2)
    """Candidates in all, for ranges: one range is cut evenly, ends included; several settings
    are filled by a low-discrepancy sequence. Lists alone are tried in all combinations."""
    seeds: list[int] = Field(default=[1000], min_length=1)
    """Seeds of the tuning; none of the study's."""


class StudyFile(_Spec):
    """A study as it is written by hand."""

    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    """Name of the study and its folder; the file's name if left out."""
    recipe: str
    """What is trained: a file of ablate/recipes."""
    baseline: dict[str, Any]
    """The complete configuration that everything is compared with; fields of the recipe."""
    factors: dict[str, Any] = Field(min_length=1)
    """What is varied: a field with a list of values, or named levels that set several fields."""
    nuisance: Nuisance | None = None
    """What is tuned anew inside every cell, so that each level is judged at its own best."""
    controls: dict[str, list[str]] = {}
    """Factor -> levels that are run although they are provably the same experiment as another
    one; all others of that kind share that one's runs."""
    design: Design = OneAtATime()
    """Which cells are run: a design's name, or a mapping with its name and options."""
    seeds: list[int] | SequentialSeeds
    """Replicates: every cell is run with each seed; common seeds pair cells."""
    objective: Objective = Objective()
    gang: GangSpec = GangSpec()
    budget: Budget = Budget()
    markers: dict[str, Any] = {}
    """Thresholds of instability markers that differ from the defaults."""
    checkpoints: str | None = None
    """Where checkpoints are copied to, e.g. s3://bucket/prefix; on disk alone if left out."""

    @field_validator("checkpoints")
    @classmethod
    def _object_store(cls, value: str | None) -> str | None:
        return None if value is None else check_url(value)

    @field_validator("design", mode="before")
    @classmethod
    def _design_by_name(cls, value: Any) -> Any:
        name = value.get("name") if isinstance(value, Mapping) else value
        if isinstance(name, str) and name not in _DESIGNS:
            raise ValueError(f"design {name!r} is not known; {suggest(name, _DESIGNS)}")
        return {"name": value} if isinstance(value, str) else value

    @field_validator("seeds")
    @classmethod
    def _distinct_seeds(cls, value: list[int] | SequentialSeeds) -> list[int] | SequentialSeeds:
        if isinstance(value, SequentialSeeds):
            return value
        if not value:
            raise ValueError("no seed is listed; write at least one, e.g. seeds: [0, 1, 2]")
        repeated = sorted({seed for seed in value if value.count(seed) > 1})
        if repeated:
            raise ValueError(f"seed {repeated[0]} is listed twice; a repeat is no new replicate")
        if min(value) < 0:
            raise ValueError(f"seeds are 0 or more, not {min(value)}")
        return value


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


def load_study(path: Path | str, *, root: Path | str | None = None) -> Study:
    """Read, validate and resolve a study file.

    Relative data paths in it are relative to `root`, by default the current folder.

    Raises:
        StudyError: every problem found, a line each, as ``file:line: what, what is allowed``.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        text = path.read_text(encoding="utf-8") if size <= _MAX_BYTES else ""
    except FileNotFoundError:
        near = sorted(str(p) for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise StudyError(
            f"{path} does not exist." + (f" Found there: {', '.join(near)}." if near else "")
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise StudyError(f"{path} cannot be read as text: {error}") from error
    if size > _MAX_BYTES:
        raise StudyError(f"{path} has {size} bytes; a study file has at most {_MAX_BYTES}.")
    return parse_study(text, path=str(path), root=root)


def parse_study(text: str, *, path: str, root: Path | str | None = None) -> Study:
    """Like :func:`load_study`, for the text of a study file."""
    content, lines = parse_yaml(text, path)
    problems = Problems(path, lines, tags=(*_DESIGNS, "SequentialSeeds"))
    try:
        file = StudyFile.model_validate(content)
    except ValidationError as error:
        problems.add_validation(error, (), StudyFile)
        raise problems.error() from None
    try:
        recipe = recipes.load(file.recipe)
    except ValueError as error:
        problems.add(("recipe",), str(error))
        raise problems.error() from None

    if "seed" in file.baseline:
        problems.add(
            ("baseline", "seed"),
            "a seed is a replicate, not a setting: remove it and list it under seeds",
        )
    seeds = tuple(range(file.seeds.max)) if isinstance(file.seeds, SequentialSeeds) else file.seeds
    resolved = _resolve(recipe, file.baseline, {}, problems, ("baseline",))
    problems.raise_if_any()
    assert resolved is not None

    factors = _parse_factors(file, recipe, resolved, problems)
    nuisance, candidates = _parse_nuisance(file, recipe, resolved, factors, seeds, problems)
    _check_controls(file, factors, problems)
    problems.raise_if_any()
    factors = tuple(
        replace(factor, twins=_twins(factor, file, recipe, factors)) for factor in factors
    )
    _check_design(file, factors, problems)
    for key, message in markers.check_thresholds(file.markers):
        problems.add(("markers", *key), message)
    problems.raise_if_any()
    return Study(
        name=file.name or re.sub(r"[^A-Za-z0-9._-]", "-", Path(path).stem),
        path=path,
        recipe=file.recipe,
        baseline=file.baseline,
        factors=(*factors, *nuisance),
        candidates=candidates,
        tuning_seeds=tuple(file.nuisance.seeds) if file.nuisance else (),
        controls=frozenset(
            (name, level) for name in file.controls for level in file.controls[name]
        ),
        design=file.design,
        seeds=tuple(seeds),
        sequential=file.seeds if isinstance(file.seeds, SequentialSeeds) else None,
        objective=file.objective,
        gang=file.gang,
        budget=file.budget,
        markers=file.markers,
        root=str(Path(root or ".").resolve()),
        checkpoints=file.checkpoints,
        text=text,
    )


def json_schema() -> dict[str, Any]:
    """The JSON schema of study files, with the fields of every recipe, for editors."""
    schema = StudyFile.model_json_schema()
    definitions = schema.setdefault("$defs", {})
    choices = []
    for name in recipes.names():
        fields = recipes.load(name).Config.model_json_schema(ref_template="#/$defs/{model}")
        definitions.update(fields.pop("$defs", {}))
        fields.pop("required", None)
        fields.get("properties", {}).pop("seed", None)
        definitions[f"baseline-{name}"] = {**fields, "title": f"Baseline of the {name} recipe"}
        choices.append(
            {
                "if": {"properties": {"recipe": {"const": name}}},
                "then": {"properties": {"baseline": {"$ref": f"#/$defs/baseline-{name}"}}},
            }
        )
    schema["properties"]["recipe"]["enum"] = list(recipes.names())
    schema["properties"]["design"] = {
        "anyOf": [schema["properties"]["design"], {"enum": list(_DESIGNS)}]
    }
    schema["properties"]["markers"] = markers.thresholds_schema()
    schema["allOf"] = choices
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "ablate study"
    return schema


# --------------------------------------------------------------------------- factors


def _parse_factors(
    file: StudyFile,
    recipe: recipes.Recipe,
    resolved: Mapping[str, Any],
    problems: Problems,
) -> tuple[Factor, ...]:
    factors = []
    owner: dict[str, str] = {}  # field -> the factor that sets it
    for name, spec in file.factors.items():
        factor = _parse_factor(name, spec, file, recipe, resolved, problems)
        if factor is None:
            continue
        for key in sorted(factor.fields):
            if key in owner:
                problems.add(
                    ("factors", name),
                    f"factors {owner[key]!r} and {name!r} both set {key}, so their levels "
                    f"contradict each other; let one factor set {key}",
                )
            owner[key] = name
        factors.append(factor)
    return tuple(factors)


def _parse_factor(
    name: str,
    spec: Any,
    file: StudyFile,
    recipe: recipes.Recipe,
    resolved: Mapping[str, Any],
    problems: Problems,
) -> Factor | None:
    place = ("factors", name)
    known = [field for field in recipe.Config.model_fields if field != "seed"]
    if name == "seed":
        problems.add(place, "seeds are replicates, never a factor; list them under seeds")
        return None
    if isinstance(spec, Mapping) and "low" in spec and "high" in spec:
        return _parse_range(name, spec, known, resolved, problems)
    if isinstance(spec, list):
        if name not in known:
            problems.add(
                place,
                f"{name!r} is no field of the {file.recipe} recipe; {suggest(name, known)}. "
                "A factor with a name of its own needs named levels: "
                "{level name: {field: value, ...}, ...}",
            )
            return None
        named = [(_level_name(value), {name: value}, (*place, i)) for i, value in enumerate(spec)]
    elif isinstance(spec, Mapping):
        named = []
        for level, fields in spec.items():
            if not isinstance(fields, Mapping):
                if name not in known:
                    problems.add(
                        (*place, level),
                        f"level {level!r} must be a mapping of fields, not {fields!r}",
                    )
                    continue
                fields = {name: fields}
            named.append((str(level), dict(fields), (*place, level)))
    else:
        problems.add(
            place,
            f"levels must be a list of values or named levels, not {spec!r}; "
            f"write {name}: [{_level_name(spec)}, ...]",
        )
        return None
    if not named:
        problems.add(place, "the factor has no level; list at least two values")
        return None

    levels: list[Level] = []
    seen: dict[str, str] = {}  # resolved configuration -> level name
    baseline_name: str | None = None
    for level_name, fields, where in named:
        config = _resolve(recipe, file.baseline, fields, problems, where)
        if config is None:
            continue
        key = json.dumps(config, sort_keys=True)
        if key in seen:
            problems.add(
                where,
                f"level {level_name!r} is the same experiment as level {seen[key]!r}; remove one",
            )
            continue
        seen[key] = level_name
        if config == resolved:
            baseline_name = level_name
        levels.append(Level(level_name, tuple(sorted(fields.items()))))
    if baseline_name is None:
        # A list such as lr: [3e-3] asks for these values against the baseline's own.
        value = resolved.get(name)
        baseline_name = _level_name(value) if name in resolved else "baseline"
        levels.insert(0, Level(baseline_name, ()))
    if len(levels) < 2 and not problems.at(place):
        problems.add(
            place,
            f"the only level, {baseline_name!r}, is the baseline itself; add a level to compare",
        )
        return None
    return Factor(name, tuple(levels), baseline_name)


def _parse_range(
    name: str,
    spec: Mapping[str, Any],
    known: Sequence[str],
    resolved: Mapping[str, Any],
    problems: Problems,
) -> Factor | None:
    place = ("factors", name)
    if name not in known:
        problems.add(place, f"{name!r} is no field of the recipe; {suggest(name, known)}")
        return None
    try:
        span = Range.model_validate(dict(spec))
    except ValidationError as error:
        problems.add_validation(error, place, Range)
        return None
    value = resolved[name]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        problems.add(place, f"{name} is not a number, so it cannot be drawn from a range")
        return None
    return Factor(name, (), _level_name(value), span)


def _parse_nuisance(
    file: StudyFile,
    recipe: recipes.Recipe,
    resolved: Mapping[str, Any],
    factors: Sequence[Factor],
    seeds: Sequence[int],
    problems: Problems,
) -> tuple[tuple[Factor, ...], tuple[dict[str, str], ...]]:
    """The nuisance settings as factors, and the candidates as levels of them."""
    spec = file.nuisance
    if spec is None:
        return (), ()
    place = ("nuisance",)
    known = [field for field in recipe.Config.model_fields if field != "seed"]
    taken = {key: factor.name for factor in factors for key in (*factor.fields, factor.name)}
    for name, span in spec.settings.items():
        here = (*place, "settings", name)
        if name not in known:
            problems.add(here, f"{name!r} is no field of the recipe; {suggest(name, known)}")
        elif name in taken:
            problems.add(
                here, f"factor {taken[name]!r} sets {name}, too; compare it or tune it, not both"
            )
        elif isinstance(span, Range) and not isinstance(resolved[name], (int, float)):
            problems.add(here, f"{name} is not a number; list the values to try")
        elif isinstance(span, list) and len(span) < 2:
            problems.add(here, "list at least two values to choose from")
    ranges = [name for name, span in spec.settings.items() if isinstance(span, Range)]
    if ranges and spec.points is None:
        problems.add(place, f"{ranges[0]} is a range: say how many points to try, e.g. points: 3")
    if not ranges and spec.points is not None:
        problems.add(
            (*place, "points"),
            "points is for ranges; listed values are tried in all combinations",
        )
    both = sorted(set(spec.seeds) & set(seeds))
    if both:
        problems.add(
            (*place, "seeds"),
            f"seed {both[0]} is one of the study's seeds, so the choice would be judged by the "
            "runs that made it; give other seeds, e.g. seeds: [1000]",
        )
    if len(set(spec.seeds)) < len(spec.seeds) or min(spec.seeds) < 0:
        problems.add((*place, "seeds"), "seeds are different numbers, 0 or more")
    if isinstance(file.design, Search):
        problems.add(
            place,
            "a search chooses among all settings by itself: make the nuisance a factor of the "
            "search, or set another design",
        )
    if problems.at(place):
        return (), ()
    candidates: list[dict[str, str]] = []
    levels: dict[str, dict[str, Level]] = {
        name: {_level_name(resolved[name]): Level(_level_name(resolved[name]), ())}
        for name in spec.settings
    }
    for point in _points(spec, resolved):
        if _resolve(recipe, file.baseline, point, problems, (*place, "settings")) is None:
            return (), ()
        names = {name: _level_name(value) for name, value in point.items()}
        for name, value in point.items():
            levels[name].setdefault(names[name], Level(names[name], ((name, value),)))
        if names not in candidates:
            candidates.append(names)
    made = tuple(
        Factor(name, tuple(found.values()), _level_name(resolved[name]), is_nuisance=True)
        for name, found in levels.items()
    )
    return made, tuple(candidates)


def _points(spec: Nuisance, resolved: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The values of the nuisance settings to try, in order."""
    names = list(spec.settings)
    if spec.points is None:
        lists = [span for span in spec.settings.values() if isinstance(span, list)]
        return [dict(zip(names, values, strict=True)) for values in itertools.product(*lists)]
    if len(names) == 1:
        places = [[i / (spec.points - 1)] for i in range(spec.points)]
    else:
        from scipy.stats import qmc

        places = qmc.Halton(len(names), scramble=True, rng=0).random(spec.points).tolist()
    return [
        {
            name: _value_at(span, share, whole=isinstance(resolved[name], int))
            for (name, span), share in zip(spec.settings.items(), place, strict=True)
        }
        for place in places
    ]


def _value_at(span: list[Any] | Range, share: float, *, whole: bool) -> Any:
    """The value at a share in [0, 1] of a range (three digits are kept) or of a list."""
    if isinstance(span, list):
        return span[min(int(share * len(span)), len(span) - 1)]
    if span.log:
        value = span.low * (span.high / span.low) ** share
    else:
        value = span.low + (span.high - span.low) * share
    return round(value) if whole else float(f"{value:.3g}")


def _check_design(file: StudyFile, factors: Sequence[Factor], problems: Problems) -> None:
    design = file.design
    if isinstance(design, (AblationPath, Search)) and isinstance(file.seeds, SequentialSeeds):
        problems.add(
            ("seeds",),
            f"{design.name} compares cells over all their seeds before it goes on, so seeds "
            "cannot be added later; list them, e.g. seeds: [0, 1, 2]",
        )
    by_name = {factor.name: factor for factor in factors}
    if not isinstance(design, Search):
        for factor in factors:
            if factor.range is not None:
                problems.add(
                    ("factors", factor.name),
                    f"a range can only be searched, and the design is {design.name}; "
                    "list the values to compare, or set design: search",
                )
    if isinstance(design, Search):
        _check_search(file, design, by_name, problems)
    if isinstance(design, (LeaveOneOut, AblationPath)):
        for name, level in design.target.items():
            if name not in by_name:
                problems.add(
                    ("design", "target", name),
                    f"{name!r} is not a factor; {suggest(name, by_name)}",
                )
                continue
            levels = [item.name for item in by_name[name].levels]
            if level not in levels:
                problems.add(
                    ("design", "target", name),
                    f"{level!r} is no level of {name}; {suggest(level, levels)}",
                )
    if isinstance(design, (FractionalFactorial, PlackettBurman)):
        three = isinstance(design, FractionalFactorial) and design.resolution == "III"
        allowed = "two or three levels" if three else "two levels"
        for factor in factors:
            count = len(factor.distinct())
            if factor.range is None and count > (3 if three else 2):
                hint = ""
                if count == 3 and isinstance(design, FractionalFactorial):
                    hint = " (resolution III takes three levels, too)"
                problems.add(
                    ("factors", factor.name),
                    f"{design.name} needs {allowed} of every factor, {factor.name} has {count} "
                    f"different ones{hint}; leave some out, or set design: one_at_a_time",
                )


def _check_search(
    file: StudyFile, design: Search, by_name: Mapping[str, Factor], problems: Problems
) -> None:
    allowed = sorted(SAMPLER_OPTIONS[design.sampler])
    for name in design.options:
        if name not in allowed:
            problems.add(
                ("design", "options", name),
                f"sampler {design.sampler} has no option {name!r}; "
                + (suggest(name, allowed) if allowed else "it takes none"),
            )
    ranged = [name for name, factor in by_name.items() if factor.range is not None]
    if design.sampler == "grid" and ranged:
        problems.add(
            ("factors", ranged[0]),
            "sampler grid needs listed levels; list the values, or take sampler: qmc",
        )
    if design.prune is None:
        return
    place = ("design", "prune")
    if file.objective.cost is not None:
        problems.add(
            place,
            "runs are compared by their score alone, so the cheap ones of a search that weighs "
            f"{file.objective.cost} would be ended for it; remove prune or objective.cost",
        )
    for index, name in enumerate(design.prune.speed_sensitive):
        where = (*place, "speed_sensitive", index)
        if name not in by_name:
            problems.add(where, f"{name!r} is not a factor; {suggest(name, by_name)}")
        elif name in ranged:
            problems.add(
                where,
                f"{name} is drawn from a range, so no two runs share its level; list its values",
            )


def _check_controls(file: StudyFile, factors: Sequence[Factor], problems: Problems) -> None:
    by_name = {factor.name: [item.name for item in factor.levels] for factor in factors}
    for name, levels in file.controls.items():
        if name not in by_name:
            if not problems.at(("factors", name)):
                problems.add(
                    ("controls", name), f"{name!r} is not a factor; {suggest(name, by_name)}"
                )
            continue
        for level in levels:
            if level not in by_name[name]:
                problems.add(
                    ("controls", name),
                    f"{level!r} is no level of {name}; {suggest(level, by_name[name])}",
                )


def _twins(
    factor: Factor, file: StudyFile, recipe: recipes.Recipe, factors: Sequence[Factor]
) -> dict[str, tuple[str, Sameness]]:
    """Levels that repeat an earlier one in every setting of the other factors."""
    controls = file.controls.get(factor.name, ())
    others = [
        other.levels
        for other in factors
        if other is not factor and not other.fields.isdisjoint(FIELDS)
    ]
    if math.prod(map(len, others)) > _MOST_SETTINGS:
        return {}
    settings = list(itertools.product(*others))

    def experiment(level: Level, setting: Sequence[Level]) -> dict[str, Any] | None:
        fields = {**file.baseline, **dict(level.fields)}
        for other in setting:
            fields.update(other.fields)
        try:
            config: dict[str, Any] = recipe.Config(**fields).model_dump(mode="json")
        except ValidationError:
            return None  # no cell of this setting can be run
        return {name: value for name, value in config.items() if name not in recipe.NOT_IDENTITY}

    def sameness(one: Level, two: Level) -> Sameness | None:
        found: dict[str, Sameness] = {}
        for setting in settings:
            pair = experiment(one, setting), experiment(two, setting)
            if pair[0] is None or pair[1] is None:
                continue
            same = same_experiment(pair[0], pair[1], workers=file.gang.workers)
            if same is None:
                return None
            found.setdefault(",".join(same.reasons), same)
        return next(iter(found.values()), None)

    homes: list[Level] = []
    twins: dict[str, tuple[str, Sameness]] = {}
    ordered = sorted(factor.levels, key=lambda level: level.name != factor.baseline)
    for level in ordered:
        if level.name in controls:
            continue
        for home in homes:
            same = sameness(home, level)
            if same is not None:
                twins[level.name] = (home.name, same)
                break
        else:
            homes.append(level)
    return twins


def _resolve(
    recipe: recipes.Recipe,
    baseline: Mapping[str, Any],
    fields: Mapping[str, Any],
    problems: Problems,
    place: tuple[Any, ...],
) -> dict[str, Any] | None:
    if "seed" in fields:
        problems.add(place, "a level must not set the seed: seeds are replicates")
        return None
    try:
        config = recipe.Config(**{**baseline, **fields})
    except ValidationError as error:
        problems.add_validation(error, place, recipe.Config)
        return None
    resolved: dict[str, Any] = config.model_dump(mode="json")
    return resolved


def _level_name(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return repr(value)
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value)
