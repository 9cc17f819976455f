"""Records of trials beside their checkpoints in the object store: a launch on another disk goes on.

::

    {checkpoints}/{study}/{trial}/step-000500/...           by the trial's own worker
    {checkpoints}/{study}/{trial}/records/trial.json        by the launch: all of the trial's folder
                                          attempts/1/...    but its checkpoints; outcome.json last
                                          asked.json        when it was first asked for

The folder on disk stays the truth and the only place that is read while a study runs. An outage of
the store holds nothing up. A disk that is lost costs the rows of running trials since their last
copy, up to :data:`EVERY_S`; `ablate verify` names the gap.
"""

from __future__ import annotations

import os
import secrets
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ablate.records.files import read_json
from ablate.records.folder import StudyRecord
from ablate.records.masking import masked_url, reason_of
from ablate.records.stores import open_store
from ablate.study import Study
from ablate.trial.identity import Trial

EVERY_S = 60.0
"""Between two copies of the records of trials that run."""
_PAUSE_S = 10.0
_OUTCOME, _ASKED = "outcome.json", "asked.json"


class Archive:
    """Copies records of a study's trials into its object store, from a thread of its own.

    Raises:
        CheckpointError: the package that speaks to the store is not installed.
    """

    def __init__(self, study: Study, record: StudyRecord, *, every_s: float = EVERY_S) -> None:
        assert study.checkpoints is not None
        self.trouble: str | None = None
        """Why the store is behind, in a line; it is tried again."""
        self._url = f"{study.checkpoints}/{study.name}"
        self._store, self._root = open_store(self._url)
        self._record = record
        self._every_s = every_s
        self._changed = threading.Condition()
        self._active: frozenset[str] = frozenset()
        self._due: set[str] = set()
        self._sent: dict[Path, tuple[int, int]] = {}
        """Size and time of each file as it was when it was copied."""
        self._looked = 0.0
        self._deadline: float | None = None
        self._thread = threading.Thread(target=self._run, name="archive", daemon=True)

    def bring(self) -> int:
        """Bring the records of trials that have none on this disk; how many.

        May raise whatever the store does.
        """
        known = self._record.trial_ids()
        count = 0
        try:
            places = self._store.ls(self._root, detail=False)
        except FileNotFoundError:  # nothing was ever copied
            return 0
        for place in map(str, places):
            trial_id = place.rstrip("/").rpartition("/")[2]
            if trial_id not in known and self._store.exists(f"{place}/records/{_ASKED}"):
                self._bring(f"{place}/records", self._record.record(trial_id).folder)
                count += 1
        return count

    def start(self) -> None:
        """Begin to copy; what is on this disk and not there comes first."""
        self._due = set(self._record.trial_ids())
        self._thread.start()

    def update(self, trials: Sequence[Trial], active: Sequence[str]) -> None:
        """Tell which trials are being attempted; returns at once."""
        with self._changed:
            running = frozenset(active)
            ended, self._active = self._active - running, running
            if ended:
                self._due |= ended
                self._changed.notify()

    def close(self, *, timeout_s: float) -> bool:
        """Copy what is left; False when time ran out."""
        with self._changed:
            self._due |= self._active
            self._deadline = time.monotonic() + timeout_s
            self._changed.notify()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self.trouble = self.trouble or f"{masked_url(self._url)} is slow"
        return self.trouble is None

    # ------------------------------------------------------------------ the thread

    def _run(self) -> None:
        pause_s = 0.0
        while True:
            with self._changed:
                if pause_s:
                    self._changed.wait_for(lambda: self._deadline is not None, pause_s)
                self._changed.wait_for(
                    lambda: self._due or self._deadline is not None, self._every_s
                )
                closing = self._deadline is not None
                if time.monotonic() - self._looked > self._every_s:
                    self._due |= self._active
                    self._looked = time.monotonic()
                due, self._due = sorted(self._due), set()
            try:
                while due:
                    self._send(due[-1])
                    due.pop()
                self.trouble, pause_s = None, 0.0
            except Exception as error:  # every store has exceptions of its own
                self.trouble = f"{masked_url(self._url)} lacks records: {reason_of(error)}"
                pause_s = _PAUSE_S
                with self._changed:
                    self._due |= set(due)
            if closing and (self.trouble is None or time.monotonic() > (self._deadline or 0.0)):
                return
            if closing:
                time.sleep(1.0)

    def _send(self, trial_id: str) -> None:
        """Copy what has changed of a trial; its outcome counts once all else is there."""
        folder = self._record.record(trial_id).folder
        place = f"{self._root}/{trial_id}/records"
        for path in _files(folder):
            state = path.stat()
            seen = (state.st_size, state.st_mtime_ns)
            if self._sent.get(path) != seen:
                self._store.put_file(str(path), f"{place}/{path.relative_to(folder)}")
                self._sent[path] = seen
            if path.name == "trial.json":
                asked = f'{{"ns": {state.st_mtime_ns}}}'.encode()
                self._store.pipe_file(f"{place}/{_ASKED}", asked)

    def _bring(self, place: str, folder: Path) -> None:
        """Bring one trial; it appears as a whole."""
        folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        part = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
        try:
            for file in map(str, self._store.find(place)):
                target = part / file[len(place) + 1 :]
                target.parent.mkdir(parents=True, exist_ok=True)
                self._store.get_file(file, str(target))
            asked: dict[str, Any] = read_json(part / _ASKED)
            (part / _ASKED).unlink()
            os.utime(part / "trial.json", ns=(asked["ns"], asked["ns"]))
            os.replace(part, folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def _files(folder: Path) -> Iterator[Path]:
    """A trial's files but its checkpoints and half-written ones, the outcome last."""
    outcome = folder / _OUTCOME
    for above, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if Path(above) != folder or name != "checkpoints"]
        for name in names:
            path = Path(above) / name
            if not name.startswith(".") and path != outcome:
                yield path
    if outcome.exists():
        yield outcome
