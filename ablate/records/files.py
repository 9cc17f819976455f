"""Files that survive: whole JSON files and logs of rows.

Whole files are written under a temporary name, flushed to disk and renamed; logs of rows are
appended line by line, and a torn last line is not read. Non-finite numbers are findings, so they
survive as the strings "NaN", "Infinity" and "-Infinity" (JSON has no other way to hold them).
"""

from __future__ import annotations

import errno
import json
import math
import os
import secrets
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from ablate.errors import RecordError

FORMAT = 1
"""Version of the folder's layout, written into trial.json and study.json."""

ROOM_S = 10.0
"""How long a file that matters waits for room on a full disk."""

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def _encode(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, Mapping):
        return {str(key): _encode(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_encode(item) for item in value]
    return value


def _decode(value: Any) -> Any:
    if isinstance(value, str):
        return _NON_FINITE.get(value, value)
    if isinstance(value, dict):
        return {key: _decode(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_decode(item) for item in value]
    return value


def dumps(value: Any, *, indent: int | None = None) -> str:
    """Strict JSON text in which non-finite numbers stand as strings."""
    return json.dumps(_encode(value), indent=indent, allow_nan=False, ensure_ascii=False)


def loads(text: str | bytes) -> Any:
    """The inverse of :func:`dumps`."""
    return _decode(json.loads(text))


def write_json(path: Path, value: Any, *, durable: bool = True) -> None:
    """Write `value` so that a reader sees the old file or the whole new one, never a part.

    `durable` also flushes to disk, and waits a little when the disk is full, both of which a
    heartbeat can do without: a checkpoint that finds no room gives back what it took.
    """
    text = dumps(value, indent=1) + "\n"
    wait_for_room(lambda: _replace(path, text, durable=durable), room_s=ROOM_S if durable else 0.0)


def wait_for_room(write: Callable[[], None], *, room_s: float) -> None:
    """Call `write`, and on a full disk again, for `room_s` at most.

    Raises:
        OSError: that of `write`; the disk stayed full, or it is another.
    """
    until = time.monotonic() + room_s
    while True:
        try:
            return write()
        except OSError as error:
            if not is_full(error) or time.monotonic() >= until:
                raise
        time.sleep(0.1)


def is_full(error: OSError) -> bool:
    """The disk, or what this user may have of it, is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def _replace(path: Path, text: str, *, durable: bool) -> None:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with _created(temporary) as file:
            file.write(text)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        sync_folder(path.parent)


def _created(path: Path) -> IO[str]:
    """A new file, whose folder is nearly always there: no operation of the disk's to ask first."""
    try:
        return open(path, "w", encoding="utf-8")
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        return open(path, "w", encoding="utf-8")


def leftovers(folder: Path) -> list[Path]:
    """What writers that were killed left half-written, in `folder` and below it."""
    return sorted(folder.rglob(".*.tmp"))


def clear_leftovers(folder: Path) -> None:
    """Remove the :func:`leftovers` of a folder in which nobody writes."""
    for path in leftovers(folder):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: Path) -> Any:
    """Read a file written by :func:`write_json`.

    Raises:
        RecordError: the file is not JSON, which no crash of ours can cause.
        FileNotFoundError: it is not there.
    """
    try:
        return loads(path.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RecordError(
            f"{path} is damaged ({error}). Move it away and launch again: "
            "the trial goes on from its last checkpoint."
        ) from error


def find_json(path: Path) -> dict[str, Any] | None:
    """As :func:`read_json`, or None when the file is not there."""
    try:
        content: dict[str, Any] = read_json(path)
    except FileNotFoundError:
        return None
    return content


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a log; a torn last line (a crash while writing) is left out.

    A missing file has no rows.
    """
    rows, _ = read_rows_from(path, 0)
    return rows


def read_rows_from(path: Path, offset: int) -> tuple[list[dict[str, Any]], int]:
    """Rows that were appended after byte `offset`, and the offset to go on from."""
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            data = file.read()
    except FileNotFoundError:
        return [], offset
    whole = data.rfind(b"\n") + 1
    rows = []
    for line in data[:whole].splitlines():
        try:
            row = loads(line)
        except (json.JSONDecodeError, UnicodeDecodeError):
            continue  # torn by a crash, then appended to: the row is lost, the log is not
        if isinstance(row, dict):
            rows.append(row)
    return rows, offset + whole


def free_gib(folder: Path) -> float:
    """GiB of disk that are free where `folder` is, or will be."""
    existing = next(path for path in [folder, *folder.resolve().parents] if path.exists())
    return shutil.disk_usage(existing).free / 2**30
