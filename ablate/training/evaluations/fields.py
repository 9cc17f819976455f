"""What a configuration may say about an evaluation.

An evaluation has a kind, data, and a schedule. Its measurements are named after the kind:
``knn_top1``, ``linear_top1``; with a name of its own, which two evaluations of one kind need,
``knn_top1/NAME``. A study's objective may be any of them. Imports no torch.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, get_args

from pydantic import BaseModel, ConfigDict, Field

from ablate.training.data.image_source import count_classes
from ablate.trial.metrics import Metric
from ablate.trial.recipe import Role

if TYPE_CHECKING:
    from ablate.training.evaluations.features import Labelled
    from ablate.training.ranks import Gang


Positive = Annotated[float, Field(gt=0.0)]


class EvaluationFields(BaseModel):
    """What every kind has."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )
    MEASURES: ClassVar[tuple[Metric, ...]]

    kind: str
    """The kind of evaluation."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,40}$")] | None = None
    """Tells evaluations of one kind apart: its measurements are called MEASUREMENT/NAME."""
    path: Annotated[str | None, Role.PATH] = None
    """Folder of class folders, or WebDataset shards (.tar) with class numbers (.cls);
    the recipe's own labelled images when empty."""
    every: Annotated[int, Field(ge=1)] = 1
    """It runs after every so many epochs and after the last."""

    @classmethod
    def kind_name(cls) -> str:
        """What ``kind`` is in a configuration."""
        (name,) = get_args(cls.model_fields["kind"].annotation)
        return str(name)

    @property
    def label(self) -> str:
        """What its measurements' names end in."""
        return f"/{self.name}" if self.name else ""

    def measures(self) -> tuple[str, ...]:
        """Names of its measurements."""
        return tuple(measure.name + self.label for measure in self.MEASURES)


class OnFeatures(EvaluationFields):
    """What is read from the features of labelled images. Each is a file in ``kinds/``."""

    train_path: Annotated[str | None, Role.PATH] = None
    """Labelled images whose features are learnt from; when empty others of path: for knn all but
    the one that is judged, for linear half of each class."""

    @abstractmethod
    def top1(self, judged: Labelled, reference: Labelled | None, gang: Gang) -> float:
        """The share that is right, equal on all ranks; `reference`: what is learnt from, if it is
        not of the images themselves."""


def data_of(evaluations: Sequence[EvaluationFields], *, default: str | None) -> dict[str, str]:
    """Each measurement, and the images that it is made on; `default`: the recipe's own."""
    return {name: spec.path or default or "" for spec in evaluations for name in spec.measures()}


def refuse_unclear(
    evaluations: Sequence[EvaluationFields], *, default_path: str | None, default: str
) -> None:
    """Raise ValueError for two of one name, or one without data; `default` names the field that
    gives what has no path of its own."""
    seen: set[str] = set()
    for evaluation in evaluations:
        first = evaluation.measures()[0]
        if evaluation.path is None and default_path is None:
            raise ValueError(f"the evaluation of {first} has no data: give its path, or {default}")
        for measure in evaluation.measures():
            if measure in seen:
                raise ValueError(
                    f"two evaluations measure {measure}; give each of them a name of its own"
                )
            seen.add(measure)


def chance_of_features(
    evaluations: Sequence[EvaluationFields], *, metric: str, default_path: str | None, root: Path
) -> float | None:
    """What guessing scores in that measurement of these; None where it is none of theirs.

    Raises:
        DataError: its data are not there.
    """
    for spec in evaluations:
        if not isinstance(spec, OnFeatures) or metric not in spec.measures():
            continue
        path = spec.train_path or spec.path or default_path
        assert path is not None, "a Config refuses an evaluation without data"
        return 1 / count_classes(str(root / path))
    return None
