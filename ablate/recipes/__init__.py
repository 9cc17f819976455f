"""Recipes: how one kind of model is trained; a module or package each, of the recipe's name.

A recipe is a module with these names (:class:`Recipe` is the same as a type):

``Config``
    a frozen pydantic model; after validation every default is explicit
``NOT_IDENTITY``
    fields that cannot change the result (loader workers, caches)
``OWN_FIELDS``
    fields that the peer's command line does not know, each with the values under which the run
    is the peer's (none: any)
``SAME_PACE``
    fields that change neither the time of a step nor that of an evaluation
``PATH_FIELDS``
    fields that hold paths, relative to the trial's root
``check(config, *, workers, gpus, steps=None)``
    warnings for ``plan``; ValueError for what cannot run on that device, with the reason
``num_samples(config, *, root)``, ``num_steps(config, *, workers, num_samples)``
    the length of an epoch and of the run
``warmup_steps(config)``
    steps until the learning rate is at its height; 0 without a warmup
``SPEED_FIELDS``
    fields that are known to change how fast a run learns, not only how good it becomes
``measures(config)``
    names of the measurements that its evaluations give
``sketch(config)``
    what model and optimizer amount to, a :class:`Sketch`; imports torch, needs no memory for
    weights; ValueError for a parameter in no group or in two, and an optimizer that cannot step
``describe_start(config)``
    what a file of initial weights brings, in a sentence, or None; ValueError where it does not fit
``num_evaluations(config)``, ``shorten(config, *, steps, workers)``
    epochs after which something is evaluated; a run of a few steps of the same shape, for probes
``chance(config, *, root, metric)``
    a measurement's value by guessing: what a diverged trial is scored with
``build(config, *, rank, world_size, device)``
    a :class:`Task`; torch is imported in here
``specimen(config, *, data, device)``
    the model alone, with labelled images to look at it with: a :class:`Specimen`
``command(config, *, workers)``
    the peer's command line that trains the same
``export_model(config, weights, folder)``
    a model folder that the peer can load

Importing a recipe imports no torch: plans are made on laptops. ``build`` gets a Config whose paths
are absolute (:func:`absolute`).
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

from pydantic import BaseModel

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    from ablate.training.data import Batch
    from ablate.training.distributed import Gang


class Samples(Protocol):
    """A training set that is read by sample id, in any order, from any process."""

    @property
    def shard_sizes(self) -> npt.NDArray[np.int64]:
        """Samples in each shard; ids count through the shards in this order."""
        ...

    @property
    def fingerprint(self) -> str:
        """Changes when the data change."""
        ...

    def batch(
        self, ids: npt.NDArray[np.int64], seeds: npt.NDArray[np.uint64]
    ) -> tuple[tuple[torch.Tensor, ...], npt.NDArray[np.bool_]]:
        """Tensors of these samples (first dimension: sample), and which of them are bad.

        `seeds` holds the seed of each sample's own generator. A bad sample (unreadable image,
        empty caption) is reported, never skipped: the caller replaces its row.
        """
        ...


class Evaluation(Protocol):
    """A named measurement of the model, on its own schedule, run by all ranks together."""

    @property
    def name(self) -> str: ...

    def due(self, epoch: int, /) -> bool:
        """Whether it runs after `epoch` epochs are complete."""
        ...

    def run(self, model: torch.nn.Module, gang: Gang) -> dict[str, float]:
        """Measurements, equal on all ranks; the model is in eval mode."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One model to be trained, on one rank: all that the loop knows of a recipe."""

    model: torch.nn.Module
    """On its device, in train mode, with its initial weights."""
    samples: Samples
    num_samples: int
    """Samples of one epoch; the set is cut or repeated to it."""
    batch_size: int
    """Samples of one rank's micro-batch."""
    accum_freq: int = 1
    """Micro-batches of one optimizer step."""
    epochs: int
    optimizer: torch.optim.Optimizer
    schedule: Callable[[int], float]
    """Learning rate of an optimizer step, counted from 0."""
    forward_backward: Callable[
        [torch.nn.Module, Sequence[tuple[torch.Tensor, ...]], Callable[[torch.Tensor], None]],
        dict[str, torch.Tensor],
    ]
    """(model or its DDP wrapper, one step's micro-batches on the device, backward) -> measurements.

    Leaves gradients behind. The measurements are scalars on the device, always the same names,
    ``loss`` among them; the loop averages them over the ranks.
    """
    after_step: Callable[[], dict[str, torch.Tensor]]
    """Called after each optimizer step: puts bounds on parameters, and measures what it bounds.

    The measurements are the same on all ranks.
    """
    scaler: torch.amp.GradScaler | None = None
    grad_clip_norm: float | None = None
    sync_batch_norm: bool = False
    compile: bool = False
    cuda_graphs: bool = False
    """With compile: launch what was compiled as CUDA graphs."""
    static_graph: bool = False
    evaluations: tuple[Evaluation, ...] = ()
    seed: int = 0
    stream: Callable[[int, int], Iterator[Batch]] | None = None
    """(first, after the last micro-batch of the run) -> this rank's batches.

    Takes the place of the order by position; nothing can repeat it, and records say so.
    """
    loader_workers: int = 0
    prefetch: int = 4
    """Batches that each loading process reads ahead."""
    pin_memory: bool = True
    """Whether batches for a GPU wait in page-locked memory."""
    max_fault_share: float = 1.0
    """Share of substituted samples above which the trial fails as a data fault."""
    checkpoint_epochs: int = 1
    """A checkpoint after every so many epochs."""
    keep_every_epochs: int = 0
    """Checkpoints of every so many epochs are never deleted; 0: only the last two and the best."""
    look_inside: Callable[[tuple[torch.Tensor, ...]], dict[str, torch.Tensor]] | None = None
    """Rare measurements of the model on a micro-batch; changes nothing in it."""
    watched: tuple[str, ...] = ()
    """Parameters (globs) whose second moments are watched every step, for the markers."""
    warmup: int = 0
    """Steps of warmup, for the markers."""
    global_batch: int | None = None
    """Samples that share one softmax, for the markers; None for a loss without one."""
    feature_dim: int | None = None
    """Width of the features that are compared, for the markers."""
    parameter_groups: Mapping[str, Any] = field(default_factory=dict)
    """What is decayed, counted and hashed; for the record."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """More for the record: load reports, device settings."""


@dataclass(frozen=True, slots=True)
class Sketch:
    """A model and its optimizer without memory for their values."""

    groups: Mapping[str, Any]
    """What is decayed, counted and hashed as a trial records it."""
    disk_bytes: int
    """What a trial's checkpoints take at most: the last two, the best one, those kept for good."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Specimen:
    """A model with its initial weights, and the labelled images to look at it with."""

    model: torch.nn.Module
    """In eval mode, on its device."""
    frozen: tuple[str, ...]
    """Parameters that the configuration freezes."""
    labels: npt.NDArray[np.int64]
    """Class number of each image; empty without images."""
    class_names: Sequence[str]
    features: Callable[[torch.nn.Module, npt.NDArray[np.int64]], torch.Tensor]
    """(model, rows) -> features of these images, on the CPU."""
    zero_shot: (
        Callable[[torch.nn.Module, torch.Tensor, npt.NDArray[np.int64], int | None], torch.Tensor]
        | None
    )
    """(model, features, rows, most prompts) -> whether each image is right among the classes of
    these rows; None where classes have no names."""


class Recipe(Protocol):
    """A recipe module, as a type."""

    Config: type[BaseModel]
    NOT_IDENTITY: frozenset[str]
    OWN_FIELDS: Mapping[str, tuple[Any, ...]]
    SAME_PACE: frozenset[str]
    PATH_FIELDS: tuple[str, ...]
    SPEED_FIELDS: frozenset[str]

    def check(
        self, config: Any, *, workers: int, gpus: int, steps: int | None = None
    ) -> list[str]: ...

    def num_samples(self, config: Any, *, root: Path) -> int: ...

    def num_steps(self, config: Any, *, workers: int, num_samples: int) -> int: ...

    def warmup_steps(self, config: Any) -> int: ...

    def share_out(self, config: Any, *, workers: int, ranks: int, num_samples: int) -> Any: ...

    def sketch(self, config: Any) -> Sketch: ...

    def describe_start(self, config: Any) -> str | None: ...

    def num_evaluations(self, config: Any) -> int: ...

    def shorten(self, config: Any, *, steps: int, workers: int) -> BaseModel: ...

    def measures(self, config: Any) -> tuple[str, ...]: ...

    def chance(self, config: Any, *, root: Path, metric: str = ...) -> float: ...

    def build(self, config: Any, *, rank: int, world_size: int, device: torch.device) -> Task: ...

    def specimen(self, config: Any, *, data: str | None, device: torch.device) -> Specimen: ...

    def command(self, config: Any, *, workers: int) -> list[str]: ...

    def export_model(self, config: Any, weights: Path, folder: Path) -> None: ...


def names() -> tuple[str, ...]:
    """All recipes there are."""
    found = pkgutil.iter_modules(__path__)
    return tuple(sorted(module.name for module in found if not module.name.startswith("_")))


def load(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        ValueError: there is none; lists those there are.
    """
    if name not in names():
        raise ValueError(f"{name!r} is no recipe. Allowed: {', '.join(names())}")
    return cast(Recipe, importlib.import_module(f"{__name__}.{name}"))


C = TypeVar("C", bound=BaseModel)


def absolute(config: C, path_fields: Sequence[str], *, root: Path) -> C:
    """`config` with the paths in these fields made absolute; sources are joined with ``::``.

    So are those of fields that are models, or tuples of models, with PATH_FIELDS of their own.
    """

    def place(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(place(item) for item in value)
        inner = getattr(value, "PATH_FIELDS", ())
        return absolute(value, inner, root=root) if isinstance(value, BaseModel) else value

    changed: dict[str, Any] = {}
    for name in type(config).model_fields:
        changed[name] = place(getattr(config, name))
    for name in path_fields:
        value = getattr(config, name, None)
        if isinstance(value, str):
            changed[name] = "::".join(str(root / part) for part in value.split("::"))
    return config.model_copy(update=changed)
