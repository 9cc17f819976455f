"""Per-sample randomness and transforms, against open_clip's own objects."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from open_clip.transform import AugmentationCfg, image_transform
from PIL import Image, ImageOps
from scipy import stats
from torchvision.transforms import ColorJitter, InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as tv

from ablate.training.data.augment import (
    SeededCrop,
    SeededTransform,
    ToInput,
    sample_seeds,
    uniforms,
)
from ablate.training.data.colours import SeededColours

COLOURS = SeededColours(
    ColorJitter(0.4, 0.4, 0.4, 0.1), share=0.8, grey_share=0.2, chance=random.random
)
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def pictures(count: int = 6) -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    sizes = [(48, 48), (40, 64), (90, 31), (32, 32), (33, 47), (200, 150)]
    return [rng.integers(0, 256, (*sizes[i % 6], 3), dtype=np.uint8) for i in range(count)]


def seeds_of(count: int, *, epoch: int = 0) -> np.ndarray:
    return sample_seeds(99, epoch, np.arange(count))


def test_uniform_numbers_are_uniform_and_independent() -> None:
    """Numbers of neighbouring samples and epochs pass a Kolmogorov-Smirnov test together."""
    draws = np.concatenate([uniforms(seeds_of(2000, epoch=e), 8) for e in range(3)])
    assert 0 <= draws.min() and draws.max() < 1
    assert stats.kstest(draws.ravel(), "uniform").pvalue > 1e-3
    correlation = np.corrcoef(draws.T) - np.eye(8)
    assert abs(correlation).max() < 5 / np.sqrt(len(draws))


def test_seeds_depend_on_key_epoch_and_sample_alone() -> None:
    """A sample's seed is the same in any batch, and another in another epoch or run."""
    assert seeds_of(10)[7] == sample_seeds(99, 0, np.array([7]))[0]
    every = np.concatenate([seeds_of(1000, epoch=e) for e in range(5)] + [
        sample_seeds(98, 0, np.arange(1000))
    ])  # fmt: skip
    assert len(set(every.tolist())) == len(every)


@pytest.mark.parametrize("scale", [(0.9, 1.0), (0.4, 1.0), (0.08, 0.2)])
def test_a_crop_gives_torchvisions_bytes(scale: tuple[float, float]) -> None:
    """For the same box our bytes are torchvision's, and the floats open_clip's transform's."""
    crop = SeededCrop(32, scale=scale)
    images = pictures()
    batch = crop(images, seeds_of(6))
    to_input = ToInput(MEAN, STD, device=torch.device("cpu"))
    heights = np.array([len(image) for image in images])
    widths = np.array([image.shape[1] for image in images])
    peer = image_transform(32, is_train=True, mean=MEAN, std=STD)
    for row, (image, box) in enumerate(
        zip(images, crop.boxes(heights, widths, seeds_of(6)).tolist(), strict=True)
    ):
        theirs = tv.resized_crop(
            Image.fromarray(image), *box, [32, 32], interpolation=InterpolationMode.BICUBIC
        )
        assert np.array_equal(batch[row].numpy(), np.asarray(theirs))
        floats = peer.transforms[-1](peer.transforms[-2](theirs))
        assert torch.equal(to_input(batch[row : row + 1])[0], floats)


@pytest.mark.parametrize("scale", [(0.9, 1.0), (0.4, 1.0)])
@pytest.mark.parametrize("size", [(48, 48), (40, 100), (120, 30)])
def test_boxes_are_distributed_as_torchvisions(
    scale: tuple[float, float], size: tuple[int, int]
) -> None:
    """Top, left, height and width have the distribution of RandomResizedCrop.get_params."""
    count = 3000
    heights, widths = np.full(count, size[0]), np.full(count, size[1])
    ours = SeededCrop(32, scale=scale).boxes(heights, widths, seeds_of(count))
    torch.manual_seed(0)
    image = Image.new("RGB", (size[1], size[0]))
    theirs = np.array(
        [RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3]) for _ in range(count)]
    )
    for column in range(4):
        assert stats.ks_2samp(ours[:, column], theirs[:, column]).pvalue > 1e-4


def test_a_box_that_cannot_fit_is_central() -> None:
    """An image too narrow for any crop is cropped centrally, as torchvision does."""
    crop = SeededCrop(32, scale=(0.99, 1.0))
    for size in ((4, 100), (100, 4)):
        box = crop.boxes(np.array([size[0]]), np.array([size[1]]), seeds_of(1))[0]
        image = Image.new("RGB", (size[1], size[0]))
        theirs = RandomResizedCrop.get_params(image, [0.99, 1.0], [3 / 4, 4 / 3])
        assert tuple(box) == theirs


@pytest.mark.filterwarnings("ignore:Unused augmentation cfg items")
@pytest.mark.parametrize(
    "augmentation",
    [
        {"use_timm": True, "scale": (0.4, 1.0), "re_prob": 0.5, "color_jitter": 0.4},
        {"color_jitter": (0.4, 0.4, 0.4, 0.1), "color_jitter_prob": 0.8, "gray_scale_prob": 0.2},
    ],
    ids=["timm", "colour"],
)
def test_any_transform_depends_on_the_sample_alone(augmentation: dict[str, object]) -> None:
    """A sample looks the same in another batch, after other draws, and differs by epoch."""
    peer = image_transform(32, is_train=True, aug_cfg=AugmentationCfg(**augmentation))
    transform: SeededTransform | SeededCrop = (
        SeededTransform(peer)
        if augmentation.get("use_timm")
        else SeededCrop(32, scale=(0.9, 1.0), colours=COLOURS, extra=[ImageOps.mirror])
    )
    images = pictures()
    whole = transform(images, seeds_of(6))
    torch.rand(5), np.random.rand(3)
    assert torch.equal(transform(images[4:5], seeds_of(6)[4:5])[0], whole[4])
    assert not torch.equal(transform(images, seeds_of(6, epoch=1)), whole)


def test_inputs_take_the_models_type() -> None:
    """Bytes become normalised floats of the asked type; floats are only cast."""
    images = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8)
    exact = ToInput(MEAN, STD, device=torch.device("cpu"))(images)
    cast = ToInput(MEAN, STD, device=torch.device("cpu"), dtype=torch.bfloat16)
    assert exact.shape == (2, 3, 8, 8) and exact.dtype == torch.float32
    assert torch.equal(cast(images), exact.bfloat16())
    assert torch.equal(cast(exact), exact.bfloat16())


@given(
    height=st.integers(40, 320),
    width=st.integers(40, 320),
    hard=st.booleans(),
    side=st.sampled_from([32, 48, 224]),
    seed=st.integers(0, 99),
)
@example(height=129, width=191, hard=True, side=224, seed=30)
@settings(max_examples=40)
def test_a_fast_resize_differs_by_its_rounding_alone(
    height: int, width: int, hard: bool, side: int, seed: int
) -> None:
    """Of noise and hard edges, tall or wide, at most 3 % of the values differ, by 2 at most. Most
    differ of hard noise that is enlarged: the worst of 1,500 such pictures has 2.2 %."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    if hard:
        image = np.repeat((image[:, :, :1] > 127).astype(np.uint8) * np.uint8(255), 3, axis=2)
    seeds = seeds_of(1)
    exact = SeededCrop(side, scale=(0.5, 1.0))([image], seeds).int()
    fast = SeededCrop(side, scale=(0.5, 1.0), fast=True)([image], seeds).int()
    assert (exact - fast).abs().max() <= 2
    assert (exact != fast).float().mean() <= 0.03


def test_channels_last_is_another_layout_of_the_same_input() -> None:
    """Equal values, each pixel's channels side by side; floats that pass through as well."""
    batch = SeededCrop(32, scale=(0.9, 1.0))(pictures(), seeds_of(6))
    plain = ToInput(MEAN, STD, device=torch.device("cpu"))(batch)
    other = ToInput(MEAN, STD, device=torch.device("cpu"), channels_last=True)
    for images in (batch, plain):
        found = other(images)
        assert torch.equal(found, plain)
        assert found.is_contiguous(memory_format=torch.channels_last)
    assert plain.is_contiguous()
