"""What is read from the features of labelled images, of one computation for all kinds."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from ablate.training.data.image_source import pair_labels
from ablate.training.evaluations.features import Encoder, Labelled, image_features
from ablate.training.evaluations.fields import EvaluationFields, OnFeatures
from ablate.training.evaluations.images import EvalImages
from ablate.training.ranks import Gang


@dataclass(frozen=True, slots=True)
class Reader:
    """One kind on its images."""

    kind: OnFeatures
    images: EvalImages
    reference: EvalImages | None = None
    """Labelled images to learn from; None: others of `images`."""

    @property
    def name(self) -> str:
        return f"{self.kind.kind_name()}{self.kind.label}"

    def labels(self) -> npt.NDArray[np.int64]:
        """Classes of the images, in the numbers of those that are learnt from."""
        if self.reference is None:
            return self.images.labels
        return pair_labels(self.images.source, self.reference.source)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadFeatures:
    """What is read from the features of labelled images, which are computed once for all of it.

    The features of a set that several `readers` share count in the time of the first of them.

    Raises:
        DataError: a reader's images have a class that those it learns from lack.
    """

    readers: tuple[Reader, ...]
    encoder: Encoder
    due: Callable[[int], bool]

    def __post_init__(self) -> None:
        for reader in self.readers:
            reader.labels()

    @property
    def name(self) -> str:
        return "+".join(reader.name for reader in self.readers)

    def run(self, model: torch.nn.Module, gang: Gang) -> dict[str, float]:
        """Accuracy and seconds of each reader."""
        known: dict[int, torch.Tensor] = {}

        def measure(images: EvalImages, labels: npt.NDArray[np.int64]) -> Labelled:
            if id(images) not in known:
                known[id(images)] = image_features(model, images, self.encoder, gang)
            features = known[id(images)]
            return features, torch.from_numpy(labels).to(features.device)

        measured = {}
        for reader in self.readers:
            began = time.perf_counter()
            other = reader.reference
            reference = None if other is None else measure(other, other.labels)
            top1 = reader.kind.top1(measure(reader.images, reader.labels()), reference, gang)
            (name,) = reader.kind.measures()
            measured[name] = top1
            measured[f"eval_time_s/{reader.name}"] = time.perf_counter() - began
        return measured


def read_features(
    evaluations: Sequence[EvaluationFields],
    *,
    open_images: Callable[[str], EvalImages],
    default_path: str | None,
    encoder: Encoder,
    make_due: Callable[[int], Callable[[int], bool]],
) -> list[ReadFeatures]:
    """Those of `evaluations` that read features; one for all that have the same schedule.

    `make_due` makes a schedule of a number of epochs.
    """
    readers: dict[int, list[Reader]] = {}
    for spec in evaluations:
        if not isinstance(spec, OnFeatures):
            continue
        path = spec.path or default_path
        assert path is not None, "a Config refuses an evaluation without data"
        reference = None if spec.train_path is None else open_images(spec.train_path)
        readers.setdefault(spec.every, []).append(Reader(spec, open_images(path), reference))
    return [
        ReadFeatures(readers=tuple(together), encoder=encoder, due=make_due(every))
        for every, together in readers.items()
    ]
