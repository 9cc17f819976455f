"""A second home for checkpoints in an object store, so that they outlive the machines.

::

    s3://bucket/prefix/<study>/<trial>/step-000500/model.safetensors
                                                   optimizer.safetensors
                                                   state.json
                                                   manifest.json     put last
                                       quarantine/step-000500-<hex>/...

A checkpoint is written on disk first (``checkpoint``) and copied by a thread, newest first, so
training never waits for the network; what could not be copied while the store was away is copied
with the next one. The promise is the same as on disk: a step without its manifest is not there,
the highest whole step wins, what is damaged is put aside and told.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from ablate.errors import CheckpointError
from ablate.records.files import sync_folder
from ablate.records.masking import masked_url
from ablate.records.stores import open_store
from ablate.training import checkpoint
from ablate.training.checkpoint_clock import KEEP_LAST

_FILE = re.compile(r"step-(\d+)/[^/]+")
_MANIFEST = "manifest.json"
_PAUSE_S = 5.0
"""Between two tries while the store cannot be reached."""
_CLOSE_S = 60.0
"""Most time that the end of an attempt waits for the last copy."""

log = logging.getLogger("ablate")


class Remote:
    """The checkpoints of one trial in an object store. Every method may raise what the store does.

    Raises:
        CheckpointError: the package that speaks to this store is not installed.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._store, self._root = open_store(url)

    def steps(self) -> list[int]:
        """Steps that are whole here, ascending."""
        return [step for step, files in sorted(self._files().items()) if _whole(files)]

    def put(self, path: Path) -> None:
        """Copy the checkpoint at `path` here; it counts once its manifest has arrived."""
        names = sorted(os.listdir(path), key=lambda name: (name == _MANIFEST, name))
        for name in names:
            self._store.put_file(str(path / name), f"{self._root}/{path.name}/{name}")

    def get(self, step: int, folder: Path) -> str | None:
        """Bring the checkpoint of `step` into `folder`; what is wrong with it, if anything is.

        A damaged one does not appear in the folder.
        """
        final = checkpoint.path_of(folder, step)
        temporary = folder / f".{final.name}.{secrets.token_hex(4)}.tmp"
        temporary.mkdir(parents=True)
        try:
            for file in self._files()[step]:
                self._store.get_file(file, str(temporary / file.rpartition("/")[2]))
            problem = checkpoint.fault(temporary)
            if problem is None and not final.exists():
                os.replace(temporary, final)
                sync_folder(folder)
            return problem
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def put_aside(self, step: int) -> str:
        """Move a damaged checkpoint out of the way, its manifest first; where to."""
        name = checkpoint.path_of(Path(), step).name
        away = f"{self._root}/quarantine/{name}-{secrets.token_hex(4)}"
        for file in self._files()[step]:
            self._store.mv(file, f"{away}/{file.rpartition('/')[2]}")
        return away

    def prune(self, *, keep: Iterable[int]) -> None:
        """Delete all but the last two and those of `keep`, and what is left of broken copies."""
        found = self._files()
        whole = [step for step in sorted(found) if _whole(found[step])]
        kept = {*whole[-KEEP_LAST:], *keep}.intersection(whole)
        for step in found:
            if step not in kept and whole and step < whole[-1]:
                for file in found[step]:
                    self._store.rm_file(file)

    def newest(
        self, folder: Path, *, local: Path | None, report: Callable[[str], None]
    ) -> Path | None:
        """The newest whole checkpoint of both homes, in `folder`; `local` is the newest there.

        Raises:
            CheckpointError: the store cannot be asked, and there is none on disk: to begin again
                at step 0 might throw a long run away.
        """
        above = checkpoint.step_of(local) if local is not None else 0
        try:
            for step in reversed(self.steps()):
                if step <= above:
                    break
                problem = self.get(step, folder)
                if problem is None:
                    report(f"checkpoint of step {step} came from {self.url}")
                    return checkpoint.path_of(folder, step)
                away = self.put_aside(step)
                report(f"checkpoint of step {step} at {self.url} is damaged: {problem}; -> {away}")
        except Exception as error:  # every store has exceptions of its own
            reason = f"{type(error).__name__}: {masked_url(str(error))}"
            if local is None:
                raise CheckpointError(
                    f"{self.url} cannot be asked for checkpoints ({reason}), and there is none on "
                    "this disk. See that the store answers (ablate doctor --cluster STUDY.yaml), "
                    "or take `checkpoints` out of the study file to begin again"
                ) from error
            report(f"{self.url} cannot be asked ({reason}); going on from {local}")
        return local

    def _files(self) -> dict[int, list[str]]:
        """Step -> its files, manifest first: deleted in this order, it stops counting at once."""
        found: dict[int, list[str]] = {}
        for file in map(str, self._store.find(self._root)):
            if match := _FILE.fullmatch(file[len(self._root) + 1 :]):
                found.setdefault(int(match[1]), []).append(file)
        return {step: sorted(files, key=_manifest_first) for step, files in found.items()}


def _whole(files: Sequence[str]) -> bool:
    return files[0].endswith("/" + _MANIFEST)


def _manifest_first(file: str) -> tuple[bool, str]:
    return not file.endswith("/" + _MANIFEST), file


class Uploader:
    """Copies a folder's checkpoints into a store from a thread of its own."""

    def __init__(self, folder: Path, remote: Remote, *, pause_s: float = _PAUSE_S) -> None:
        self.busy: int | None = None
        """Step that is being copied: not to be deleted now."""
        self.trouble: str | None = None
        """Why the last try failed."""
        self._folder = folder
        self._remote = remote
        self._pause_s = pause_s
        self._changed = threading.Condition()
        self._keep: frozenset[int] = frozenset()
        self._news = False
        self._deadline: float | None = None
        self._thread = threading.Thread(target=self._run, name="upload", daemon=True)
        self._thread.start()

    def wake(self, *, keep: Iterable[int]) -> None:
        """There is a new checkpoint; those of `keep` stay for good. Returns at once."""
        with self._changed:
            self._keep, self._news = frozenset(keep), True
            self._changed.notify()

    def close(self, *, timeout_s: float = _CLOSE_S) -> bool:
        """Copy what is left and end; False when time ran out, and the log says so."""
        with self._changed:
            self._deadline = time.monotonic() + timeout_s
            self._changed.notify()
        self._thread.join(timeout_s)
        if self._thread.is_alive() or self.trouble:
            log.warning(
                "not all checkpoints are at %s (%s); they are on disk in %s",
                self._remote.url,
                self.trouble or f"it took longer than {timeout_s:g} s",
                self._folder,
            )
            return False
        return True

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._news or self._deadline is not None)
                self._news, keep = False, self._keep
                closing = self._deadline is not None
            try:
                self._copy(keep)
                self.trouble = None
            except Exception as error:  # whatever it is, the training goes on without the store
                reason = f"{type(error).__name__}: {masked_url(str(error))}"
                if self.trouble is None:
                    log.warning("%s: %s", self._remote.url, reason)
                self.trouble = reason
            finally:
                self.busy = None
            if closing and not (self.trouble and time.monotonic() < (self._deadline or 0.0)):
                return
            if self.trouble:
                with self._changed:
                    self._news = True
                    if closing:
                        self._changed.wait(min(self._pause_s, 1.0))
                    else:
                        self._changed.wait_for(lambda: self._deadline is not None, self._pause_s)

    def _copy(self, keep: frozenset[int]) -> None:
        there = set(self._remote.steps())
        local = checkpoint.steps(self._folder)
        wanted = {*local[-KEEP_LAST:], *keep}
        for step in sorted(wanted.intersection(local) - there, reverse=True):
            self.busy = step
            path = checkpoint.path_of(self._folder, step)
            try:
                self._remote.put(path)
            except FileNotFoundError:  # deleted on disk before its turn came
                if path.exists():
                    raise
        self._remote.prune(keep=keep)
