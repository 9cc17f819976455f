"""A break in the middle of a run, of which a part of the state does not come back: on purpose.

What a wrong resume loses is lost in one trial, without a second process, at a step that is a
function of the configuration; a run that is killed and resumed is the same as one that is not.
Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ablate.errors import LoadError
from ablate.trial.recipe import Role

if TYPE_CHECKING:
    import torch

REFERENCE_STEPS = 5
"""Steps before a border whose updates are measured, to hold the first one after it against."""


class Interruption(BaseModel):
    """What does not come back after a break; all kept, the run is the one without it."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    at: Annotated[float, Field(gt=0.0, lt=1.0)]
    """Where it comes, as a share of the run's steps."""
    optimizer: Literal["kept", "lost", "shifted", "foreign"] = "kept"
    """The optimizer's state: as it was, none, that of the parameter before of the same shape (what
    loading by position does after a model has changed), or that of `optimizer_from`."""
    optimizer_from: Annotated[str | None, Role.PATH] = None
    """Checkpoint of another run of the same model (a trial's folder, or one of its
    checkpoints)."""
    schedule: Literal["kept", "restarted"] = "kept"
    """The learning rate goes on, or begins anew."""
    data: Literal["kept", "restarted"] = "kept"
    """The order of samples goes on, or begins anew."""

    @model_validator(mode="after")
    def _names_its_file(self) -> Interruption:
        if (self.optimizer == "foreign") != (self.optimizer_from is not None):
            raise ValueError(
                "optimizer: foreign needs optimizer_from, the checkpoint of another run; any other "
                "takes none"
            )
        return self

    def step(self, total: int) -> int:
        """Steps that are complete when it comes, of `total`."""
        return min(max(1, round(self.at * total)), total - 1)


def span_of_data(interruption: Interruption | None, step: int, total: int) -> tuple[int, int]:
    """Whose samples step `step` (from 0) takes, and the step after the last that goes on so."""
    if interruption is None or interruption.data == "kept":
        return step, total
    border = interruption.step(total)
    return (step - border, total - border) if step >= border else (step, border)


@dataclass(frozen=True, slots=True)
class Borders:
    """Where a run may be left or is broken, known beforehand: after checkpoints, at `broken`."""

    total: int
    checkpoint_steps: int
    """Steps between two checkpoints of the schedule."""
    interruption: Interruption | None = None

    @property
    def broken(self) -> int | None:
        """Steps that are complete when the interruption comes; None without one."""
        return None if self.interruption is None else self.interruption.step(self.total)

    def rate_of(self, step: int) -> int:
        """Which step's learning rate step `step` (from 0) takes."""
        if self.broken is None or self.interruption is None or step < self.broken:
            return step
        return step if self.interruption.schedule == "kept" else step - self.broken

    def is_near(self, step: int) -> bool:
        """Whether the update of step `step` (from 0) is measured: it is the first after a border,
        or one of the last before."""
        later = step + REFERENCE_STEPS
        if step and step // self.checkpoint_steps != later // self.checkpoint_steps:
            return True
        if step and step % self.checkpoint_steps == 0:
            return True
        return self.is_about_break(step)

    def is_about_break(self, step: int) -> bool:
        """Whether step `step` (from 0) is the first after an interruption or one of the last
        before: there an update's direction is held against that of the update before."""
        return self.broken is not None and self.broken - REFERENCE_STEPS <= step <= self.broken


def break_off(
    interruption: Interruption, model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Write the optimizer's state out and read back what comes back of it, as a resume does.

    Raises:
        LoadError: the other run's checkpoint is not there, or is of another model.
    """
    from ablate.training.checkpoint import copy_to_host
    from ablate.training.optim import load_named_state, named_state

    tensors, numbers = named_state(model, optimizer)
    held: dict[str, torch.Tensor] = copy_to_host(tensors)
    if interruption.optimizer == "lost":
        held, numbers = {}, {}
    elif interruption.optimizer == "shifted":
        held = _shifted(held)
    elif interruption.optimizer == "foreign":
        assert interruption.optimizer_from is not None
        held, numbers = _read(Path(interruption.optimizer_from))
    try:
        load_named_state(model, optimizer, held, numbers)
    except ValueError as error:
        raise LoadError(
            f"interruption.optimizer_from {interruption.optimizer_from} is not of this model and "
            f"optimizer: {error}"
        ) from error


def _shifted(held: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Each quantity moved on to the next parameter whose quantity has the same shape."""
    alike: dict[tuple[Any, ...], list[str]] = {}
    for key, value in held.items():
        alike.setdefault((key.rpartition("/")[2], tuple(value.shape)), []).append(key)
    moved = {}
    for keys in alike.values():
        for key, source in zip(keys, [keys[-1], *keys[:-1]], strict=True):
            moved[key] = held[source]
    return {key: moved[key] for key in held}


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The optimizer's state of a checkpoint, or of the newest one of a trial."""
    from ablate.training import checkpoint

    steps = checkpoint.steps(path / "checkpoints")
    found = checkpoint.path_of(path / "checkpoints", steps[-1]) if steps else path
    if checkpoint.fault(found) is not None:
        raise LoadError(
            f"interruption.optimizer_from: {path} is no whole checkpoint ({checkpoint.fault(found)}"
            "); give a trial's folder (runs/STUDY/trials/ID) or TRIAL/checkpoints/step-..."
        )
    taken = checkpoint.load(found)
    return dict(taken.optimizer), dict(taken.state["optimizer_numbers"])
