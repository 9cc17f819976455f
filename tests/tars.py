"""Tar files for the tests, and what open_clip_train reads from them."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path

Member = tuple[str, bytes]


def write_tar(path: Path, members: Iterable[Member], *, format: int = tarfile.USTAR_FORMAT) -> Path:
    """An archive of plain files; a name that ends in / is a folder."""
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name.rstrip("/"))
            if name.endswith("/"):
                info.type = tarfile.DIRTYPE
            else:
                info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def pairs(count: int, *, start: int = 0) -> list[Member]:
    """Members of `count` samples, with a json file each as img2dataset writes them."""
    members = []
    for number in range(start, start + count):
        key = f"{number:09d}"
        members += [
            (f"{key}.jpg", f"image {number} ".encode() * 50),
            (f"{key}.json", json.dumps({"key": key}).encode()),
            (f"{key}.txt", f"caption {number} ä".encode()),
        ]
    return members


def peer_samples(path: Path) -> list[tuple[str, bytes, str]]:
    """(key, image, caption) of each sample that open_clip_train 3.3.0 takes from one shard."""
    from open_clip_train.data import filter_no_caption_or_no_image, group_by_keys_nothrow
    from webdataset.tariterators import tar_file_expander

    with open(path, "rb") as file:
        members = tar_file_expander([{"url": str(path), "stream": file}])
        samples = list(filter(filter_no_caption_or_no_image, group_by_keys_nothrow(members)))
    return [
        (
            sample["__key__"],
            next(sample[kind] for kind in ("jpg", "png", "jpeg", "webp") if kind in sample),
            sample["txt"].decode("utf-8"),
        )
        for sample in samples
    ]
