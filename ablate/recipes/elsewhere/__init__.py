"""Runs that were made elsewhere: what they were set to and what they measured.

``ablate import`` writes studies of this recipe. Nothing here can train them: no line of theirs is
known, so there is nothing to launch, to confirm or to export.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from ablate.trial.metrics import Metric
from ablate.trial.recipe import Outline
from ablate.trial.session import Ending, Session

PRELOAD = ("ablate.trial.worker",)

__all__ = ["PRELOAD", "Config", "metrics", "outline", "run"]


class Config(BaseModel):
    """Settings of a run made elsewhere: every field of the user's own is one."""

    model_config = ConfigDict(
        frozen=True, extra="allow", use_attribute_docstrings=True, allow_inf_nan=False
    )

    metrics: Annotated[dict[str, Literal["maximize", "minimize"]], Field(min_length=1)]
    """What the runs measured and are judged by, with its direction: {val_acc: maximize}."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Number of the run; not a seed of its training, so that nothing is paired by it."""

    @field_validator("metrics", mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        return dict.fromkeys(value, "maximize") if isinstance(value, (list, tuple)) else value

    @property
    def settings(self) -> Mapping[str, Any]:
        """The fields of the user's own."""
        return dict(self.model_extra or {})


def metrics(config: Config) -> tuple[Metric, ...]:
    """What the runs measured."""
    return tuple(
        Metric(name, "", "as its maker logged it", direction)
        for name, direction in config.metrics.items()
    )


def outline(config: Config, *, workers: int, gpus: int, root: Path, deep: bool = False) -> Outline:
    """Only the names are known."""
    return Outline(measures=tuple(config.metrics), no_steps="the runs were made elsewhere")


def run(session: Session) -> Ending:
    """Refuses: how these runs were trained is not known here."""
    return Ending(
        status="failed",
        reason="runs of this study were made elsewhere and cannot be trained here: write a study "
        "of the recipe command that calls their script, e.g. ablate init --recipe command",
    )
