"""Initial weights from a file, and the features that tell whether they are the right ones."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ablate.errors import LoadError

if TYPE_CHECKING:
    import torch

    from ablate.training.weights import LoadReport

from ablate.recipes.openclip.config import Config
from ablate.recipes.openclip.encode import encode_image, encode_text
from ablate.training.exported import PROBE_FILE
from ablate.training.init_from import InitFrom, load_initial


def compute_probe(model: Any, *, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """Normalised features of four fixed images and texts, in eval mode; shape (4, dimensions).

    `dtype` is the type of images that the model takes, where it is not that of its weights.
    """
    import numpy as np
    import torch
    from open_clip.utils import to_2tuple

    from ablate.training.data.augment import uniforms

    height, width = to_2tuple(model.visual.image_size)
    numbers = uniforms(np.arange(4, dtype=np.uint64), 3 * height * width)
    images = torch.from_numpy(numbers.astype(np.float32) * 4 - 2).view(4, 3, height, width)
    texts = torch.arange(4 * model.context_length).view(4, -1) * 997 % 40000 + 1
    texts[:, -1] = model.vocab_size - 1  # the largest number ends a text
    device = model.logit_scale.device
    training = model.training
    model.eval()
    with torch.no_grad():
        features = {
            "image": encode_image(model, images.to(device, dtype)).float().cpu(),
            "text": encode_text(model, texts.to(device)).float().cpu(),
        }
    model.train(training)
    return features


def fit_weights(source: InitFrom, model: torch.nn.Module) -> LoadReport:
    """Load the weights of `source` into a model; into one without memory, to see whether they fit.

    Raises:
        LoadError: they do not fit, or the file cannot be read.
    """
    from open_clip.model import resize_pos_embed, resize_text_pos_embed

    def resize(state: Any, net: Any) -> None:
        resize_pos_embed(state, net)
        _resize_attention_pool(state, net)
        resize_text_pos_embed(state, net)

    return load_initial(source, model, resize=resize)


_POOL = "visual.attnpool.positional_embedding"


def _resize_attention_pool(state: Any, model: Any) -> None:
    """Fit a ResNet's positional embedding, as open_clip.model.resize_pos_embed fits a ViT's: the
    mean's place stays, the grid is interpolated."""
    import torch

    own = getattr(getattr(model.visual, "attnpool", None), "positional_embedding", None)
    stored = state.get(_POOL)
    if own is None or stored is None or stored.shape == own.shape:
        return
    sides = [math.isqrt(len(each) - 1) for each in (stored, own)]
    if any(s * s + 1 != len(e) for s, e in zip(sides, (stored, own), strict=True)):
        return  # no square picture; the difference in shape is told
    grid = stored[1:].float().T.reshape(1, -1, sides[0], sides[0])
    resized = torch.nn.functional.interpolate(
        grid, size=(sides[1], sides[1]), mode="bicubic", antialias=True, align_corners=False
    )
    flat = resized.reshape(stored.shape[1], -1).T.to(stored.dtype)
    state[_POOL] = torch.cat([stored[:1], flat])


def load_initial_weights(config: Config, model: torch.nn.Module) -> dict[str, Any]:
    """Start from config.init_from; the load report, for the record.

    Raises:
        LoadError: the weights do not fit, or the model computes other features than were stored
            with them; says which tensors are at their random initialisation.
    """
    import torch

    from ablate.training.weights import compare_features

    assert config.init_from is not None
    path = Path(config.init_from.path)
    report = fit_weights(config.init_from, model)
    content = {**report.to_dict(), "features": "not checked: no probe beside the weights"}
    probe = path.parent / PROBE_FILE
    if report.at_random or report.resized or report.cast:
        content["features"] = "not checked: not all tensors are the file's"
    elif probe.exists():
        stored = {k: torch.tensor(v) for k, v in json.loads(probe.read_text()).items()}
        wrong = compare_features(stored, compute_probe(model))
        if wrong:
            far = ", ".join(f"{item.name} by {item.largest:.2g}" for item in wrong)
            raise LoadError(
                f"{path} loads by name, but the model's features differ from those stored with "
                f"it: {far}. Another architecture (quick_gelu?), or names that were swapped"
            )
        content["features"] = "equal to those stored with the weights"
    return content
