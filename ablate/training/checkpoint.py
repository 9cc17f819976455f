"""Checkpoints: a folder each, whole or not there, found by step and verified by checksum.

::

    checkpoints/step-000500/model.safetensors      parameters and buffers, as they are judged
                            optimizer.safetensors  its state, by parameter name
                            state.json             counters, scaler, markers, best evaluation
                            raw.safetensors        only beside an average of the weights: those
                                                   that training goes on with
                            learner-<rank>.safetensors   only where a recipe holds more: its queue
                            manifest.json          size and sha256 of each
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
from typing import Any, Protocol

import safetensors.torch
import torch

from ablate.errors import CheckpointError, SpaceError
from ablate.records.files import read_json, sync_folder, write_json
from ablate.training.checkpoint_clock import KEEP_LAST

FORMAT = 2
_FILES = ("model.safetensors", "optimizer.safetensors", "state.json")
_RAW = "raw.safetensors"
_NAME = re.compile(r"step-(\d+)")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything that a run needs to go on after `step`, detached from the running model."""

    step: int
    model: Mapping[str, torch.Tensor]
    optimizer: Mapping[str, torch.Tensor]
    state: Mapping[str, Any]
    learners: tuple[bytes, ...] = ()
    """What each rank's learner holds beside the model, as safetensors; empty where no rank does."""
    averaged: Mapping[str, torch.Tensor] | None = None
    """The model with an average of its weights, where there is one."""

    @property
    def judged(self) -> Mapping[str, torch.Tensor]:
        """The model as it is evaluated and handed out."""
        return self.model if self.averaged is None else self.averaged


def learner_file(rank: int) -> str:
    """Name of the file with what the learner of `rank` holds."""
    return f"learner-{rank}.safetensors"


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
    averaged = snapshot.averaged or {}
    tensors = (*snapshot.model.values(), *averaged.values(), *snapshot.optimizer.values())
    needed = 2 * sum(t.numel() * t.element_size() for t in tensors)
    needed += 2 * sum(map(len, snapshot.learners))
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise SpaceError(
            f"{folder} has {_size(free)} free, and the checkpoint of step {snapshot.step} needs "
            f"{_size(needed)}. Free some space; the checkpoints that are there are kept"
        )
    temporary = folder / f".{final.name}.{secrets.token_hex(4)}.tmp"
    temporary.mkdir()
    try:
        safetensors.torch.save_file(dict(snapshot.judged), temporary / "model.safetensors")
        safetensors.torch.save_file(dict(snapshot.optimizer), temporary / "optimizer.safetensors")
        write_json(temporary / "state.json", snapshot.state, durable=False)
        own = [learner_file(rank) for rank in range(len(snapshot.learners))]
        for name, content in zip(own, snapshot.learners, strict=True):
            (temporary / name).write_bytes(content)
        if snapshot.averaged is not None:
            safetensors.torch.save_file(dict(snapshot.model), temporary / _RAW)
            own.append(_RAW)
        files = {name: _fingerprint(temporary / name, flush=True) for name in (*_FILES, *own)}
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
        for name in dict.fromkeys((*_FILES, *files)):
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
    there = checksums(path)
    own = [name for name in there if name not in (*_FILES, _RAW)]
    judged = safetensors.torch.load_file(path / "model.safetensors")
    raw = safetensors.torch.load_file(path / _RAW) if _RAW in there else None
    return Snapshot(
        step=int(state["step"]),
        model=judged if raw is None else raw,
        averaged=None if raw is None else judged,
        optimizer=safetensors.torch.load_file(path / "optimizer.safetensors"),
        state=state,
        learners=tuple((path / learner_file(rank)).read_bytes() for rank in range(len(own))),
    )


def checksums(path: Path) -> dict[str, str]:
    """sha256 of each file of a checkpoint, as its manifest has it."""
    files = read_json(path / "manifest.json")["files"]
    return {name: file["sha256"] for name, file in files.items()}


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
    versions: Mapping[str, tuple[str | None, str | None]]
    """Of what wrote the checkpoint and of what reads it, where they differ: packages, ablate's own
    files, the make of the processor."""

    def __str__(self) -> str:
        lines = [
            f"resumed at step {self.step} of {self.steps_total} from {self.path}",
            f"  restored: {self.model_tensors} model tensors, {self.optimizer_tensors} optimizer "
            f"tensors, {', '.join(self.state)}",
            "  data order, learning rate and random numbers follow from the step",
        ]
        lines += [f"  {name}: {old!r}, now {new!r}" for name, (old, new) in self.changed.items()]
        if "ranks" in self.changed:
            lines.append("  other ranks do the same work: the run does not go on bit by bit")
        told = "; ".join(f"{name} {then}, now {now}" for name, (then, now) in self.versions.items())
        if told:
            lines.append(f"  {told}: the numbers may differ in their last bits, or more")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Fields of two configurations that differ, as (then, now); a missing one is None."""
    names = dict.fromkeys([*then, *now])
    return {n: (then.get(n), now.get(n)) for n in names if then.get(n) != now.get(n)}


class Copies(Protocol):
    """A second home of checkpoints, filled beside the training."""

    busy: int | None
    """Step of the checkpoint that is being copied, which must stay on disk."""

    def wake(self, *, keep: Iterable[int]) -> None:
        """Copy what is new, and delete there what is neither new nor in `keep`."""
        ...

    def close(self) -> object:
        """Wait for the last copy."""
        ...


class Writer:
    """Writes checkpoints beside the training: it waits only for a copy to the host's memory.

    At most one is being written; the next waits for it. With `copies`, each is copied from disk
    to a second home, for which nobody waits before the end.
    """

    def __init__(self, folder: Path, copies: Copies | None = None) -> None:
        self.folder = folder
        self._copies = copies
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(self, snapshot: Snapshot, *, keep: Iterable[int]) -> None:
        """Start writing `snapshot`, whose tensors nobody changes any more."""
        self.wait()
        kept = frozenset(keep)

        def write() -> None:
            save(self.folder, snapshot)
            if self._copies is None:
                prune(self.folder, keep=kept)
                return
            self._copies.wake(keep=kept)
            busy = self._copies.busy
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
            if self._copies is not None:
                self._copies.close()
