"""Writing WebDataset shards: tar files whose bytes depend on the samples alone."""

from __future__ import annotations

import io
import os
import secrets
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Sample:
    """One pair to be written into a shard."""

    key: str
    image: bytes
    caption: str
    image_type: str = "jpg"


def write_shard(path: Path, samples: Iterable[Sample]) -> int:
    """Write one shard by rename and return the number of samples in it.

    The same samples give the same bytes: no times, owners or modes of this machine are stored.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    count = 0
    try:
        with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
            for sample in samples:
                _add_member(tar, f"{sample.key}.{sample.image_type}", sample.image)
                _add_member(tar, f"{sample.key}.txt", sample.caption.encode("utf-8"))
                count += 1
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return count


def _add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)  # mtime 0, uid 0, gid 0, mode 0644, no owner names
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))
