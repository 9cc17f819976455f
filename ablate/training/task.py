"""What a recipe written in torch gives to be trained: a :class:`Learner` and its :class:`Task`.

::

    class Mine(Learner):
        def __init__(self, config, device): self.model, self.optimizer = ...
        def rates(self, step): return set_rates(self.optimizer, 0.1)
        def loss(self, model, batches, backward): ...

    fit(session, Task(learner=..., data=Data(samples), length=Length(...)), gang)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from ablate.training.checkpoint_clock import KEEP_LAST
from ablate.training.counts import steps_per_epoch

if TYPE_CHECKING:
    import torch

    from ablate.training.data.samples import Samples
    from ablate.training.evaluations.evaluation import Evaluation
    from ablate.training.interruption import Interruption

Backward = Callable[["torch.Tensor"], None]
MicroBatch = tuple["torch.Tensor", ...]


class Learner(Protocol):
    """A model and how one step teaches it. Inherit: what has a body here may be left out."""

    model: torch.nn.Module
    """On its device, in train mode, with its initial weights."""
    optimizer: torch.optim.Optimizer
    """Groups are named in the record by their key ``name``, where they have one."""
    averaged: torch.nn.Module | None = None
    """The model with an average of its weights, which moves in :meth:`settle`: what is evaluated,
    inspected and handed out in the model's place, where there is one."""

    @property
    def judged(self) -> torch.nn.Module:
        """What measurements are of."""
        return self.model if self.averaged is None else self.averaged

    def rates(self, step: int) -> float:
        """Set the rates of optimizer step `step` (from 0) in the optimizer's groups.

        What is returned is the record's ``lr``. :func:`ablate.training.optim.set_rates` honours
        the groups' ``lr_scale``.
        """
        ...

    def loss(
        self, model: torch.nn.Module, batches: Sequence[MicroBatch], backward: Backward
    ) -> dict[str, torch.Tensor]:
        """Forward and backward passes of one step, which leave gradients behind.

        `model` is ours or its DDP wrapper, `batches` are the step's micro-batches on the device.
        The measurements are scalars on the device, always the same names, ``loss`` among them;
        they are averaged over the ranks.
        """
        ...

    def frozen(self, step: int) -> Collection[str]:
        """Names of parameters that get no gradient in step `step` (from 0) on purpose."""
        return ()

    def settle(self) -> dict[str, torch.Tensor]:
        """After each optimizer step: bounds on parameters, prototypes, an average of the weights.

        The measurements are the same on all ranks.
        """
        return {}

    def state(self) -> dict[str, torch.Tensor]:
        """What neither model nor optimizer holds, of this rank (a queue): for a checkpoint.

        As many ranks as wrote it can resume one that is not empty, and no others.
        """
        return {}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on from what :meth:`state` gave; an empty one is the beginning's."""
        if state:
            raise NotImplementedError(f"{type(self).__name__} has a state and no load_state")


@dataclass(frozen=True, slots=True)
class Data:
    """The training set, and how it is read."""

    samples: Samples
    max_fault_share: float = 1.0
    """Share of substituted samples above which the trial fails as a data fault."""
    workers: int = 0
    """Processes that load; 0: this one."""
    prefetch: int = 4
    """Batches that each loading process reads ahead."""
    pin_memory: bool = True
    """Whether batches for a GPU wait in page-locked memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Length:
    """How much is trained."""

    num_samples: int
    """Samples of one epoch; the set is cut or repeated to it."""
    batch_size: int
    """Samples of one rank's micro-batch."""
    accum_freq: int = 1
    """Micro-batches of one optimizer step."""
    epochs: int

    def global_batch(self, world_size: int) -> int:
        """Samples of one optimizer step."""
        return self.batch_size * world_size * self.accum_freq

    def steps_per_epoch(self, world_size: int) -> int:
        """Optimizer steps of one epoch.

        Raises:
            ValueError: an epoch has no whole step.
        """
        steps = steps_per_epoch(
            self.num_samples,
            batch_size=self.batch_size,
            accum_freq=self.accum_freq,
            world_size=world_size,
        )
        if not steps:
            raise ValueError(
                f"an epoch of {self.num_samples} samples has no whole step of "
                f"{self.global_batch(world_size)}; lower batch_size or accum_freq"
            )
        return steps


@dataclass(frozen=True, slots=True, kw_only=True)
class Execution:
    """How a step is carried out."""

    scaler: torch.amp.GradScaler | None = None
    grad_clip_norm: float | None = None
    clip: Callable[[Sequence[torch.nn.Parameter], torch.Tensor], None] | None = None
    """Another clipping: of parameters with gradients whose global norm is given."""
    sync_batch_norm: bool = False
    compile: bool = False
    cuda_graphs: bool = False
    """With compile: launch what was compiled as CUDA graphs."""
    static_graph: bool = False
    """Of DDP: the same parameters take part in every step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Keep:
    """Which checkpoints are written, and which stay beside the last two and the best."""

    every: int = 1
    """Epochs between two checkpoints; one precedes each evaluation, whatever this says."""
    for_good: int = 0
    """Those of every so many epochs are never deleted; 0: none."""
    minutes: float = 10.0
    """Between two checkpoints, also within an epoch, or so long that they hold the training up for
    1 % of the time at most; 0: at the ends of epochs alone."""

    def at_once(self, epochs: int) -> int:
        """Most checkpoints that lie on the disk: the last ones, the best, those kept for good."""
        most = KEEP_LAST + 1 + (epochs // self.for_good if self.for_good else 0)
        return most if self.minutes else min(most, math.ceil(epochs / self.every))


@dataclass(frozen=True, slots=True, kw_only=True)
class Watch:
    """What is measured of a model beside its loss and gradients, for the markers."""

    moments: tuple[str, ...] = ()
    """Parameters (globs) whose second moments are watched every step."""
    look_inside: Callable[[MicroBatch], dict[str, torch.Tensor]] | None = None
    """Rare measurements of the model on a micro-batch; changes nothing in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One model to be trained, on one rank: all that the loop knows of a recipe."""

    learner: Learner
    data: Data
    length: Length
    seed: int = 0
    """Of the data's order, of augmentation, and of what a model draws in a step."""
    evaluations: tuple[Evaluation, ...] = ()
    execution: Execution = Execution()
    keep: Keep = Keep()
    watch: Watch = Watch()
    interruption: Interruption | None = None
    """A break from which a part of the state does not come back, on purpose."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """More for the record: load reports, device settings."""
