"""What a configuration may say about evaluations, beside the peer's own zero-shot one.

An evaluation has a kind, data, and a schedule. Its measurements are named after the kind:
``knn_top1``, ``linear_top1``, ``zero_shot_top1``, ``retrieval_i2t_r1``; with a name of its own,
which two evaluations of one kind need, ``knn_top1/NAME``. A study's objective may be any of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[float, Field(gt=0.0)]


class _Evaluation(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )
    PATH_FIELDS: ClassVar[tuple[str, ...]] = ("path", "train_path")
    MEASURES: ClassVar[tuple[str, ...]]

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,40}$")] | None = None
    """Tells evaluations of one kind apart: its measurements are called MEASUREMENT/NAME."""
    path: str | None = None
    """Folder of class folders, or WebDataset shards (.tar) with class numbers (.cls);
    imagenet_val when empty."""
    every: Annotated[int, Field(ge=1)] = 1
    """It runs after every so many epochs and after the last."""

    @property
    def label(self) -> str:
        """What its measurements' names end in."""
        return f"/{self.name}" if self.name else ""

    def measures(self) -> tuple[str, ...]:
        """Names of its measurements."""
        return tuple(measure + self.label for measure in self.MEASURES)


class ZeroShotEvaluation(_Evaluation):
    """Zero-shot accuracy on any labelled images, by class names and templates."""

    MEASURES = ("zero_shot_top1", "zero_shot_top5")

    kind: Literal["zero_shot"]
    """The kind of evaluation."""

    @model_validator(mode="after")
    def _has_images(self) -> ZeroShotEvaluation:
        if self.path is None:
            raise ValueError(
                "a zero_shot evaluation needs its path; imagenet_val is evaluated by itself"
            )
        return self


class KnnEvaluation(_Evaluation):
    """Accuracy of the nearest neighbours among image features."""

    MEASURES = ("knn_top1",)

    kind: Literal["knn"]
    """The kind of evaluation."""
    train_path: str | None = None
    """Labelled images whose features are the neighbours; when empty the other images of path."""
    neighbours: Annotated[int, Field(ge=1)] = 200
    """Neighbours that vote."""
    temperature: Positive = 0.1
    """Votes are exp(cosine / temperature)."""


class LinearEvaluation(_Evaluation):
    """Accuracy of a linear classifier on frozen image features."""

    MEASURES = ("linear_top1",)

    kind: Literal["linear"]
    """The kind of evaluation."""
    train_path: str | None = None
    """Labelled images it is fitted to; when empty half of the images of each class of path."""
    penalty: Annotated[float, Field(ge=0)] = 1e-3
    """Weight of the squared weights beside the mean cross entropy."""


class RetrievalEvaluation(_Evaluation):
    """Recall of captions by images and of images by captions, each pair once."""

    MEASURES = tuple(f"retrieval_{way}_r{k}" for way in ("i2t", "t2i") for k in (1, 5, 10))

    kind: Literal["retrieval"]
    """The kind of evaluation."""

    @model_validator(mode="after")
    def _has_pairs(self) -> RetrievalEvaluation:
        if self.path is None or not self.path.endswith(".tar"):
            raise ValueError(
                f"a retrieval evaluation needs shards of images and captions as its path "
                f"(.../{{00..07}}.tar), not {self.path!r}"
            )
        return self


Evaluation = Annotated[
    ZeroShotEvaluation | KnnEvaluation | LinearEvaluation | RetrievalEvaluation,
    Field(discriminator="kind"),
]


def refuse_unclear(evaluations: Sequence[Evaluation], *, default_path: str | None) -> None:
    """Raise ValueError for two of one name, or one without data."""
    seen: set[str] = set()
    for evaluation in evaluations:
        if evaluation.path is None and default_path is None:
            raise ValueError(
                f"evaluation {evaluation.kind}{evaluation.label} has no data: give its path, "
                "or imagenet_val"
            )
        for measure in evaluation.measures():
            if measure in seen:
                raise ValueError(
                    f"two evaluations measure {measure}; give each of kind {evaluation.kind} "
                    "a name of its own"
                )
            seen.add(measure)
