"""Nearest neighbours among image features."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from ablate.training.evaluations.fields import OnFeatures
from ablate.trial.metrics import Metric

if TYPE_CHECKING:
    from ablate.training.evaluations.features import Labelled
    from ablate.training.ranks import Gang


class KnnEvaluation(OnFeatures):
    """Accuracy of the nearest neighbours among image features."""

    MEASURES = (Metric("knn_top1", "fraction", "weighted kNN accuracy", "maximize"),)

    kind: Literal["knn"]
    """The kind of evaluation."""
    neighbours: Annotated[int, Field(ge=1)] = 200
    """Neighbours that vote."""
    temperature: Annotated[float, Field(gt=0.0)] = 0.1
    """Votes are exp(cosine / temperature)."""

    def top1(self, judged: Labelled, reference: Labelled | None, gang: Gang) -> float:
        """Each rank asks for its share of the images (:func:`scores.knn_correct`)."""
        import torch

        from ablate.training.evaluations import scores
        from ablate.training.evaluations.features import share_batches
        from ablate.training.ranks import sum_over_ranks

        features, labels = judged
        correct = scores.knn_correct(
            features,
            labels,
            reference=reference,
            rows=slice(*share_batches(len(features), scores.ROWS, gang)),
            neighbours=self.neighbours,
            temperature=self.temperature,
        )
        right = sum_over_ranks(correct.sum(dtype=torch.float64).cpu(), gang)
        return float(right) / len(features)
