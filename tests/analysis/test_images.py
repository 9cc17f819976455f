"""A difference on other images: both seeds and images are drawn anew, and the interval covers."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from ablate.analysis.analysis import analyze_results
from ablate.analysis.images import OnImages, split
from ablate.analysis.results import Objective, Result
from ablate.records.answers import pack, pack_labels, unpack, unpack_labels


def judge(
    right: np.ndarray, labels: np.ndarray | None = None
) -> tuple[OnImages, tuple[float, float]]:
    """Two cells' bits [cell, seed, image]: (image by image, interval over seeds alone)."""
    results = [
        Result((("a", str(cell)),), seed, "completed", float(bits.mean()))
        for cell, seeds in enumerate(right)
        for seed, bits in enumerate(seeds)
    ]
    (c,) = analyze_results(results, baseline={"a": "0"}, objective=Objective()).contrasts
    assert c.standard_error is not None and c.ci is not None
    found = split(right[1], right[0], labels, standard_error=c.standard_error, df=c.df)
    assert found is not None
    return found, c.ci


def draw(generator: np.random.Generator, images: int, seeds: int) -> np.ndarray:
    """Levels that shift single images and none on average; seeds add their own noise."""
    ease = generator.normal(0, 2, images)
    shift = generator.normal(0, 1, (2, 1, images))
    return ease + shift + generator.normal(0, 1, (2, seeds, images)) > 0


@pytest.mark.parametrize("seeds", [3, 8])
def test_the_interval_for_other_images_covers_where_that_of_seeds_does_not(seeds: int) -> None:
    """1,000 images, no difference in the population, 200 studies: covered in .90 to .99 on other
    images; on seeds alone in fewer, the more seeds the fewer."""
    generator = np.random.default_rng(seeds)
    ours, usual, shares = [], [], []
    for _ in range(200):
        found, ci = judge(draw(generator, 1000, seeds))
        ours.append(found.ci[0] <= 0 <= found.ci[1])
        usual.append(ci[0] <= 0 <= ci[1])
        shares.append(found.image_share)
    assert 0.90 <= np.mean(ours) <= 0.995
    assert np.mean(usual) <= (0.95 if seeds == 3 else 0.85)
    assert np.mean(shares) > 0.3


def test_without_shifts_of_single_images_other_images_add_little() -> None:
    """Where levels differ by noise alone, the images' share of the variance is small."""
    generator = np.random.default_rng(0)
    ease = generator.normal(0, 2, 2000)
    shares = [
        judge(ease + generator.normal(0, 1, (2, 5, 2000)) > 0)[0].image_share for _ in range(30)
    ]
    assert np.mean(shares) < 0.3


def test_a_class_that_falls_is_named_and_few_others() -> None:
    """100 classes of 20 images: the one whose images all become wrong stands out first; of the
    others at most 5 % are named; images listed are among those that change."""
    generator = np.random.default_rng(2)
    labels = np.repeat(np.arange(100, dtype=np.int32), 20)
    ease = generator.normal(1, 2, 2000)
    right = ease + generator.normal(0, 1, (2, 4, 2000)) > 0
    right[1][:, labels == 42] = False
    found, _ = judge(right, labels)
    assert (found.classes[0].label, found.classes[0].images) == (42, 20)
    assert found.classes[0].delta < 0 and len(found.classes) <= 5
    for image, change in found.flips:
        assert change == pytest.approx((right[1][:, image] * 1.0 - right[0][:, image]).mean())


def test_a_class_is_judged_by_a_t_test_over_its_images() -> None:
    """scipy's, class by class, and Benjamini-Hochberg over those of three or more images, those
    without any spread among them; labels need be neither sorted nor without gaps."""
    generator = np.random.default_rng(3)
    labels = np.repeat(np.arange(40, dtype=np.int32) * 7 + 2, generator.integers(1, 30, 40))
    generator.shuffle(labels)
    right = generator.random((2, 3, len(labels))) < 0.5
    right[1][:, np.isin(labels, [9, 30, 37, 44])] = False
    right[:, :, labels == 16] = [[[True]], [[False]]]
    right[:, :, labels == 23] = True
    found, _ = judge(right, labels)
    change = (right[1] * 1.0 - right[0]).mean(axis=0)
    whole = {int(k): change[labels == k] for k in np.unique(labels) if (labels == k).sum() >= 3}
    p = {
        k: stats.ttest_1samp(d, 0.0).pvalue if np.ptp(d) else float(d[0] == 0)
        for k, d in whole.items()
    }
    adjusted = dict(zip(p, stats.false_discovery_control(list(p.values())), strict=True))
    expected = {k: q for k, q in adjusted.items() if q <= 0.05}
    assert {16} < set(expected)
    assert {c.label: c.p_adjusted for c in found.classes} == pytest.approx(expected, abs=1e-12)
    for c in found.classes:
        assert (c.images, c.delta) == (len(whole[c.label]), pytest.approx(whole[c.label].mean()))


def test_bits_and_classes_come_back_and_are_small() -> None:
    """50,000 images: one bit each, 8.4 kB as text; sorted classes under 3 kB."""
    generator = np.random.default_rng(0)
    right = generator.random(50_000) < 0.4
    labels = np.repeat(np.arange(1000), 50)
    assert (unpack(pack(right), 50_000) == right).all()
    assert (unpack_labels(pack_labels(labels)) == labels).all()
    assert len(pack(right)) < 8_400 and len(pack_labels(labels)) < 3_000
