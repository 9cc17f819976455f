"""Data sets that are made on the user's machine: a folder is whole, or it is built again.

``checksums.json`` in it holds the sha256 of every other file, and of what it was made from.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from ablate.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A data set that is built from what the package ships."""

    what: str
    """Its name, for messages."""
    made_from: Callable[[], str]
    """Digest of all that decides its files."""
    files: Callable[[], set[str]]
    """Every file of the folder but checksums.json, relative to it."""
    build: Callable[[Path], None]
    """Writes them into a folder that exists."""

    def prepare(self, folder: Path) -> None:
        """Make sure that `folder` holds the whole set, unharmed.

        Every file is checked against its checksum. A folder that is missing, partial, damaged or
        made by another version of the package is built again beside its place and renamed.
        Concurrent callers wait for one another.

        Raises:
            DataError: the folder holds files that are not of this set; nothing is touched.
        """
        if self._is_whole(folder):
            return
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f".{folder.name}.lock"):
            if not self._is_whole(folder):
                self._refuse_strangers(folder)
                self._replace(folder)

    def _is_whole(self, folder: Path) -> bool:
        checksums = _read_checksums(folder)
        planned = self.files()
        if checksums.get("made_from") != self.made_from():
            return False
        if _strangers(folder, planned | {"checksums.json"}):
            return False
        recorded = checksums["sha256"]
        if set(recorded) != planned:
            return False
        try:
            return all(digest_file(folder / name) == digest for name, digest in recorded.items())
        except OSError:
            return False

    def _refuse_strangers(self, folder: Path) -> None:
        if folder.exists() and not folder.is_dir():
            raise DataError(f"{folder} is a file; give a folder for the {self.what} dataset")
        ours = self.files() | {"checksums.json"} | set(_read_checksums(folder).get("sha256", ()))
        strangers = _strangers(folder, ours)
        if strangers:
            more = f" and {len(strangers) - 1} more" if len(strangers) > 1 else ""
            raise DataError(
                f"{folder} holds {strangers[0]!r}{more}, which is not of the {self.what} dataset; "
                "move it away, or prepare the dataset in another folder"
            )

    def _replace(self, folder: Path) -> None:
        """Build beside `folder`, then rename; the caller holds the lock, so leftovers are dead."""
        for leftover in folder.parent.glob(f".{folder.name}.*.tmp"):
            shutil.rmtree(leftover)
        new, old = (
            folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp") for _ in range(2)
        )
        try:
            new.mkdir()
            self.build(new)
            checksums = {
                "made_from": self.made_from(),
                "sha256": {
                    path.relative_to(new).as_posix(): digest_file(path)
                    for path in sorted(new.rglob("*"))
                    if path.is_file()
                },
            }
            write_listing(new / "checksums.json", checksums)
            if folder.exists():
                os.rename(folder, old)
            os.rename(new, folder)
        finally:
            shutil.rmtree(new, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)


def _read_checksums(folder: Path) -> dict[str, Any]:
    """checksums.json, or nothing when it is missing or unreadable."""
    try:
        checksums = json.loads((folder / "checksums.json").read_bytes())
    except (OSError, ValueError):
        return {}
    if not isinstance(checksums, dict) or not isinstance(checksums.get("sha256"), dict):
        return {}
    return checksums


def _strangers(folder: Path, files: set[str]) -> list[str]:
    """What `folder` holds beyond `files`; hidden files are nobody's business, hidden folders are.

    (A hidden folder among class folders would be a class to torchvision's ImageFolder.)
    """
    known = {parent.as_posix() for name in files for parent in Path(name).parents} | files
    found = []
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if name not in known and (path.is_dir() or not path.name.startswith(".")):
            found.append(name)
    return sorted(found)


def digest_file(path: Path) -> str:
    """sha256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_listing(path: Path, value: Any) -> None:
    """JSON as a data set's folder holds it: readable, one entry a line, UTF-8."""
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
