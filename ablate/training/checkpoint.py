"""Checkpoints: a folder each, whole or not there, found by step and verified by checksum.

::

    checkpoints/step-000500/model.safetensors      parameters and buffers
                            optimizer.safetensors  its state, by parameter name
                            state.json             counters, scaler, markers, best evaluation
                            manifest.json          size and sha256 of the three
               /quarantine/step-000500-<hex>/      what was found damaged

A checkpoint is written under a temporary name, flushed to disk and renamed; it is valid when its
manifest matches. The highest valid step wins, never a time stamp or a pointer file. There is no
pickle in it, so reading one runs no code.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch

from ablate.errors import CheckpointError, SpaceError
from ablate.records import read_json, sync_folder, write_json

if TYPE_CHECKING:
    from ablate.training.remote import Uploader

FORMAT = 2
KEEP_LAST = 2
_FILES = ("model.safetensors", "optimizer.safetensors", "state.json")
_NAME = re.compile(r"step-(\d+)")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything that a run needs to go on after `step`, detached from the running model."""

    step: int
    model: Mapping[str, torch.Tensor]
    optimizer: Mapping[str, torch.Tensor]
    state: Mapping[str, Any]


def copy_to_host(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies that later steps cannot change."""
    return {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}


def save(folder: Path, snapshot: Snapshot) -> Path:
    """Write one checkpoint into `folder` and return its path.

    Raises:
        SpaceError: too little free space; nothing that was there is touched.
    """
    final = folder / f"step-{snapshot.step:06d}"
    if final.exists():
        return final
    folder.mkdir(parents=True, exist_ok=True)
    tensors = (*snapshot.model.values(), *snapshot.optimizer.values())
    needed = 2 * sum(t.numel() * t.element_size() for t in tensors)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise SpaceError(
            f"{folder} has {_size(free)} free, and the checkpoint of step {snapshot.step} needs "
            f"{_size(needed)}. Free some space; the checkpoints that are there are kept"
        )
    temporary = folder / f".{final.name}.{secrets.token_hex(4)}.tmp"
    temporary.mkdir()
    try:
        safetensors.torch.save_file(dict(snapshot.model), temporary / "model.safetensors")
        safetensors.torch.save_file(dict(snapshot.optimizer), temporary / "optimizer.safetensors")
        write_json(temporary / "state.json", snapshot.state, durable=False)
        files = {name: _fingerprint(temporary / name, flush=True) for name in _FILES}
        manifest = {"format": FORMAT, "step": snapshot.step, "files": files}
        write_json(temporary / "manifest.json", manifest)
        os.replace(temporary, final)
        sync_folder(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final


def _size(count: int) -> str:
    return f"{count:,} bytes ({count / 2**30:.1f} GiB)"


def _fingerprint(path: Path, *, flush: bool = False) -> dict[str, Any]:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if flush:
            os.fsync(file.fileno())
        return {"sha256": digest, "size": os.fstat(file.fileno()).st_size}


def fault(path: Path) -> str | None:
    """What is wrong with a checkpoint; None when it is whole.

    Raises:
        CheckpointError: another version wrote it; it is not damaged, and not ours to put away.
    """
    try:
        manifest = read_json(path / "manifest.json")
        files = manifest["files"]
        if manifest["format"] != FORMAT:
            raise CheckpointError(
                f"{path} has format {manifest['format']}, and this version reads {FORMAT}. Go on "
                "with the version that wrote it, or move the checkpoints away to start over"
            )
        for name in _FILES:
            if not (path / name).is_file():
                return f"{name} is missing"
            if _fingerprint(path / name) != files[name]:
                return f"{name} does not match its checksum"
    except FileNotFoundError:
        return "manifest.json is missing"
    except (ValueError, KeyError, TypeError) as error:
        return f"manifest.json is damaged ({error})"
    return None


def steps(folder: Path) -> list[int]:
    """Steps that have a checkpoint, valid or not, ascending."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    return sorted(int(match[1]) for name in names if (match := _NAME.fullmatch(name)))


def path_of(folder: Path, step: int) -> Path:
    return folder / f"step-{step:06d}"


def step_of(path: Path) -> int:
    """The inverse of :func:`path_of`."""
    return int(path.name.removeprefix("step-"))


def newest(folder: Path, *, report: Callable[[str], None]) -> Path | None:
    """The valid checkpoint of the highest step; damaged ones are moved to quarantine and reported.

    Leftovers of interrupted writes are removed.
    """
    for leftover in folder.glob(".step-*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
    for step in reversed(steps(folder)):
        path = path_of(folder, step)
        problem = fault(path)
        if problem is None:
            return path
        away = folder / "quarantine" / f"{path.name}-{secrets.token_hex(4)}"
        away.parent.mkdir(exist_ok=True)
        os.replace(path, away)
        report(f"checkpoint of step {step} is damaged: {problem}; moved to {away}")
    return None


def load(path: Path) -> Snapshot:
    """Read a checkpoint that :func:`fault` finds nothing wrong with."""
    state = read_json(path / "state.json")
    return Snapshot(
        step=int(state["step"]),
        model=safetensors.torch.load_file(path / "model.safetensors"),
        optimizer=safetensors.torch.load_file(path / "optimizer.safetensors"),
        state=state,
    )


def checksums(path: Path) -> dict[str, str]:
    """sha256 of each file of a checkpoint, as its manifest has it."""
    files = read_json(path / "manifest.json")["files"]
    return {name: files[name]["sha256"] for name in _FILES}


def prune(folder: Path, *, keep: Iterable[int]) -> None:
    """Delete all checkpoints but the last two and those of the steps in `keep`."""
    there = steps(folder)
    kept = {*there[-KEEP_LAST:], *keep}
    for step in there:
        if step not in kept:
            shutil.rmtree(path_of(folder, step), ignore_errors=True)


@dataclass(frozen=True, slots=True)
class Certificate:
    """What a resumed run took over, and what is known to differ from the run that was left."""

    path: str
    step: int
    steps_total: int
    sha256: Mapping[str, str]
    """Checksum of each file that was read."""
    model_tensors: int
    optimizer_tensors: int
    state: tuple[str, ...]
    """Names of what came back beside the tensors."""
    changed: Mapping[str, tuple[Any, Any]]
    """Fields that differ (then, now), all on the list of those that cannot change the result; and
    ``ranks``, which changes the last bits, and what BatchNorm sees."""
    data_order: str
    torch: tuple[str, str]
    """Version that wrote the checkpoint, version that reads it."""

    def __str__(self) -> str:
        then, now = self.torch
        lines = [
            f"resumed at step {self.step} of {self.steps_total} from {self.path}",
            f"  restored: {self.model_tensors} model tensors, {self.optimizer_tensors} optimizer "
            f"tensors, {', '.join(self.state)}",
            f"  data order: {self.data_order}",
            "  learning rate and random numbers follow from the step",
        ]
        lines += [f"  {name}: {old!r}, now {new!r}" for name, (old, new) in self.changed.items()]
        if "ranks" in self.changed:
            lines.append("  other ranks do the same work: the run does not go on bit by bit")
        if then != now:
            lines.append(f"  torch {then}, now {now}: the numbers may differ in their last bits")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Fields of two configurations that differ, as (then, now); a missing one is None."""
    names = dict.fromkeys([*then, *now])
    return {n: (then.get(n), now.get(n)) for n in names if then.get(n) != now.get(n)}


class Writer:
    """Writes checkpoints beside the training: it waits only for a copy to the host's memory.

    At most one is being written; the next waits for it. With `uploader`, each is copied from disk
    to a second home, for which nobody waits before the end.
    """

    def __init__(self, folder: Path, uploader: Uploader | None = None) -> None:
        self.folder = folder
        self._uploader = uploader
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(self, snapshot: Snapshot, *, keep: Iterable[int]) -> None:
        """Start writing `snapshot`, whose tensors nobody changes any more."""
        self.wait()
        kept = frozenset(keep)

        def write() -> None:
            save(self.folder, snapshot)
            if self._uploader is None:
                prune(self.folder, keep=kept)
                return
            self._uploader.wake(keep=kept)
            busy = self._uploader.busy
            prune(self.folder, keep=kept if busy is None else kept | {busy})

        self._pending = self._pool.submit(write)

    def wait(self) -> None:
        """Wait until the last checkpoint is on disk; raises what went wrong with it."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Wait, and end the threads."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()
            if self._uploader is not None:
                self._uploader.close()
