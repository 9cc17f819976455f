"""A linear classifier on frozen image features."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from ablate.training.evaluations.fields import OnFeatures
from ablate.trial.metrics import Metric

if TYPE_CHECKING:
    from ablate.training.evaluations.features import Labelled
    from ablate.training.ranks import Gang


class LinearEvaluation(OnFeatures):
    """Accuracy of a linear classifier on frozen image features."""

    MEASURES = (Metric("linear_top1", "fraction", "linear-probe accuracy", "maximize"),)

    kind: Literal["linear"]
    """The kind of evaluation."""
    penalty: Annotated[float, Field(ge=0)] = 1e-3
    """Weight of the squared weights beside the mean cross entropy."""

    def top1(self, judged: Labelled, reference: Labelled | None, gang: Gang) -> float:
        """The fit is made on rank 0 (:func:`scores.linear_correct`)."""
        from ablate.training.evaluations import scores
        from ablate.training.ranks import broadcast

        share_right = None
        if gang.first:
            correct = scores.linear_correct(*judged, reference=reference, penalty=self.penalty)
            share_right = float(correct.double().mean())
        top1: float = broadcast(share_right, gang)
        return top1
