"""Where the images of a training set without captions lie; imports no torch.

What class an image belongs to is known of folders of class folders and of shards with ``.cls``
files; shards with captions (``.txt``) are read for their images.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ablate.errors import DataError
from ablate.training.data import cache
from ablate.training.data.image_source import IMAGE_ENDINGS, image_folder, labelled_shards
from ablate.training.data.shard_names import expand_shards
from ablate.training.data.shards import index_shards


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureFiles:
    """Encoded images, in the order of their numbers."""

    read: Callable[[int], bytes]
    describe: Callable[[int], str]
    """Where image i lies, for messages."""
    shard_sizes: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64] | None
    """Class number of each image; None where none is known."""
    fingerprint: str
    """Of indexed shards their contents, else names and sizes: a folder is not read to be named."""

    def __len__(self) -> int:
        return int(self.shard_sizes.sum())


def open_pictures(path: str) -> PictureFiles:
    """The images of a folder (with or without class folders) or of shards.

    Raises:
        DataError: there are none, or a shard cannot be read.
    """
    if path.endswith(".tar"):
        return _open_shards(path)
    folder = Path(path)
    if not folder.is_dir():
        raise DataError(f"{path} is no folder; give a folder of images, or shards (.tar)")
    if any(entry.is_dir() for entry in folder.iterdir()):
        source = image_folder(folder)
        names = [str(fact[0]) + f" {fact[1]}" for fact in source.facts[1:]]  # type: ignore[index]
        return PictureFiles(
            read=source.read,
            describe=source.describe,
            shard_sizes=np.array([len(source)], np.int64),
            labels=source.labels,
            fingerprint=cache.key(*names),
        )
    files = sorted(entry for entry in folder.iterdir() if entry.suffix.lower() in IMAGE_ENDINGS)
    if not files:
        raise DataError(f"{folder} holds no images ({', '.join(IMAGE_ENDINGS)})")
    return PictureFiles(
        read=lambda number: files[number].read_bytes(),
        describe=lambda number: str(files[number]),
        shard_sizes=np.array([len(files)], np.int64),
        labels=None,
        fingerprint=cache.key(*(f"{file.name} {file.stat().st_size}" for file in files)),
    )


def _open_shards(pattern: str) -> PictureFiles:
    if _has_classes(expand_shards(pattern)[0]):
        source = labelled_shards(pattern)
        sizes = [f"{Path(str(fact[0])).name} {fact[1]}" for fact in source.facts]  # type: ignore[index]
        return PictureFiles(
            read=source.read,
            describe=source.describe,
            shard_sizes=np.array([len(source)], np.int64),
            labels=source.labels,
            fingerprint=cache.key(*sizes),
        )
    index = index_shards(pattern, cache=cache.cache_folder() / "shards")
    missing = [str(fault) for fault in index.faults if fault.kind == "missing_shard"]
    if missing:
        raise DataError(f"{len(missing)} shards of {pattern} are missing, the first: {missing[0]}")
    return PictureFiles(
        read=lambda number: index.read(number)[0],
        describe=index.describe,
        shard_sizes=np.array([shard.num_samples for shard in index.shards], np.int64),
        labels=None,
        fingerprint=index.fingerprint,
    )


def _has_classes(path: str) -> bool:
    """Whether the first sample of a shard has a class number."""
    try:
        with tarfile.open(path) as tar:
            first: str | None = None
            for member in tar:
                key, _, ending = member.name.rpartition("/")[2].partition(".")
                first = key if first is None else first
                if key != first:
                    return False
                if ending == "cls":
                    return True
    except (OSError, tarfile.TarError) as error:
        raise DataError(f"shard {path} cannot be read: {error}") from error
    return False
