"""A difference on these images, and on other images of the same kind.

Every run is judged on the same images, so an interval over seeds says nothing of what other images
would show. With one bit per image d[s, i] = right(level) - right(reference), seed by seed, is a
two-way table, seeds and images both random: d = delta + seed + image + rest. The part of the mean's
variance that other images would redraw is Var(image) / I = (MS_images - MS_rest) / (S I), by the
mean squares of the two-way analysis of variance; it is added to the variance over seeds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy

from ablate.analysis import power
from ablate.analysis.contrasts import ALPHA
from ablate.analysis.multiplicity import benjamini_hochberg
from ablate.analysis.results import FloatArray

MOST_FLIPS = 8
"""Images that are listed."""


@dataclass(frozen=True, slots=True)
class ClassEffect:
    """How the images of one class fare under a level."""

    label: int
    images: int
    delta: float
    p_adjusted: float
    """Over all classes, for the share of false findings (Benjamini-Hochberg)."""


@dataclass(frozen=True, slots=True)
class OnImages:
    """A contrast of two cells, image by image."""

    images: int
    seeds: int
    ci: tuple[float, float]
    """95 % interval for other seeds on other images of this kind."""
    image_share: float
    """Share of that interval's variance that the choice of images makes."""
    classes: tuple[ClassEffect, ...]
    """Those that stand out at a share of false findings of 5 %, the surest first."""
    flips: tuple[tuple[int, float], ...]
    """(image, mean change over seeds), those that change the most, in the order of the data."""


def split(
    level: npt.NDArray[np.bool_],
    reference: npt.NDArray[np.bool_],
    labels: npt.NDArray[np.int32] | None,
    *,
    standard_error: float,
    df: float,
) -> OnImages | None:
    """`level` and `reference` are [seed, image], of the same seeds; None with fewer than two seeds
    or images. `standard_error` and `df` are the contrast's, over seeds alone."""
    d = level.astype(float) - reference.astype(float)
    seeds, images = d.shape
    if seeds < 2 or images < 2 or df < 1:
        return None
    delta = float(d.mean())
    by_image = d.mean(axis=0)
    rest = d - by_image - d.mean(axis=1, keepdims=True) + delta
    ms_rest = float((rest**2).sum()) / ((seeds - 1) * (images - 1))
    ms_images = seeds * float(((by_image - delta) ** 2).sum()) / (images - 1)
    of_images = max(ms_images - ms_rest, 0.0) / (seeds * images)
    of_seeds = standard_error**2
    total = of_images + of_seeds
    freedom = df
    if total > 0:
        freedom = total**2 / (of_seeds**2 / df + of_images**2 / (images - 1))
    half = power.t_quantile(ALPHA / 2, freedom) * math.sqrt(total)
    order = np.argsort(-np.abs(by_image), kind="stable")[:MOST_FLIPS]
    return OnImages(
        images=images,
        seeds=seeds,
        ci=(delta - half, delta + half),
        image_share=of_images / total if total > 0 else 0.0,
        classes=() if labels is None else _classes(by_image, labels),
        flips=tuple((int(i), float(by_image[i])) for i in sorted(order) if by_image[i]),
    )


def _classes(by_image: FloatArray, labels: npt.NDArray[np.int32]) -> tuple[ClassEffect, ...]:
    """A t test over the images of each class that has three or more and any change."""
    known, place, images = np.unique(labels, return_inverse=True, return_counts=True)
    delta = np.bincount(place, by_image) / images
    squares = np.bincount(place, (by_image - delta[place]) ** 2)
    error = np.sqrt(squares / np.maximum(images - 1, 1) / images)
    with np.errstate(divide="ignore", invalid="ignore"):
        p = 2.0 * scipy.stats.t.sf(np.abs(delta) / error, images - 1)
    # Without spread: all images alike, unchanged or changed.
    p = np.where(error > 0.0, p, np.where(delta == 0.0, 1.0, np.spacing(1.0)))
    judged = np.flatnonzero(images >= 3)
    adjusted = benjamini_hochberg(p[judged].tolist())
    effects = [
        ClassEffect(int(known[at]), int(images[at]), float(delta[at]), q)
        for at, q in zip(judged, adjusted, strict=True)
        if q <= ALPHA
    ]
    return tuple(sorted(effects, key=lambda effect: (effect.p_adjusted, effect.label)))
