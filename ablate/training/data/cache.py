"""Files that are dear to compute and the same for every trial of a machine: built once, mapped.

A cache folder holds a file for each key. Builders on one machine take a lock, write beside the
final name and rename, so a reader sees nothing or the whole; when the folder outgrows its bound,
what was not used for longest goes first.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

MAX_FOLDER_GIB = 64.0
"""Bound of the cache folder; a single entry's bound is its owner's business."""


def cache_folder() -> Path:
    """ABLATE_CACHE, else ablate's folder among the user's caches."""
    given = os.environ.get("ABLATE_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ablate"


def key(*parts: object) -> str:
    """A file name from everything that the content depends on."""
    return hashlib.sha256("\x1f".join(map(str, parts)).encode()).hexdigest()[:24]


def facts_of(path: Path) -> tuple[object, ...]:
    """What changes with a file's content: its size, and the times of its content and its inode.

    The last is set by the system alone: archives and copying tools give a file any content time.
    """
    found = path.stat()
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


def build_once(
    kind: str, name: str, build: Callable[[Path], None], *, most_gib: float = MAX_FOLDER_GIB
) -> Path:
    """The folder ``kind/name`` of the cache; `build` fills it if it is not there.

    `most_gib` bounds the folder of this kind.
    """
    parent = cache_folder() / kind
    final = parent / name
    if (final / "complete").exists():
        os.utime(final / "complete")
        return final
    parent.mkdir(parents=True, exist_ok=True)
    with FileLock(parent / f"{name}.lock"):
        if (final / "complete").exists():
            return final
        for left in parent.glob(f".{name}.*.tmp"):  # by a builder that was killed
            shutil.rmtree(left, ignore_errors=True)
        temporary = parent / f".{name}.{secrets.token_hex(4)}.tmp"
        temporary.mkdir()
        try:
            build(temporary)
            (temporary / "complete").touch()
            shutil.rmtree(final, ignore_errors=True)
            os.replace(temporary, final)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        _evict(parent, keep=final, most_gib=most_gib)
    return final


def _evict(parent: Path, *, keep: Path, most_gib: float) -> None:
    """Delete entries that were not used for longest until the folder is within its bound.

    A process that has an entry mapped keeps its content until it ends.
    """
    entries = [path.parent for path in parent.glob("*/complete")]
    sizes = {entry: sum(f.stat().st_size for f in entry.iterdir()) for entry in entries}
    total = sum(sizes.values())
    for entry in sorted(entries, key=lambda e: (e / "complete").stat().st_mtime):
        if total <= most_gib * 2**30:
            return
        if entry != keep:
            total -= sizes[entry]
            shutil.rmtree(entry, ignore_errors=True)
