"""The augmentation of src/multicropdataset.py, each crop from a seed of its own.

Crops are resized bicubically, where the peer's torchvision default is bilinear.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from torchvision.transforms import ColorJitter

from ablate.recipes.swav.config import Config
from ablate.training.data.augment import SeededCrop
from ablate.training.data.colours import SeededColours
from ablate.training.data.pairs import ImageTransform
from ablate.training.data.pictures import Flipped

BLUR_SHARE = 0.5
BLUR_RADIUS = (0.1, 2.0)
JITTER = (0.8, 0.8, 0.8, 0.2)
JITTER_SHARE, GREY_SHARE = 0.8, 0.2


def make_views(config: Config) -> list[ImageTransform]:
    """A transform for each crop of an image."""
    colours = SeededColours(
        ColorJitter(*JITTER),
        share=JITTER_SHARE,
        grey_share=GREY_SHARE,
        chance=lambda: float(torch.rand(1)),
    )
    return [
        Flipped(SeededCrop(size, scale=(low, high), colours=colours, extra=(_blur,)))
        for size, low, high in config.crops
    ]


def _blur(image: Image.Image) -> Any:
    """Gaussian blur of half of the images; the generators are seeded from the sample's."""
    if np.random.rand() > BLUR_SHARE:
        return image
    return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(*BLUR_RADIUS)))
