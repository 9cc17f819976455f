"""The cache of a machine: built once by whoever comes first, whole or absent, bounded."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from ablate.training.data import cache

CONTEXT = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ABLATE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kind"


def build_slowly(notes: Path) -> None:
    """An entry in two halves with time between them; each builder notes its process."""

    def build(folder: Path) -> None:
        with open(notes, "a") as file:
            file.write(f"{os.getpid()}\n")
        (folder / "first").write_text("half")
        time.sleep(0.3)
        (folder / "second").write_text("half")

    found = cache.build_once("kind", "name", build)
    whole = sorted(path.name for path in found.iterdir()) == ["complete", "first", "second"]
    os._exit(0 if whole else 1)


def test_concurrent_builders_build_once(tmp_path: Path, folder: Path) -> None:
    """Of four processes that want an entry at once one builds it, and all see it whole."""
    notes = tmp_path / "notes"
    processes = [CONTEXT.Process(target=build_slowly, args=(notes,)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0] * 4
    assert len(notes.read_text().splitlines()) == 1
    assert [path.name for path in folder.iterdir() if path.is_dir()] == ["name"]


def test_a_killed_builder_leaves_nothing_that_is_taken_for_whole(
    tmp_path: Path, folder: Path
) -> None:
    """After kill -9 between the halves there is no entry, and the next process builds it."""
    notes = tmp_path / "notes"
    process = CONTEXT.Process(target=build_slowly, args=(notes,))
    process.start()
    deadline = time.monotonic() + 30
    while not list(folder.glob(".name.*/first")) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join(30)
    assert not (folder / "name").exists()
    again = CONTEXT.Process(target=build_slowly, args=(notes,))
    again.start()
    again.join(30)
    assert again.exitcode == 0
    assert [path.name for path in folder.iterdir() if path.is_dir()] == ["name"]
    assert len(notes.read_text().splitlines()) == 2


def test_a_builder_that_fails_leaves_nothing(folder: Path) -> None:
    """Its error comes through; the unfinished folder is gone."""

    def build(place: Path) -> None:
        (place / "first").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        cache.build_once("kind", "name", build)
    assert [path.name for path in folder.iterdir() if path.is_dir()] == []


def test_the_folder_is_bounded(folder: Path) -> None:
    """Above the bound the entry that was not used for longest goes; who has it mapped reads on."""

    def entry(name: str) -> Path:
        def build(place: Path) -> None:
            np.save(place / "numbers.npy", np.full(109, ord(name), np.int64))  # 1000 bytes

        return cache.build_once("kind", name, build, most_gib=2500 / 2**30)

    for age, name in ((30, "a"), (20, "b")):
        then = time.time() - age
        os.utime(entry(name) / "complete", (then, then))
    mapped = np.load(folder / "b" / "numbers.npy", mmap_mode="r")
    entry("a")  # used again: now b is the oldest
    entry("c")
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["a", "c"]
    assert mapped.tolist() == [ord("b")] * 109


def test_keys_separate_everything_a_content_depends_on() -> None:
    """Parts are not run together: another part, order or border is another key."""
    keys = [cache.key(*parts) for parts in (("a", 1), ("a", 2), ("a1",), (1, "a"), ("a", "1", ""))]
    assert len(set(keys)) == 5
