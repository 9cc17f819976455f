"""A batch's colours against the peers' own objects and torchvision's functions, byte for byte."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.transform import color_jitter, gray_scale
from PIL import Image
from torchvision.transforms import ColorJitter, RandomApply, RandomGrayscale
from torchvision.transforms import functional as tv

from ablate.recipes.openclip.config import Augmentation
from ablate.recipes.openclip.data import make_colours
from ablate.training.data.augment import sample_seeds, seed_globals
from ablate.training.data.colours import ADJUST, SeededColours

THEIRS = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)


def pictures(count: int, height: int, width: int, *, seed: int = 0) -> np.ndarray:
    """Noise, grey noise, black and white, each a quarter of them."""
    images = np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), np.uint8)
    images[1::4] = images[1::4, :, :, :1]
    images[2::4], images[3::4] = 0, 255
    return images


def one_by_one(images: np.ndarray, seeds: np.ndarray, transforms: Sequence[Any]) -> np.ndarray:
    """What the peers' objects make of each picture, seeded by its seed."""
    made = np.empty_like(images)
    for row, seed in enumerate(seeds.tolist()):
        seed_globals(seed)
        picture = Image.fromarray(images[row])
        for transform in transforms:
            picture = transform(picture)
        made[row] = np.asarray(picture)
    return made


def coloured(images: np.ndarray, seeds: np.ndarray, colours: SeededColours) -> np.ndarray:
    made = images.copy()
    colours(made, seeds)
    return made


def by_torch() -> float:
    return float(torch.rand(1))


JITTER = (0.4, 0.4, 0.4, 0.1)
PEERS: dict[str, tuple[Sequence[Any], Callable[[], SeededColours | None]]] = {
    "open_clip, both": (
        (color_jitter(*JITTER, p=0.8), gray_scale(0.2)),
        lambda: make_colours(
            Augmentation(color_jitter=JITTER, color_jitter_prob=0.8, gray_scale_prob=0.2)
        ),
    ),
    "open_clip, grey alone": (
        (gray_scale(0.5),),
        lambda: make_colours(Augmentation(gray_scale_prob=0.5)),
    ),
    "open_clip, jitter alone, without contrast and hue": (
        (color_jitter(0.9, 0.0, 0.3, 0.0, p=0.5),),
        lambda: make_colours(
            Augmentation(color_jitter=(0.9, 0.0, 0.3, 0.0), color_jitter_prob=0.5)
        ),
    ),
    "torchvision, as SwAV": (
        (RandomApply([ColorJitter(0.8, 0.8, 0.8, 0.2)], p=0.8), RandomGrayscale(p=0.2)),
        lambda: SeededColours(
            ColorJitter(0.8, 0.8, 0.8, 0.2), share=0.8, grey_share=0.2, chance=by_torch
        ),
    ),
}


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize(("height", "width"), [(32, 32), (24, 40), (300, 300)])
def test_a_batch_gets_what_the_peers_objects_give_each_picture(
    peer: str, height: int, width: int
) -> None:
    """Small pictures in one block, and pictures that are each larger than a block."""
    theirs, make = PEERS[peer]
    colours = make()
    assert colours is not None
    images = pictures(24 if height > 100 else 96, height, width)
    seeds = sample_seeds(7, 0, np.arange(len(images)))
    made = coloured(images, seeds, colours)
    assert np.array_equal(made, one_by_one(images, seeds, theirs))
    assert 0 < sum(not np.array_equal(a, b) for a, b in zip(made, images, strict=True))


def test_factors_are_torchvisions_to_the_last_bit() -> None:
    """Of 20,000 pictures: a factor that is rounded otherwise changes a few values of one picture
    in two thousand."""
    jitter = ColorJitter(0.4, 0.4, 0.4, 0.1)
    seeds = sample_seeds(11, 0, np.arange(20_000))
    drawn = SeededColours(jitter, share=1.0, grey_share=0.0, chance=random.random).draw(seeds)
    for row, seed in enumerate(seeds.tolist()):
        seed_globals(seed)
        order, *factors = ColorJitter.get_params(
            jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue
        )
        assert drawn.order[row].tolist() == order.tolist()
        assert drawn.factors[row].tolist() == factors


def test_nothing_asked_for_is_no_work() -> None:
    """Without jitter and grey there is nothing that colours."""
    assert make_colours(Augmentation()) is None


@given(
    kind=st.integers(0, 3),
    factors=st.lists(st.floats(0, 3, width=32), min_size=3, max_size=3),
    seed=st.integers(0, 99),
)
@settings(max_examples=60)
def test_each_adjustment_has_torchvisions_bytes(kind: int, factors: list[float], seed: int) -> None:
    """Also beyond what is usually drawn; a hue turns by half a circle at most."""
    given_ = np.array(factors, np.float32) if kind < 3 else np.array(factors, np.float32) / 6
    images = pictures(3, 16, 20, seed=seed)
    made = ADJUST[kind](images, given_)
    for image, factor, ours in zip(images, given_.tolist(), made, strict=True):
        assert np.array_equal(ours, np.asarray(THEIRS[kind](Image.fromarray(image), factor)))


def test_a_picture_is_coloured_the_same_in_any_batch() -> None:
    """What becomes of it depends on its seed alone."""
    images = pictures(40, 32, 32)
    seeds = sample_seeds(7, 0, np.arange(40))
    colours = SeededColours(ColorJitter(*JITTER), share=0.8, grey_share=0.2, chance=random.random)
    whole = coloured(images, seeds, colours)
    assert np.array_equal(coloured(images[13:15], seeds[13:15], colours), whole[13:15])
