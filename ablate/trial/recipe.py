"""A recipe as the rest of the house meets it: a door, found by name, with three things behind it.

``Config``, ``outline()`` (what a configuration amounts to, before anything runs) and
``run(session)`` (one rank of one attempt, to its end) are all that a recipe must have, with
``metrics()``, the names that its runs can be judged by. Everything else is an ability: a function
that a recipe may have (:data:`ABILITIES`); a verb that needs one it lacks says so, and nothing
else breaks.

A recipe is a package in ``ablate/recipes``, or an entry point of the group ``ablate.recipes`` in
anyone's own package. Importing one imports no torch: plans are made on laptops.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

from pydantic import BaseModel

from ablate.errors import AbilityError, suggest
from ablate.trial.metrics import Metric

if TYPE_CHECKING:
    from ablate.trial.session import Ending, Session

GROUP = "ablate.recipes"
"""Group of the entry points, and the package of our own."""


class Role(Enum):
    """What a field of a Config means to a study; stands in the field's annotation:
    ``lr: Annotated[float, Role.SAME_PACE, Role.SPEED]``."""

    FREE = "cannot change a result: no part of a trial's identity"
    PATH = "a path, or several joined with ``::``, relative to the study's root"
    SAME_PACE = "changes neither the time of a step nor that of an evaluation"
    SPEED = "changes how fast a run learns, so early scores are not comparable"
    OPTIMIZER = "an optimizer's setting, which a resumed optimizer would bring along"
    LATER = "came when there were runs: at its default, which stays, no part of an identity"


@functools.cache
def fields_of(config: type[BaseModel], role: Role) -> frozenset[str]:
    """Names of the fields that have this role."""
    return frozenset(name for name, info in config.model_fields.items() if role in info.metadata)


def no_identity(recipe: type[BaseModel], config: Mapping[str, Any]) -> frozenset[str]:
    """Fields that are no part of the id of a trial with this resolved configuration."""
    later = fields_of(recipe, Role.LATER)
    usual = {name for name in later if config[name] == recipe.model_fields[name].default}
    return fields_of(recipe, Role.FREE) | usual


@dataclass(frozen=True, kw_only=True, slots=True)
class Note:
    """A line of the plan."""

    label: str
    text: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    """The same in numbers, for ``plan --json``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outline:
    """What one configuration amounts to on one gang, before anything runs."""

    measures: tuple[str, ...]
    """Names of what its evaluations give."""
    measured_on: Mapping[str, str] = field(default_factory=dict)
    """The data that each of them is measured on, where the configuration says it."""
    steps: int | None = None
    """Optimizer steps; None: not known beforehand."""
    samples: int | None = None
    """Samples of one step, over all workers; None: not known."""
    no_steps: str = ""
    """Why the steps are not known."""
    warmup: int = 0
    """Steps until the learning rate is at its height."""
    evaluations: int = 1
    """Times at which something is evaluated."""
    checkpoint_bytes: int | None = None
    """What a trial's checkpoints take at most; None: not known."""
    shared_bytes: int | None = None
    """What one worker's loading processes hold ready in /dev/shm at most; None: not known."""
    warnings: tuple[str, ...] = ()
    notes: tuple[Note, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """Something that a study may ask of a recipe."""

    text: str
    factors: Mapping[str, Any]
    """As a study file has them."""
    controls: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Beginning:
    """What a recipe proposes to somebody who has no study yet; for `init`."""

    baseline: Mapping[str, Any]
    asks: tuple[str, ...]
    """Fields of the baseline that only the user can know."""
    questions: Mapping[str, Question]
    """By a short name."""
    metric: str
    margin: float
    usual: bool = False
    """Proposed where no recipe is named."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """What a recipe found in a data set's folder."""

    facts: Mapping[str, str]
    problems: tuple[str, ...]
    """What must be mended before it is used, one sentence each."""


class Recipe(Protocol):
    """A recipe, as a type: a module, or what an entry point names."""

    Config: type[BaseModel]
    """Frozen; after validation every default is explicit. A field ``seed`` is the replicate."""
    PRELOAD: tuple[str, ...]
    """Modules that a warm parent imports, so that a forked rank starts at once."""

    def metrics(self, config: Any) -> tuple[Metric, ...]:
        """What a run may be judged by, whether this one measures it or not; the default first."""
        ...

    def outline(
        self, config: Any, *, workers: int, gpus: int, root: Path, deep: bool = False
    ) -> Outline:
        """What `config` amounts to on `workers`, each with `gpus` GPUs (0: CPU).

        `deep` may import torch and take seconds.

        Raises:
            ValueError: it cannot run there; says why and what to change.
        """
        ...

    def run(self, session: Session) -> Ending:
        """One rank of one attempt, from its newest checkpoint to its end."""
        ...


ABILITIES: Mapping[str, str] = {
    "chance": "(config, *, metric, root) -> a measurement by guessing, where data must be asked",
    "shorten": "(config, *, steps, workers) -> a run of a few steps; for `plan --probe`",
    "share_out": "(config, *, workers, ranks, root) -> the same work on fewer ranks",
    "same_rules": "() -> rules by which levels are provably one experiment",
    "unsound": "(config, *, workers) -> why no one should train so, whatever it scores",
    "command": "(config, *, workers) -> the line that trains the same outside of here",
    "upstream": "(config, *, workers, root, steps, faults) -> that line with all it takes to run",
    "export_model": "(config, weights, folder) -> a model that others load; for `best`",
    "check_model": "(folder) -> that it loads as others load it; for `export --verify`",
    "peer_runs": "() -> how runs of its trainer are known; for `markers import`",
    "specimen": "(config, *, data, device) -> the model to look at; for `inspect`",
    "plain_config": "(model) -> the Config of a model by name; for `inspect --model`",
    "choose_evaluations": "(*, images, train_images, pairs, kinds) -> fields that measure on these",
    "evaluate": "(source, config, *, fields) -> measurements of a finished model",
    "causes": "suspects that only this kind of model has; for `diagnose`",
    "beginning": "(*, workers, gpus) -> what to propose to a beginner; for `init`",
    "data_sets": "() -> {name: prepare(folder, *, labels, classes, tell)}; for `data NAME`",
    "reads": "(config) -> (field, path) of files that it needs beside those its path fields name",
    "known_faults": "(config, facts) -> faults of earlier versions in a record; for `verify`",
}
"""Functions that a recipe may have."""


def names() -> tuple[str, ...]:
    """All recipes there are: ours, and those of installed packages."""
    return tuple(sorted({*_ours(), *(point.name for point in entry_points(group=GROUP))}))


def usable() -> tuple[str, ...]:
    """Those of :func:`names` that can be loaded here."""
    found = []
    for name in names():
        with contextlib.suppress(ValueError):
            load(name)
            found.append(name)
    return tuple(found)


def load(name: str) -> Recipe:
    """The recipe of that name; ours first.

    Raises:
        ValueError: there is none (lists those there are), or it lacks what a recipe must have.
    """
    if name in _ours():
        return cast(Recipe, importlib.import_module(f"{GROUP}.{name}"))
    point = _entry_point(name)
    if point is None:
        raise ValueError(f"{name!r} is no recipe; {suggest(name, names())}")
    try:
        found = point.load()
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"recipe {name!r} ({point.value}, installed by {_owner(point)}) cannot be imported: "
            f"{error}"
        ) from error
    missing = [each for each in ("Config", "metrics", "outline", "run") if not hasattr(found, each)]
    if missing:
        raise ValueError(
            f"recipe {name!r} ({point.value}, installed by {_owner(point)}) has no "
            f"{', '.join(missing)}; a recipe has Config, metrics(), outline() and run()"
        )
    return cast(Recipe, found)


def preload(name: str) -> tuple[str, ...]:
    """What a keeper imports ahead for this recipe, as ``module:NAME``; empty if it names none."""
    module = f"{GROUP}.{name}"
    if name not in _ours():
        point = _entry_point(name)
        module = point.module if point is not None and not point.attr else ""
    return (f"{module}:PRELOAD",) if module and hasattr(load(name), "PRELOAD") else ()


def find_ability(recipe: str, name: str) -> Callable[..., Any] | None:
    """The function `name` of that recipe, or None if it has none."""
    assert name in ABILITIES, name
    found: Callable[..., Any] | None = getattr(load(recipe), name, None)
    return found


def ability(recipe: str, name: str) -> Callable[..., Any]:
    """The function `name` of that recipe.

    Raises:
        AbilityError: it has none; says which recipe lacks what.
    """
    found = find_ability(recipe, name)
    if found is None:
        _, _, gives = ABILITIES[name].rpartition("-> ")
        raise AbilityError(
            f"recipe {recipe!r} cannot do this: it has no {name}() ({gives}). Recipes that have "
            f"it: {', '.join(having(name)) or 'none'}"
        )
    return found


def able(name: str, *, given: str | None = None) -> str:
    """The recipe that is meant where none is named: `given`, or the only one with that ability.

    Raises:
        AbilityError: several have it, or none.
    """
    if given:
        return given
    found = having(name)
    if len(found) != 1:
        raise AbilityError(f"say which recipe: {', '.join(found) or 'none has what this needs'}")
    return found[0]


def find_data_sets() -> dict[str, Callable[..., Prepared]]:
    """Data sets that recipes know how to prepare, by name."""
    found: dict[str, Callable[..., Prepared]] = {}
    for recipe in having("data_sets"):
        found |= ability(recipe, "data_sets")()
    return found


def chance_of(recipe: str, config: Any, *, metric: str, root: Path) -> float | None:
    """A measurement by guessing, what a diverged trial is scored with; None where none is known.

    Raises:
        DataError: the data of that evaluation are not there.
    """
    declared = describe(load(recipe).metrics(config), metric)
    if declared is not None and declared.chance is not None:
        return declared.chance
    ask = find_ability(recipe, "chance")
    return None if ask is None else cast("float | None", ask(config, metric=metric, root=root))


def describe(declared: tuple[Metric, ...], name: str) -> Metric | None:
    """The entry of a measurement, also of one of a named evaluation (``knn_top1/NAME``)."""
    plain = name.split("/", 1)[0]
    return next((metric for metric in declared if metric.name in (name, plain)), None)


def judged(declared: tuple[Metric, ...]) -> str | None:
    """The accuracy among the measurements whose collapse the markers call a fault."""
    return next((metric.name for metric in declared if metric.judged), None)


C = TypeVar("C", bound=BaseModel)


def absolute(config: C, *, root: Path) -> C:
    """`config` with the fields that are paths made absolute (``~`` is this user's home), also those
    of models within it."""
    paths = fields_of(type(config), Role.PATH)
    changed: dict[str, Any] = {}
    for name in type(config).model_fields:
        value = getattr(config, name)
        if name in paths and isinstance(value, str):
            parts = map(os.path.expanduser, value.split("::"))
            changed[name] = "::".join(str(root / part) for part in parts)
        else:
            changed[name] = _place(value, root)
    return config.model_copy(update=changed)


def paths_in(config: BaseModel) -> Iterator[tuple[str, str]]:
    """(field, path) of every field that is a path and has a value, also of models within it."""
    paths = fields_of(type(config), Role.PATH)
    for name in type(config).model_fields:
        value = getattr(config, name)
        if name in paths and isinstance(value, str):
            yield name, value
            continue
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, BaseModel):
                yield from ((f"{name}.{inner}", path) for inner, path in paths_in(item))


def _place(value: Any, root: Path) -> Any:
    if isinstance(value, tuple):
        return tuple(_place(item, root) for item in value)
    return absolute(value, root=root) if isinstance(value, BaseModel) else value


@functools.cache
def _ours() -> frozenset[str]:
    spec = importlib.util.find_spec(GROUP)
    assert spec is not None and spec.submodule_search_locations is not None
    found = pkgutil.iter_modules(spec.submodule_search_locations)
    return frozenset(module.name for module in found if not module.name.startswith("_"))


def having(ability: str) -> list[str]:
    """Recipes that have this ability; those of others that cannot be loaded have none."""
    return [name for name in usable() if find_ability(name, ability) is not None]


def _entry_point(name: str) -> EntryPoint | None:
    return next(iter(entry_points(group=GROUP, name=name)), None)


def _owner(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else "an unknown package"
