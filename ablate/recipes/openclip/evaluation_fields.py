"""What a configuration may say about evaluations, beside the peer's own zero-shot one.

An evaluation has a kind, data, and a schedule. Its measurements are named after the kind:
``knn_top1``, ``linear_top1``, ``zero_shot_top1``, ``retrieval_i2t_r1``; with a name of its own,
which two evaluations of one kind need, ``knn_top1/NAME``. A study's objective may be any of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, Union

from pydantic import Field, model_validator

from ablate.training.evaluations.fields import EvaluationFields
from ablate.training.evaluations.kinds import ON_FEATURES
from ablate.trial.metrics import Metric


class ZeroShotEvaluation(EvaluationFields):
    """Zero-shot accuracy on any labelled images, by class names and templates."""

    MEASURES = (
        Metric("zero_shot_top1", "fraction", "zero-shot top-1 of a set", "maximize"),
        Metric("zero_shot_top5", "fraction", "zero-shot top-5 of a set", "maximize"),
    )

    kind: Literal["zero_shot"]
    """The kind of evaluation."""

    @model_validator(mode="after")
    def _has_images(self) -> ZeroShotEvaluation:
        if self.path is None:
            raise ValueError(
                "a zero_shot evaluation needs its path; imagenet_val is evaluated by itself"
            )
        return self


class RetrievalEvaluation(EvaluationFields):
    """Recall of captions by images and of images by captions, each pair once."""

    MEASURES = tuple(
        Metric(f"retrieval_{way}_r{k}", "fraction", f"{what} recall at {k}", "maximize")
        for way, what in (("i2t", "image-to-text"), ("t2i", "text-to-image"))
        for k in (1, 5, 10)
    )

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


KINDS: tuple[type[EvaluationFields], ...] = (ZeroShotEvaluation, *ON_FEATURES, RetrievalEvaluation)

if TYPE_CHECKING:
    Evaluation = EvaluationFields
else:
    Evaluation = Annotated[Union[KINDS], Field(discriminator="kind")]  # noqa: UP007  # found
