"""Data order, batches, substitutes and the decoded cache."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from small_trials import make_data, write_pairs

from ablate.errors import DataError
from ablate.training.counts import steps_per_epoch
from ablate.training.data.augment import SeededCrop, Seeds
from ablate.training.data.batches import Batches, load
from ablate.training.data.decode import Bytes, decode, read_pair
from ablate.training.data.order import Order, child_seeds
from ablate.training.data.pairs import ImageTextSamples
from ablate.training.data.shards import index_shards


class Numbers:
    """A set whose samples are their own numbers, some of them bad."""

    fingerprint = "numbers"

    def __init__(self, sizes: Sequence[int], *, bad: Sequence[int] = ()) -> None:
        self.shard_sizes = np.array(sizes, np.int64)
        self._bad = np.array(bad, np.int64)

    def batch(self, ids: Any, seeds: Any) -> tuple[tuple[torch.Tensor, ...], Any]:
        bad = np.isin(ids, self._bad)
        numbers = torch.from_numpy(np.where(bad, -1, ids))
        return (numbers, torch.from_numpy(seeds.astype(np.int64))), bad


def batches(samples: Any, *, rank: int = 0, world_size: int = 1, **changes: int) -> Batches:
    options = {"num_samples": 100, "batch_size": 10, "accum_freq": 1, "seed": 5, **changes}
    return Batches(samples, rank=rank, world_size=world_size, **options)


@pytest.mark.parametrize("sizes", [[100], [10] * 10, [3, 40, 1, 56] * 9, [1] * 37])
def test_an_epoch_is_a_permutation(sizes: list[int]) -> None:
    """Every sample stands at exactly one position of an epoch, and epochs differ."""
    order = Order(np.array(sizes), key=3, window=4)
    positions = np.arange(sum(sizes))
    first, second = order.ids(0, positions), order.ids(1, positions)
    assert sorted(first.tolist()) == sorted(second.tolist()) == positions.tolist()
    assert (first != second).any() and (first != positions).any()


def test_positions_are_looked_up_one_by_one() -> None:
    """A position's sample does not depend on what else is asked for, or on what came before."""
    order = Order(np.array([30, 5, 20, 45]), key=3, window=2)
    whole = order.ids(7, np.arange(100))
    other = Order(np.array([30, 5, 20, 45]), key=3, window=2)
    for position in (99, 0, 50, 17):
        assert other.ids(7, np.array([position]))[0] == whole[position]
    assert (order.ids(7, np.arange(100, 130)) == whole[:30]).all()


def test_windows_keep_reading_local() -> None:
    """Samples of one window of positions come from a window of shards."""
    order = Order(np.array([10] * 40), key=1, window=4)
    shards = order.ids(0, np.arange(400)) // 10
    assert all(len(set(shards[start : start + 40].tolist())) == 4 for start in range(0, 400, 40))


def test_the_order_is_the_same_for_ever() -> None:
    """The permutation is integer arithmetic of our own: these numbers hold on any machine."""
    assert Order(np.array([4, 4]), key=123).ids(2, np.arange(8)).tolist() == [
        2, 3, 4, 5, 1, 0, 6, 7
    ]  # fmt: skip


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_global_batches_do_not_depend_on_the_world_size(world_size: int) -> None:
    """The ranks' slices of a global batch, put together, are the same samples and seeds."""
    one = batches(Numbers([60, 40]), batch_size=20)
    ranks = [
        batches(
            Numbers([60, 40]), batch_size=20 // world_size, rank=rank, world_size=world_size
        )
        for rank in range(world_size)
    ]  # fmt: skip
    for number in range(12):
        for column in range(2):
            parts = torch.cat([rank[number][0][column] for rank in ranks])
            assert torch.equal(parts, one[number][0][column])


def test_the_last_batch_of_an_epoch_is_filled_from_its_start() -> None:
    """25 samples in batches of 10 make three batches; none is partial, every sample occurs."""
    source = batches(Numbers([25]), num_samples=25)
    epoch = torch.cat([source[number][0][0] for number in range(3)])
    assert len(epoch) == 30
    assert sorted(epoch[:25].tolist()) == list(range(25))
    assert epoch[25:].tolist() == epoch[:5].tolist()


@given(
    size=st.integers(20, 60), epoch=st.integers(61, 400), batch=st.integers(1, 12),
    accum=st.integers(1, 3), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=40)
def test_an_epoch_longer_than_the_set_passes_over_it_anew(
    size: int, epoch: int, batch: int, accum: int, seed: int
) -> None:
    """Every pass holds each sample once, in another order and with other augmentations; nothing
    but what fills up a step comes twice alike."""
    source = batches(
        Numbers([size]), num_samples=epoch, batch_size=batch, accum_freq=accum, seed=seed
    )
    number = accum * steps_per_epoch(epoch, batch_size=batch, accum_freq=accum, world_size=1)
    parts = [source[micro].tensors for micro in range(number)]
    ids, seeds = (torch.cat([part[column] for part in parts]).tolist() for column in (0, 1))
    passes = [ids[start : start + size] for start in range(0, len(ids), size)]
    whole = [one for one in passes if len(one) == size]
    if epoch >= size + batch * accum:
        assert len(set(zip(ids, seeds, strict=True))) == len(ids)
        assert all(sorted(one) == list(range(size)) for one in whole)
        assert len({tuple(one) for one in whole}) == len(whole)
    else:
        assert len(set(zip(ids, seeds, strict=True))) >= min(len(ids), size)


def test_fewer_ranks_pass_over_the_set_alike() -> None:
    """Ranks that take several micro-batches in the place of one see the samples that all saw."""
    many = [
        batches(Numbers([30]), num_samples=100, batch_size=4, rank=rank, world_size=4)
        for rank in range(4)
    ]
    few = batches(Numbers([30]), num_samples=112, batch_size=4, accum_freq=4)
    for step in range(14):
        theirs = torch.cat([rank[step].tensors[1] for rank in many])
        ours = torch.cat([few[step * 4 + micro].tensors[1] for micro in range(4)])
        assert torch.equal(theirs, ours)


def test_small_shards_are_shuffled_over_enough_samples() -> None:
    """Shards of one class each: others of a row's class in its batch are as rare as by chance,
    where the shards are small; large ones keep to a window of sixteen."""
    small = Order(np.full(200, 100), key=1)
    classes = small.ids(0, np.arange(20_000)) // 100
    others = [
        (np.bincount(batch, minlength=200)[batch] - 1).mean() for batch in classes.reshape(-1, 125)
    ]
    assert np.mean(others) < 1.2 * 124 * 99 / 19_999
    large = Order(np.full(64, 5000), key=1)
    shards = large.ids(0, np.arange(80_000)) // 5000
    assert len(set(shards.tolist())) == 16


def test_leftovers_of_accumulation_are_dropped() -> None:
    """100 samples in steps of 3 batches of 10: the tenth batch belongs to no step."""
    source = batches(Numbers([100]), accum_freq=3)
    assert source.positions(8) == (0, pytest.approx(np.arange(80, 90)))
    assert source.positions(9)[0] == 1


def test_bad_samples_are_replaced_by_the_next_good_one_and_counted() -> None:
    """A bad sample's row holds the next position's sample with that sample's own seed."""
    good = batches(Numbers([100]))
    ids = good.ids(0)
    source = batches(Numbers([100], bad=ids[3:5].tolist()))
    (numbers, seeds), substitutes, unusable = source[0]
    assert substitutes == 2 and not unusable
    assert numbers[3] == numbers[4] == ids[5]
    assert seeds[3] == seeds[4] == seeds[5]
    untouched = [row for row in range(10) if row not in (3, 4)]
    assert numbers[untouched].tolist() == ids[untouched].tolist()


def test_a_batch_without_substitutes_says_so() -> None:
    """When no substitute can be found, the batch comes all the same, and says why it is void."""
    batch = batches(Numbers([100], bad=list(range(100))))[0]
    assert "100 samples in a row cannot be used, from position 0 of epoch 0" in batch.unusable
    assert batch.tensors[0].shape == (10,)


def test_seeds_pair_runs_and_separate_streams() -> None:
    """The three streams of a seed differ, and other seeds have others."""
    assert child_seeds(1) == child_seeds(1)
    assert len({*child_seeds(1), *child_seeds(2)}) == 6


def samples_of(folder: Path, *, cache_gib: float, crop: int = 32) -> ImageTextSamples:
    index = index_shards(str(folder / "train" / "{00000..00002}.tar"), cache=None)
    return ImageTextSamples(
        index,
        transform=SeededCrop(crop, scale=(0.5, 1.0)),
        tokenizer=Letters(),
        cache_gib=cache_gib,
    )


class Letters:
    """The first eight letters' numbers, each with `shift` added."""

    def __init__(self, shift: int = 0, *, fingerprint: str = "letters") -> None:
        self._shift = shift
        self.fingerprint = fingerprint

    def __call__(self, texts: list[str]) -> torch.Tensor:
        rows = [[ord(letter) + self._shift for letter in text[:8].ljust(8)] for text in texts]
        return torch.tensor(rows)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cache_gib", [0.0, 1.0])
def test_batches_do_not_depend_on_loader_processes_or_caches(
    data: Path, workers: int, cache_gib: float
) -> None:
    """Pixels and tokens are bit-equal with 0 and 2 loader processes, cached and read."""
    plain = batches(samples_of(data, cache_gib=0.0), num_samples=96, batch_size=16)
    other = batches(samples_of(data, cache_gib=cache_gib), num_samples=96, batch_size=16)
    loaded = load(other, start=3, stop=9, workers=workers, prefetch=2, pin_memory=False)
    for number, batch in zip(range(3, 9), loaded, strict=True):
        expected = plain[number].tensors
        assert batch.substitutes == 0
        assert all(torch.equal(a, b) for a, b in zip(batch.tensors, expected, strict=True))


def test_images_are_decoded_as_the_peer_decodes_them(data: Path) -> None:
    """Our pixels are those of webdataset's decoder `pilrgb`, which the peer uses."""
    autodecode = pytest.importorskip("webdataset.autodecode")
    index = index_shards(str(data / "train" / "00000.tar"), cache=None)
    peer = autodecode.ImageHandler("pilrgb")
    for number in range(8):
        content, _ = index.read(number)
        assert np.array_equal(decode(content), np.asarray(peer("x.jpg", content)))


def test_damaged_images_and_empty_captions_are_bad(tmp_path: Path) -> None:
    """A truncated image, bytes that are none, a bomb and a blank caption; cached and read."""
    whole = io.BytesIO()
    Image.new("RGB", (40, 40), (9, 99, 199)).save(whole, "JPEG")
    good = whole.getvalue()
    pairs = [(good, "a"), (good[:200], "b"), (b"nothing", "c"), (good, "  "), (good, "e")]
    (tmp_path / "train").mkdir()
    write_pairs(tmp_path / "train" / "00000.tar", pairs)
    index = index_shards(str(tmp_path / "train" / "00000.tar"), cache=None)
    assert [read_pair(index, i) is None for i in range(5)] == [False, True, True, True, False]
    for cache_gib in (0.0, 1.0):
        samples = ImageTextSamples(
            index, transform=_Sizes(), tokenizer=Letters(),
            cache_gib=cache_gib,
        )  # fmt: skip
        (sizes, _), bad = samples.batch(np.arange(5), np.zeros(5, np.uint64))
        assert bad.tolist() == [False, True, True, True, False]
        assert sizes.tolist() == [40, 8, 8, 8, 40]


@given(st.sampled_from(["JPEG", "PNG", "WEBP", "AVIF"]), st.data())
@settings(max_examples=150)
def test_a_damaged_image_is_a_bad_sample_whatever_its_decoder_raises(
    kind: str, drawn: st.DataObject
) -> None:
    """An image file with a few other bytes is an image, or a DataError that says why."""
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (1, 20, 200)).save(file, kind)
    damaged = bytearray(file.getvalue())
    for _ in range(drawn.draw(st.integers(1, 4))):
        damaged[drawn.draw(st.integers(0, len(damaged) - 1))] = drawn.draw(st.integers(0, 255))
    try:
        assert decode(bytes(damaged)).shape[2] == 3
    except DataError as error:
        assert "the image cannot be decoded (" in str(error)


class _Sizes:
    def __call__(self, images: Sequence[Bytes], seeds: Seeds) -> torch.Tensor:
        return torch.tensor([len(image) for image in images])


def test_the_cache_is_keyed_by_the_data(tmp_path: Path) -> None:
    """Other shards under the same name do not meet the old cache."""
    first = make_data(tmp_path / "d")
    before = samples_of(first, cache_gib=1.0)
    shard = first / "train" / "00000.tar"
    blue = io.BytesIO()
    Image.new("RGB", (40, 40), (0, 0, 255)).save(blue, "JPEG")
    write_pairs(shard, [(blue.getvalue(), "blue")] * 32)
    after = samples_of(first, cache_gib=1.0)
    assert before.fingerprint != after.fingerprint
    ids, seeds = np.arange(4), np.zeros(4, np.uint64)
    assert not torch.equal(before.batch(ids, seeds)[0][0], after.batch(ids, seeds)[0][0])


def test_a_set_that_is_too_large_is_not_cached(data: Path) -> None:
    """The bound is on the decoded size: 96 images of 40 x 40 take 0.00043 GiB."""
    assert samples_of(data, cache_gib=0.0004)._cached is None
    assert samples_of(data, cache_gib=0.0005)._cached is not None


def test_epoch_length_counts() -> None:
    """Rounded up over the batch, down over the accumulation."""
    count = steps_per_epoch
    assert count(5824, batch_size=128, accum_freq=1, world_size=1) == math.ceil(45.5)
    assert count(100, batch_size=10, accum_freq=3, world_size=1) == 3
    assert count(5, batch_size=10, accum_freq=2, world_size=1) == 0


def test_a_fast_decode_is_smaller_and_shows_the_same() -> None:
    """A JPEG comes at a power of 1/2 that is no smaller than asked; other formats as they are."""
    y, x = np.mgrid[:300, :400]
    pixels = np.stack([x * 255 // 400, y * 255 // 300, (x + y) * 255 // 700], axis=2)
    image = Image.fromarray(pixels.astype(np.uint8))
    jpeg, png = io.BytesIO(), io.BytesIO()
    image.save(jpeg, "JPEG", quality=95)
    image.save(png, "PNG")
    for least, shape in (((34, 34), (38, 50)), ((100, 100), (150, 200)), ((236, 236), (300, 400))):
        small = decode(jpeg.getvalue(), least)
        assert small.shape == (*shape, 3)
        expected = np.asarray(image.resize(shape[::-1], Image.Resampling.BOX), np.int64)
        assert abs(small - expected).mean() < 3
        assert np.array_equal(decode(png.getvalue(), least), pixels)


def test_a_fast_decode_has_a_cache_of_its_own(data: Path) -> None:
    """Samples that were decoded small are never taken for whole ones; cached and read are equal."""
    index = index_shards(str(data / "train" / "00000.tar"), cache=None)

    def read(cache_gib: float, least: tuple[int, int] | None) -> list[int]:
        samples = ImageTextSamples(
            index, transform=_Sizes(), tokenizer=Letters(),
            cache_gib=cache_gib, at_least=least,
        )  # fmt: skip
        (sizes, _), _ = samples.batch(np.arange(4), np.zeros(4, np.uint64))
        return sizes.tolist()

    for cache_gib in (1.0, 0.0, 1.0):
        assert read(cache_gib, None) == [40] * 4
        assert read(cache_gib, (10, 10)) == [10] * 4
