"""How the stages' evaluations read images, and those that they have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ablate.recipes.mae.config import Config
from ablate.training.arithmetic import make_autocast
from ablate.training.counts import make_due
from ablate.training.evaluations.on_features import ReadFeatures, read_features
from ablate.training.image_models import make_encoder, open_eval_images

if TYPE_CHECKING:
    import torch

    from ablate.training.data.augment import ToInput
    from ablate.training.evaluations.features import Encode, Encoder
    from ablate.training.evaluations.images import EvalImages


def open_images(config: Config, path: str) -> EvalImages:
    """Labelled images of a folder of class folders, or of shards with class numbers."""
    return open_eval_images(path, size=config.input_size, cache_gib=config.cache_gib)


def make_reader(
    config: Config, encode: Encode, *, device: torch.device, to_input: ToInput
) -> Encoder:
    """How features are computed: in the precision of training."""
    autocast = make_autocast(config.precision, device)
    return make_encoder(encode, autocast=autocast, to_input=to_input, device=device)


def make_readers(
    config: Config, encoder: Encoder, *, opened: Callable[[str], EvalImages]
) -> list[ReadFeatures]:
    """Those of `evaluations` that read features."""
    return read_features(
        config.evaluations,
        open_images=opened,
        default_path=config.val_path,
        encoder=encoder,
        make_due=lambda every: make_due(every, config.epochs),
    )
