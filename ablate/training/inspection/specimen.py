"""A model to look at, with labelled images to look at it with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Specimen:
    """A model with its initial weights, and the labelled images to look at it with."""

    model: torch.nn.Module
    """In eval mode, on its device."""
    frozen: tuple[str, ...]
    """Parameters that the configuration freezes."""
    labels: npt.NDArray[np.int64]
    """Class number of each image; empty without images."""
    class_names: Sequence[str]
    features: Callable[[torch.nn.Module, npt.NDArray[np.int64]], torch.Tensor]
    """(model, rows) -> features of these images, on the CPU."""
    own: Mapping[
        str,
        Callable[[torch.nn.Module, torch.Tensor, npt.NDArray[np.int64], int | None], torch.Tensor],
    ] = field(default_factory=dict)
    """What only such a model can be asked, by the measure's name: (model, features, rows, most
    prompts) -> whether each image is right among the classes of these rows."""
    lacks: tuple[str, ...] = ()
    """What it cannot be asked, each with the reason."""
