"""A disk that is full."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from drills import Stage, at_step, study_text

from ablate.runner.breaker import BreakerRules

pytestmark = pytest.mark.slow
TEXT = study_text(workers=1)


# ------------------------------------------------------------------- full


@contextlib.contextmanager
def small_disk(folder: Path, *, mib: int) -> Iterator[Path]:
    """A file system of its own, of so many MiB."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", str(folder)]
    tried = subprocess.run(mount, capture_output=True, check=False)
    if tried.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {tried.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path, *, leave: int) -> None:
    """Leave so many bytes free, while others write there."""
    end = time.monotonic() + 10
    with open(disk / "filler", "wb") as file:
        while True:
            size = max(shutil.disk_usage(disk).free - leave, 1)
            try:
                return os.posix_fallocate(file.fileno(), 0, size)
            except OSError as error:  # some of it was taken in this moment
                if error.errno != errno.ENOSPC or time.monotonic() > end:
                    raise


@pytest.mark.parametrize("step", [0, *(pytest.param(n, marks=pytest.mark.drill) for n in (2, 5))])
def test_a_full_disk_is_waited_for(stage: Stage, tmp_path: Path, step: int) -> None:
    """No room for a checkpoint, from the trial's start or some step on: no attempt is counted, the
    study says so and goes on when there is room again."""
    drill_full_disk(stage, tmp_path, step)


def drill_full_disk(stage: Stage, folder: Path, step: int) -> None:
    text = TEXT + "budget: {attempts: 1}\n"
    whole = stage.undisturbed(text)
    with small_disk(folder / "disk", mib=700) as disk:
        stage.status = None
        seen: list[str] = []

        def free_when_told() -> int:
            notes = (stage.status.notes if stage.status else ()) if not seen else ()
            seen.extend(note for note in notes if "the disk is full" in note)
            if seen:
                (disk / "filler").unlink(missing_ok=True)
            return 0

        run = stage.run(
            text,
            at_step(step, lambda: fill(disk, leave=1_000_000)),
            folder=disk / "drill",
            stop_level=free_when_told,
            breaker_rules=BreakerRules(space_pause_s=0.5),
        )
        stage.check(run, same_as=whole)
        kinds = [kind for trial in run.trials for kind in run.kinds(trial.trial_id)]
        logs = [path.read_text() for path in disk.rglob("log-0.txt")]
    assert seen and kinds.count("ended") == 2 and set(kinds) == {"ended", "no_space"}
    # Later than its start it may be the next trial that meets the full disk.
    assert step or any("the checkpoint of step" in log for log in logs)


@pytest.mark.drill
def test_a_disk_without_a_byte_left_is_waited_for(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where not even the controller can write, it keeps what it knows, says so, and writes it when
    there is room: nothing ends and nothing is lost."""
    monkeypatch.setattr("ablate.records.files.ROOM_S", 0.5)
    whole = stage.undisturbed(TEXT)
    with small_disk(tmp_path / "disk", mib=700) as disk:
        stage.status = None
        seen: list[str] = []

        def free_when_told() -> int:
            notes = (stage.status.notes if stage.status else ()) if not seen else ()
            seen.extend(note for note in notes if "is full" in note or "is kept" in note)
            if seen:
                (disk / "filler").unlink(missing_ok=True)
            return 0

        run = stage.run(
            TEXT,
            at_step(3, lambda: fill(disk, leave=0)),
            folder=disk / "drill",
            stop_level=free_when_told,
            breaker_rules=BreakerRules(space_pause_s=0.5),
        )
        stage.check(run, same_as=whole)
    assert seen
