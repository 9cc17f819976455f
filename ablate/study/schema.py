"""What a study file may say: its keys, their types, defaults and meanings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    PrivateAttr,
    Tag,
    field_validator,
    model_validator,
)

from ablate.analysis.course import At
from ablate.cluster.contract import Shape
from ablate.errors import suggest
from ablate.markers import thresholds as markers
from ablate.records.names import STUDY_NAME
from ablate.records.stores import check_url
from ablate.trial import recipe
from ablate.trial.metrics import Direction

EARLIEST_RUNG = 0.25
"""Of the schedule; nothing is judged before."""

LAST_SEED = 2**31 - 1
"""open_clip_train adds the rank to it, and NumPy takes 32 bits."""
_MOST_SEEDS = 1000

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
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


class Objective(_Spec):
    """What the study is judged by: one evaluation measurement at a trial's last step."""

    metric: str = ""
    """Name of an evaluation measurement; the recipe's first if left out."""
    direction: Direction = "maximize"
    """Which way is better."""
    margin: float = Field(default=0.005, gt=0)
    """Smallest difference that would matter to you, in the metric's unit; fixed before running."""
    cost: str | None = None
    """What the metric is weighed against: gpu_hours, mean_step_time_s, peak_memory_gib,
    num_parameters, or another evaluation measurement. A search then looks for the Pareto front."""
    at: At = "last"
    """Which number of its evaluations a run counts with: the last one, the mean of the last `k`, or
    the one at which `heldout` was best. The report says how much each of them tells."""
    k: int = Field(default=3, ge=2)
    """How many evaluations mean_last_k takes."""
    heldout: str | None = None
    """The measurement that chooses the evaluation, on other data than the metric's."""

    @field_validator("at", mode="before")
    @classmethod
    def _not_by_itself(cls, value: Any) -> Any:
        if isinstance(value, str) and value.startswith("best") and value != "best_by_heldout":
            raise ValueError(
                "the best of what is reported is better than the run is, the more so the noisier "
                "it is; write at: best_by_heldout and heldout: a measurement on other data, or at: "
                "mean_last_k"
            )
        return value

    @model_validator(mode="after")
    def _chosen_by_another(self) -> Objective:
        if self.at == "best_by_heldout" and self.heldout is None:
            raise ValueError("at: best_by_heldout needs heldout: a measurement on other data")
        if self.heldout is not None and self.heldout == self.metric:
            raise ValueError(
                f"heldout is the metric itself, {self.metric}: the best of what is reported would "
                "be reported; name a measurement on other data"
            )
        return self

    @property
    def sign(self) -> float:
        """1 where more of the metric is better, -1 where less is."""
        return 1.0 if self.direction == "maximize" else -1.0

    def name_choice(self, at: At) -> str:
        """For people: which of its evaluations a run counts with."""
        match at:
            case "mean_last_k":
                return f"mean of the last {self.k} evaluations"
            case "best_by_heldout":
                return f"where {self.heldout} is best"
        return "last evaluation"

    _cost_direction: Direction = PrivateAttr("minimize")

    @property
    def cost_direction(self) -> Direction:
        """Which way the cost is better."""
        return self._cost_direction

    def resolved(
        self, *, metric: str, direction: Direction, cost_direction: Direction
    ) -> Objective:
        """The same with what the recipe declares of its measurements."""
        found = self.model_copy(update={"metric": metric, "direction": direction})
        found._cost_direction = cost_direction
        return found


_LABEL = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9./_-]*$")


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
    labels: dict[Annotated[str, _LABEL], Annotated[str, _LABEL]] | None = None
    """Only nodes with these labels of Ray's: {ray.io/accelerator-type: H100}, or labels that
    `ray start --labels` gave them (a rack, a pool). Any node, if left out."""
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

    def shape(self, workers: int | None = None) -> Shape:
        """What a cluster is asked for; fewer `workers` if given."""
        return Shape(
            workers or self.workers,
            self.cpus_per_worker,
            self.gpus_per_worker,
            self.strategy,
            tuple(sorted((self.labels or {}).items())),
        )


class Budget(_Spec):
    """What the study may cost. A block of seeds that may not fit is not begun; trials that take
    longer than any before are stopped, with a checkpoint, before the budget is spent."""

    gpu_hours: float | None = Field(default=None, gt=0)
    """Most accelerator-hours (worker-hours on CPU) the study may spend in all."""
    ask_above: float = Field(default=1.0, ge=0)
    """`launch` asks first when what is left to run may cost more hours than this."""
    price_per_gpu_hour: float | None = Field(default=None, gt=0)
    """What an accelerator-hour (a worker-hour on CPUs) costs, in whatever money you count in;
    plan, status and report then say what the study costs, in the same."""
    attempts: int = Field(default=5, ge=1)
    """Most attempts of one trial that crash in a row without getting further."""


class SequentialSeeds(_Spec):
    """Add seeds one block at a time, for the contrasts that are still open."""

    min: int = Field(default=3, ge=2)
    """Blocks that are always run."""
    max: int = Field(default=12, ge=2)
    """Blocks at most."""
    until: Literal["decided"] = "decided"
    """When no more are added: every contrast has its verdict."""

    @model_validator(mode="after")
    def _ordered(self) -> SequentialSeeds:
        if self.max < self.min:
            raise ValueError(f"max ({self.max}) is below min ({self.min})")
        return self


SEEDS = ("listed", "grown")
"""The two ways to write seeds: a list, and the rule of `SequentialSeeds`."""


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


class Until(_Spec):
    """When a search has found enough, before it has had all its cells."""

    gain_below: Literal["margin"] | Annotated[float, Field(gt=0)]
    """The best setting of the space is expected to gain less than this over the best found: the
    objective's margin, or a number in its unit."""


class Search(_Spec):
    """Ask a sampler for cells instead of listing them; each runs with all its seeds."""

    name: Literal["search"] = "search"
    cells: int = Field(default=20, ge=1)
    """Distinct cells to run."""
    sampler: Literal["tpe", "gp", "qmc", "random", "grid"] = "tpe"
    """How the next cell is chosen: by Optuna's Parzen trees, its Gaussian process (a second of the
    controller a cell), a low-discrepancy sequence, by lot, or all of a grid in random order."""
    sampler_seed: int = 0
    """Seed of the sampler itself; not a replicate."""
    options: dict[str, Any] = {}
    """Options of the sampler, by Optuna's names."""
    until: Until | None = None
    """When to stop before all cells have run; never, if left out. With it, part of the cells may
    be further seeds of a promising one, where its noise is what is unknown."""
    prune: Prune | None = None
    """When a run may be ended early; never, if left out."""
    warm_start: list[str] = []
    """Folders of earlier studies whose cells inform the sampler; relative to the study's root."""
    then: Literal["nothing", "leave_one_out", "ablation_path"] = "nothing"
    """What to run on the best cell found."""


class Observed(_Spec):
    """Run nothing: the trials were made elsewhere, and `ablate import` brought them. Nobody gave
    settings to runs by a plan, so no runs pair, and what settings had in common is not undone."""

    name: Literal["observed"] = "observed"


Design = Annotated[
    OneAtATime
    | FullFactorial
    | FractionalFactorial
    | PlackettBurman
    | LeaveOneOut
    | AblationPath
    | Search
    | Observed,
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
    "observed",
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

    name: str | None = Field(default=None, json_schema_extra={"pattern": f"^{STUDY_NAME}$"})
    """Name of the study and its folder; the file's name if left out."""
    recipe: str
    """What is trained: a package of ablate/recipes, or of an installed package."""
    baseline: dict[str, Any]
    """The complete configuration that everything is compared with; fields of the recipe."""
    factors: dict[str, Any] = Field(min_length=1)
    """What is varied: a field with a list of values, or named levels that set several fields."""
    nuisance: Nuisance | None = None
    """What is tuned anew inside every cell, so that each level is judged at its own best."""
    controls: dict[str, list[str]] = {}
    """Factor -> levels that are run to be compared with and never handed out: a repeat of another
    level, which would share that one's runs otherwise, or one that is known to be wrong."""
    hypothesis: dict[str, Literal["better", "worse", "equivalent"]] = {}
    """What you expect before you look: factor, or factor=level -> better, worse or equivalent to
    the baseline's level. The report opens with it, and tests a named side on that side alone."""
    design: Design = OneAtATime()
    """Which cells are run: a design's name, or a mapping with its name and options."""
    confirm: bool = False
    """At the end, put the changes that look better alone together, and run that cell on the
    study's seeds: what is handed out is then what was measured."""
    ladder: list[dict[str, Any]] = []
    """Cheaper ways to ask the same, each with the fields of the baseline that it changes (fewer
    epochs, a smaller model, less data): `ablate ladder` runs them and says which one predicts the
    verdicts of the whole study."""
    seeds: Annotated[
        Annotated[list[int], Tag(SEEDS[0])] | Annotated[SequentialSeeds, Tag(SEEDS[1])],
        Discriminator(lambda value: SEEDS[isinstance(value, (Mapping, SequentialSeeds))]),
    ]
    """Replicates: every cell is run with each seed; common seeds pair cells. A number n means
    0 to n-1; a mapping adds them one block at a time."""
    objective: Objective = Objective()
    """What the study is judged by, and the smallest difference that would matter."""
    gang: GangSpec = GangSpec()
    """The processes that train one trial, and what each needs."""
    budget: Budget = Budget()
    """What the study may cost, and when it asks before it starts."""
    markers: dict[str, Any] = {}
    """Thresholds of instability markers that differ from the defaults."""
    checkpoints: str | None = None
    """Where checkpoints are copied to, e.g. s3://bucket/prefix; on disk alone if left out."""
    notify: list[str] = []
    """Who is told that the study ended, is stuck or out of budget, that trials diverged or were
    preempted: ``env:NAME``, a variable that holds a webhook's address (Slack, Discord, ntfy, or any
    that takes JSON), or the address itself."""

    @field_validator("notify", mode="before")
    @classmethod
    def _addresses(cls, value: Any) -> Any:
        value = [value] if isinstance(value, str) else value
        for item in value if isinstance(value, list) else ():
            if not isinstance(item, str) or not (item.startswith("env:") or "://" in item):
                raise ValueError(f"{item!r} is neither env:NAME nor an address; write env:NAME")
            if any(host in item for host in ("hooks.slack.com", "discord.com/")):
                raise ValueError(
                    "whoever has this address can write to your channel, and a study file is "
                    "copied with its results; write env:NAME and export NAME=the address"
                )
        return value

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

    @field_validator("seeds", mode="before")
    @classmethod
    def _seeds_by_number(cls, value: Any) -> Any:
        """``seeds: 3`` means three of them: 0, 1 and 2."""
        if isinstance(value, (Mapping, SequentialSeeds)):
            return value
        if type(value) is int and 1 <= value <= _MOST_SEEDS:
            return list(range(value))
        if type(value) is int:
            raise ValueError(
                f"seeds: {value} is no number of seeds; write 1 to {_MOST_SEEDS}, or list them, "
                "e.g. seeds: [0, 1, 2]"
            )
        if not isinstance(value, (list, tuple)) or any(type(seed) is not int for seed in value):
            raise ValueError(
                "seeds are a number of them, e.g. 5, a list of whole numbers, e.g. [0, 1, 2], or "
                f"grow by a rule: {{min: 3, max: 12, until: decided}}; not {value!r}"
            )
        return value

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
        if (wrong := wrong_seed(value)) is not None:
            raise ValueError(f"seeds are whole numbers from 0 to {LAST_SEED}, not {wrong}")
        return value


def wrong_seed(seeds: Sequence[int]) -> int | None:
    """One that no run can be given, where there is one."""
    return next((seed for seed in seeds if not 0 <= seed <= LAST_SEED), None)


class SettingFile(StudyFile):
    """One setting as an export writes it: a study that varies nothing."""

    factors: dict[str, Any] = {}
    """Nothing is varied; a study's factors may stand here, and the baseline is meant."""


def json_schema() -> dict[str, Any]:
    """The JSON schema of study files, with the fields of every recipe, for editors."""
    schema = StudyFile.model_json_schema()
    definitions = schema.setdefault("$defs", {})
    choices = []
    for name in recipe.usable():
        fields = recipe.load(name).Config.model_json_schema(ref_template="#/$defs/{model}")
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
    schema["properties"]["recipe"]["enum"] = list(recipe.usable())
    schema["properties"]["design"] = {
        "anyOf": [schema["properties"]["design"], {"enum": list(DESIGNS)}],
        "description": schema["properties"]["design"].pop("description"),
    }
    seeds = schema["properties"]["seeds"]
    seeds["anyOf"] = seeds.pop("oneOf")
    seeds["anyOf"].append({"type": "integer", "minimum": 1, "maximum": _MOST_SEEDS})
    schema["properties"]["markers"] = {
        **markers.thresholds_schema(),
        "description": schema["properties"]["markers"]["description"],
    }
    schema["patternProperties"] = {"^x-": {}}  # a home for anchors and notes
    schema["allOf"] = choices
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "ablate study"
    return schema
