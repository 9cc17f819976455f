"""What an exported model makes of fixed inputs: kept beside it, and compared when it is loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ablate.errors import LoadError

if TYPE_CHECKING:
    import torch

PROBE_FILE = "probe_features.json"
"""In the exported folder: {name: features of the fixed inputs}."""


def fixed_images(*shape: int) -> torch.Tensor:
    """The same images everywhere: uniform in -2 to 2; the first dimension counts them."""
    import math

    import numpy as np
    import torch

    from ablate.training.data.augment import uniforms

    numbers = uniforms(np.arange(shape[0], dtype=np.uint64), math.prod(shape[1:]))
    return torch.from_numpy(numbers.astype(np.float32) * 4 - 2).view(shape)


def record_features(folder: Path, found: Mapping[str, torch.Tensor]) -> None:
    """Keep `found` beside the model in `folder`."""
    content = {name: value.tolist() for name, value in found.items()}
    (folder / PROBE_FILE).write_text(json.dumps(content) + "\n", encoding="utf-8")


def check_features(folder: Path, found: Mapping[str, torch.Tensor], *, loader: str) -> str:
    """That a model which `loader` made of `folder` gives what was recorded, in a sentence.

    Raises:
        LoadError: it does not.
    """
    import torch

    from ablate.training.weights import compare_features

    stored = json.loads((folder / PROBE_FILE).read_text(encoding="utf-8"))
    recorded = {name: torch.tensor(value) for name, value in stored.items()}
    if wrong := compare_features(recorded, found):
        far = ", ".join(f"{item.name} by {item.largest:.2g}" for item in wrong)
        raise LoadError(f"{loader} loads it, and its features differ from those recorded: {far}")
    return f"{loader} loads it, and its features are those that were recorded"
