"""What a study file may say: its keys, their types, defaults and meanings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ablate import metrics, recipes
from ablate.cluster import Gang
from ablate.errors import suggest
from ablate.markers import thresholds as markers
from ablate.stores import check_url

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

DESIGNS = (
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
        if isinstance(name, str) and name not in DESIGNS:
            raise ValueError(f"design {name!r} is not known; {suggest(name, DESIGNS)}")
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
        "anyOf": [schema["properties"]["design"], {"enum": list(DESIGNS)}]
    }
    schema["properties"]["markers"] = markers.thresholds_schema()
    schema["allOf"] = choices
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "ablate study"
    return schema
