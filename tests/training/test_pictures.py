"""Images without captions: read from folders and shards, cropped once or often."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from small_trials import CLASSES, draw_classes
from tars import write_tar

from ablate.errors import DataError
from ablate.training.data.augment import SeededCrop, sample_seeds
from ablate.training.data.picture_files import open_pictures
from ablate.training.data.pictures import Flipped, Pictures, view_seeds

IDS = np.arange(12)
SEEDS = sample_seeds(1, 0, IDS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_classes(tmp_path_factory.mktemp("pictures") / "drawn", CLASSES)


def _views(size: int) -> Flipped:
    return Flipped(SeededCrop(size, scale=(0.2, 1.0)))


@pytest.mark.parametrize("cache_gib", [0.0, 1.0])
def test_a_folder_gives_each_view_its_own_crop(folder: Path, cache_gib: float) -> None:
    """Two views of one size differ, a third has its own size; asked again, all are the same."""
    files = open_pictures(str(folder))
    assert len(files) == 12 and files.labels is not None
    pictures = Pictures(
        files, views=[_views(16), _views(16), _views(8)], labelled=True, cache_gib=cache_gib
    )
    tensors, bad = pictures.batch(IDS, SEEDS)
    again, _ = pictures.batch(IDS, SEEDS)
    assert [tuple(t.shape) for t in tensors] == [(12, 16, 16, 3)] * 2 + [(12, 8, 8, 3), (12,)]
    assert not bad.any() and not torch.equal(tensors[0], tensors[1])
    assert all(torch.equal(a, b) for a, b in zip(tensors, again, strict=True))
    assert tensors[3].tolist() == np.repeat(range(4), 3).tolist()


def test_half_of_the_images_are_mirrored(folder: Path) -> None:
    """A crop and its mirror image share every pixel; which are mirrored follows the seed."""
    pictures = Pictures(open_pictures(str(folder)), views=[SeededCrop(16, scale=(0.2, 1.0))])
    seeds = np.concatenate([sample_seeds(1, number, IDS) for number in range(8)])
    ids = np.tile(IDS, 8)
    [plain], _ = pictures.batch(ids, seeds)
    [maybe], _ = Pictures(open_pictures(str(folder)), views=[_views(16)]).batch(ids, seeds)
    mirrored = torch.tensor([torch.equal(a.flip(1), b) for a, b in zip(plain, maybe, strict=True)])
    kept = torch.tensor([torch.equal(a, b) for a, b in zip(plain, maybe, strict=True)])
    assert bool((mirrored | kept).all()) and 0.3 < float(mirrored.float().mean()) < 0.7


def test_views_draw_from_seeds_of_their_own() -> None:
    """No two views of no two images share a seed."""
    seen = np.concatenate([SEEDS, *(view_seeds(SEEDS, number) for number in range(1, 8))])
    assert len(np.unique(seen)) == len(seen)


def test_an_unreadable_image_is_reported(folder: Path, tmp_path: Path) -> None:
    """It is marked bad and said why; the fingerprint is of names and sizes, not of the place."""
    flat = tmp_path / "flat"
    flat.mkdir()
    for number, path in enumerate(sorted(folder.rglob("*.jpg"))):
        (flat / f"{number:02d}.jpg").write_bytes(path.read_bytes())
    (flat / "12.jpg").write_bytes(b"no image")
    files = open_pictures(str(flat))
    _, bad = Pictures(files, views=[_views(8)]).batch(
        np.arange(13), sample_seeds(1, 0, np.arange(13))
    )
    assert files.labels is None and bad.tolist() == [False] * 12 + [True]
    assert "cannot be decoded" in Pictures(files, views=[]).explain(12)
    moved = flat.rename(tmp_path / "moved")
    assert open_pictures(str(moved)).fingerprint == files.fingerprint
    (moved / "00.jpg").unlink()
    assert open_pictures(str(moved)).fingerprint != files.fingerprint


def test_what_holds_no_images_is_refused(tmp_path: Path) -> None:
    """An empty folder, and a path that is none."""
    with pytest.raises(DataError, match="holds no images"):
        open_pictures(str(tmp_path))
    with pytest.raises(DataError, match="is no folder"):
        open_pictures(str(tmp_path / "nowhere"))


def test_shards_are_read_with_classes_and_with_captions(folder: Path, tmp_path: Path) -> None:
    """Shards of images with .cls know their classes, those with .txt are read for their images."""
    paths = sorted(folder.rglob("*.jpg"))
    for ending in ("cls", "txt"):
        members = [
            member
            for number, path in enumerate(paths)
            for member in (
                (f"{number:03d}.jpg", path.read_bytes()),
                (f"{number:03d}.{ending}", b"1"),
            )
        ]
        write_tar(tmp_path / f"{ending}.tar", members)
    classes, captions = (open_pictures(str(tmp_path / f"{e}.tar")) for e in ("cls", "txt"))
    assert classes.labels is not None and classes.labels.tolist() == [1] * 12
    assert captions.labels is None and len(captions) == 12
    [one], _ = Pictures(classes, views=[_views(8)]).batch(IDS, SEEDS)
    [other], _ = Pictures(captions, views=[_views(8)]).batch(IDS, SEEDS)
    assert torch.equal(one, other)
