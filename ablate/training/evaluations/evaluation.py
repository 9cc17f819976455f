"""An evaluation, as a type."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    from ablate.training.ranks import Gang


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


@runtime_checkable
class Answering(Evaluation, Protocol):
    """An evaluation that knows of each image whether it was right, after it ran."""

    @property
    def right(self) -> dict[str, npt.NDArray[np.bool_]]:
        """Measurement -> one entry an image, in the order of the data; on all ranks."""
        ...

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """Class of each image."""
        ...
