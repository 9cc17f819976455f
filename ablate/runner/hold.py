"""Who works on a study folder: one controller, its sign of life, and how it is asked to stop.

The lock file is the quick way to be alone, where every host of the folder sees it. On some shared
disks a lock is seen by one host alone, or cannot be had. So a holder also writes a beat with a name
of its own, and looks whether somebody else's stands there.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from ablate.errors import RecordError
from ablate.records.files import find_json, is_full, write_json
from ablate.records.folder import StudyRecord

BEAT_S = 5.0
"""How often a holder says that it lives."""
_STALE_S = 30.0
"""A beat from another host whose time is older than this is looked at twice, as clocks differ."""
_LONG_DEAD_S = 3600.0
"""One that is older than this is not waited for: no two clocks differ so much."""

_BEAT = "controller.beat"
_held: dict[Path, _Hold] = {}
"""The folders that this process holds."""


class _Hold:
    """A folder that is held, with the thread that says so."""

    def __init__(self, record: StudyRecord, *, beat_s: float) -> None:
        self.beat_s = beat_s
        self.file = record.folder / _BEAT
        self.name = secrets.token_hex(8)
        self.taken_by: Mapping[str, Any] | None = None
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="beat", daemon=True)

    def begin(self) -> None:
        self.write(ended=False)
        self._thread.start()

    def end(self) -> None:
        self._ending.set()
        self._thread.join(timeout=self.beat_s)  # a disk that hangs must not hold the end up
        if self.taken_by is None:
            self.write(ended=True)

    def write(self, *, ended: bool) -> None:
        beat = {**_signature(), "name": self.name, "time": time.time(), "every_s": self.beat_s}
        beat["ended"] = ended
        with contextlib.suppress(OSError):  # a disk that is full or away; the next beat tells
            write_json(self.file, beat, durable=False)

    def look(self) -> None:
        """See whether another launch has taken the folder."""
        found = _read_beat(self.file)
        if found is not None and found["name"] != self.name:
            self.taken_by = found

    def _beat(self) -> None:
        while not self._ending.wait(self.beat_s):
            self.look()
            if self.taken_by is not None:
                return
            self.write(ended=False)


@contextmanager
def controlling(record: StudyRecord, *, beat_s: float = BEAT_S) -> Iterator[None]:
    """Hold the study folder: one controller at a time. What earlier stops asked is forgotten.

    `beat_s`: how often to say so.

    Raises:
        RecordError: another controller holds it.
    """
    record.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    lock = FileLock(record.folder / "controller.lock", fallback_to_soft=False)
    locked = _acquire(record, lock)
    try:
        _wait_for_silence(record)
        for name in ("stop", "stop-now"):
            (record.folder / name).unlink(missing_ok=True)
        hold = _Hold(record, beat_s=beat_s)
        hold.begin()
        try:
            if not locked:
                time.sleep(2 * beat_s)  # of two that come at once the later one stays
                hold.look()
            _held[record.folder] = hold
            check_hold(record)
            yield
        finally:
            _held.pop(record.folder, None)
            hold.end()
    finally:
        lock.release()


def check_hold(record: StudyRecord) -> None:
    """That this process still holds the folder, where it does.

    Raises:
        RecordError: another launch has taken it.
    """
    hold = _held.get(record.folder)
    if hold is not None and hold.taken_by is not None:
        raise RecordError(_busy(record, hold.taken_by))


def _acquire(record: StudyRecord, lock: FileLock) -> bool:
    """Take the lock; False where the disk has no locks."""
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RecordError(_busy(record, _read_beat(record.folder / _BEAT))) from None
    except (NotImplementedError, OSError):
        return False
    return True


def _wait_for_silence(record: StudyRecord) -> None:
    """Where another host's launch was not seen to end, wait for a sign of its life.

    Raises:
        RecordError: there is one.
    """
    before = _read_beat(record.folder / _BEAT)
    if before is None or before["ended"] or before["host"] == socket.gethostname():
        return  # on this host the lock has told
    if abs(time.time() - before["time"]) > _LONG_DEAD_S:
        return
    if _moves(record.folder / _BEAT, before):
        raise RecordError(_busy(record, before))


def _moves(file: Path, before: Mapping[str, Any]) -> bool:
    """Whether somebody writes this beat: no two clocks are compared."""
    until = time.monotonic() + 2 * float(before["every_s"]) + 1.0
    while time.monotonic() < until:
        found = _read_beat(file)
        if found is not None and found["time"] != before["time"]:
            return not found["ended"]
        time.sleep(0.2)
    return False


def _busy(record: StudyRecord, beat: Mapping[str, Any] | None) -> str:
    holder = f" (process {beat['pid']} on {beat['host']})" if beat is not None else ""
    return (
        f"{record.folder} is being worked on by another launch{holder}. "
        f"Watch it with `ablate status {record.folder}`, end it with "
        f"`ablate stop {record.folder}`."
    )


def _read_beat(file: Path) -> dict[str, Any] | None:
    try:
        return find_json(file)
    except (OSError, RecordError):
        return None


def _signature() -> dict[str, Any]:
    return {"pid": os.getpid(), "host": socket.gethostname()}


def request_stop(record: StudyRecord, *, now: bool) -> None:
    """Ask the controller of this study, wherever it runs, to stop."""
    (record.folder / ("stop-now" if now else "stop")).touch()


def stop_asked(record: StudyRecord) -> int:
    """What :func:`request_stop` left: 2 at once, 1 with checkpoints, 0 nothing."""
    # A list is asked of the server anew, where a file's absence is remembered for a minute (NFS).
    try:
        names = os.listdir(record.folder)
    except OSError:  # the disk is away; it is asked again in the next turn
        return 0
    if "stop-now" in names:
        return 2
    return 1 if "stop" in names else 0


def write_controller(
    record: StudyRecord, *, state: str, active: Mapping[str, int], notes: Sequence[str]
) -> None:
    """Say what the controller does, unless the disk is full; `read_controller` reads it."""
    note = {**_signature(), "state": state, "active": dict(active), "notes": list(notes)}
    note["time"] = time.time()
    try:
        record.write(record.folder / "controller.json", note, durable=False)
    except OSError as error:
        if not is_full(error):
            raise


def read_controller(record: StudyRecord) -> dict[str, Any] | None:
    """What the living controller does, or None when no controller is at work here."""
    beat = _read_beat(record.folder / _BEAT)
    if beat is None or beat["ended"]:
        return None
    if beat["host"] == socket.gethostname():
        alive = psutil.pid_exists(beat["pid"])
    else:
        age_s = abs(time.time() - beat["time"])
        alive = age_s < _STALE_S or (age_s < _LONG_DEAD_S and _moves(record.folder / _BEAT, beat))
    if not alive:
        return None
    note = find_json(record.folder / "controller.json")
    if note is None or note["state"] == "absent" or note["pid"] != beat["pid"]:
        note = {"state": "starting", "active": {}, "notes": []}
    return {**note, "pid": beat["pid"], "host": beat["host"], "time": beat["time"]}
