"""What a run saves, and what must agree before it goes on."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from ablate.errors import CheckpointError
from ablate.records.provenance import code_of_here
from ablate.training import checkpoint
from ablate.training.arithmetic import name_device
from ablate.training.checkpoint_clock import CheckpointClock
from ablate.training.optim import describe, load_named_state, named_state, read_groups
from ablate.training.ranks import Gang, broadcast, gather
from ablate.training.remote import Remote, Uploader
from ablate.training.step import Step
from ablate.training.task import Task
from ablate.trial.session import Session

log = logging.getLogger(__name__)

_RESTORED = {
    "progress": "counters and the best evaluation",
    "scaler": "gradient scaler",
    "optimizer_numbers": "the optimizer's plain numbers",
    "zero_gradients": "counts of zero gradients",
    "monitor": "the markers' windows",
}
"""Parts of a checkpoint's state that are put back; the others are compared."""


@dataclass(slots=True)
class Progress:
    """How far a run is; saved with every checkpoint."""

    step: int = 0
    """Optimizer steps completed."""
    evaluated: int = 0
    """Step of the last evaluation."""
    scale: float | None = None
    """The gradient scaler's scale after that step."""
    skipped: int = 0
    """Optimizer steps the scaler skipped."""
    faults: int = 0
    """Samples that were substituted."""
    final: dict[str, float] | None = None
    """Measurements of the last evaluation."""
    best: dict[str, float] | None = None
    """Measurements of the best evaluation, with its step."""
    train_s: float = 0.0
    eval_s: float = 0.0


class Checkpoints:
    """What one rank's run saves, and takes over from the run before. Rank 0 alone writes."""

    def __init__(self, task: Task, gang: Gang, session: Session, step: Step) -> None:
        self.groups = describe(read_groups(task.learner.model, task.learner.optimizer))
        """What is decayed, counted and hashed; a run goes on with the same alone."""
        self._task, self._gang, self._session, self._step = task, gang, session, step
        self._folder = session.checkpoints
        self._remote = Remote(session.copies) if gang.first and session.copies else None
        uploader = Uploader(self._folder, self._remote) if self._remote is not None else None
        self.writer = checkpoint.Writer(self._folder, uploader) if gang.first else None
        self._clock = CheckpointClock(60 * task.keep.minutes, now=time.perf_counter())

    def is_due(self) -> bool:
        """Whether one is due by the clock of rank 0, which all ranks are to follow."""
        return self._gang.first and self._clock.is_due(time.perf_counter())

    def save(self, progress: Progress, *, per_epoch: int) -> None:
        """Write a checkpoint beside the training; every rank calls it, for what it alone holds."""
        began = time.perf_counter()
        held = checkpoint.copy_to_host(self._task.learner.state())
        learners = gather(safetensors.torch.save(held) if held else b"", self._gang)
        if self.writer is None:
            return
        self._session.phase("saving")
        self._session.sync()  # no step before a checkpoint may be lost with the machine
        self.writer.save(
            self._snapshot(progress, tuple(learners) if any(learners) else ()),
            keep=self._kept(progress, per_epoch),
        )
        self._clock.note(began=began, now=time.perf_counter())

    def close(self) -> None:
        """Wait for the last checkpoint; raises what went wrong with it."""
        if self.writer is not None:
            self.writer.close()

    def resume(self, *, steps_total: int) -> Progress | None:
        """Put everything back as the newest checkpoint has it; how far that run was, if any.

        Raises:
            CheckpointError: it was written by another trial, for other data or another gang.
        """
        path = _find(self._folder, self._remote, self._gang, self._session)
        if path is None:
            return None
        taken = checkpoint.load(path)
        changed = self._compare(path, taken)
        progress = self._restore(taken)
        if self._session.first:
            state = taken.state
            restored = [_RESTORED[name] for name in _RESTORED if state[name] is not None]
            if taken.averaged is not None:
                restored.append("the average of the weights")
            if taken.learners:
                restored.append("what the learner of each rank holds")
            certificate = checkpoint.Certificate(
                path=str(path),
                step=taken.step,
                steps_total=steps_total,
                sha256=checkpoint.checksums(path),
                model_tensors=len(taken.model),
                optimizer_tensors=len(taken.optimizer),
                state=tuple(restored),
                changed=changed,
                versions=self._other_versions(state),
            )
            log.info("%s", certificate)
            self._session.resumed(certificate.to_dict())
        return progress

    def _versions(self) -> dict[str, str]:
        return {**code_of_here(), "processor": name_device(self._gang.device)}

    def _other_versions(self, state: Mapping[str, Any]) -> dict[str, tuple[str | None, str | None]]:
        """What the run that was left had otherwise; checkpoints once named torch alone."""
        now = self._versions()
        then = state.get("versions") or {**now, "torch": state["torch"]}
        return checkpoint.differences(then, now)

    def _kept(self, progress: Progress, per_epoch: int) -> set[int]:
        """Steps whose checkpoints are never deleted."""
        kept = {int(progress.best["step"])} if progress.best else set()
        if self._task.keep.for_good:
            every = self._task.keep.for_good * per_epoch
            kept |= {step for step in checkpoint.steps(self._folder) if step % every == 0}
        return kept

    def _snapshot(self, progress: Progress, learners: tuple[bytes, ...]) -> checkpoint.Snapshot:
        """All that a run needs to go on from here as if it had never been left."""
        learner, session = self._task.learner, self._session
        scaler, zero = self._task.execution.scaler, self._step.zero_gradients
        tensors, numbers = named_state(learner.model, learner.optimizer)
        state = {
            "format": checkpoint.FORMAT,
            "step": progress.step,
            "trial": session.trial["id"],
            "config": session.recorded,
            "world_size": session.workers,
            "ranks": self._gang.world_size,
            "data": self._task.data.samples.fingerprint,
            "parameter_groups": self.groups["hash"],
            "progress": asdict(progress),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "optimizer_numbers": numbers,
            "monitor": session.state(),
            "zero_gradients": dict(zip(zero.names, zero.counts.tolist(), strict=True)),
            "versions": self._versions(),
        }
        return checkpoint.Snapshot(
            progress.step,
            checkpoint.copy_to_host(learner.model.state_dict()),
            checkpoint.copy_to_host(tensors),
            state,
            learners,
            None if learner.averaged is None
            else checkpoint.copy_to_host(learner.averaged.state_dict()),
        )  # fmt: skip

    def _compare(self, path: Path, taken: checkpoint.Snapshot) -> dict[str, tuple[Any, Any]]:
        """What differs from the run that was left, and may; what may not is refused."""
        state, session = taken.state, self._session
        changed = checkpoint.differences(state["config"], session.recorded)
        for name, (then, now) in changed.items():
            if name not in session.may_differ:
                _refuse(session, path, name, then, now)
        for what, mine in (
            ("trial", session.trial["id"]),
            ("world_size", session.workers),
            ("data", self._task.data.samples.fingerprint),
            ("parameter_groups", self.groups["hash"]),
        ):
            if state[what] != mine:
                _refuse(session, path, what, state[what], mine)
        if (state["scaler"] is None) != (self._task.execution.scaler is None):
            raise CheckpointError(f"{path} and this run differ in having a gradient scaler")
        ranks = self._gang.world_size
        if state["ranks"] != ranks:
            changed["ranks"] = (state["ranks"], ranks)
        if taken.learners and len(taken.learners) != ranks:
            raise CheckpointError(
                f"{path} holds what each of {len(taken.learners)} ranks had for itself (a queue, "
                f"say), and here are {ranks}: run it with {len(taken.learners)} ranks, or move "
                "the checkpoints away to start over"
            )
        return changed

    def _restore(self, taken: checkpoint.Snapshot) -> Progress:
        task, state, learner = self._task, taken.state, self._task.learner
        learner.model.load_state_dict(dict(taken.model))
        if learner.averaged is not None:
            learner.averaged.load_state_dict(dict(taken.judged))
        numbers = state["optimizer_numbers"]
        load_named_state(learner.model, learner.optimizer, taken.optimizer, numbers)
        if task.execution.scaler is not None:
            task.execution.scaler.load_state_dict(state["scaler"])
        if taken.learners and taken.learners[self._gang.rank]:
            learner.load_state(safetensors.torch.load(taken.learners[self._gang.rank]))
        progress = Progress(**state["progress"])
        zero = self._step.zero_gradients
        counts = [state["zero_gradients"][name] for name in zero.names]
        zero.counts = torch.tensor(counts, device=self._gang.device)
        self._session.load_state(state["monitor"], step=progress.step)
        return progress


def _find(folder: Path, remote: Remote | None, gang: Gang, session: Session) -> Path | None:
    """The newest whole checkpoint, here or in `remote`; None on every rank where there is none."""
    found = None
    damaged: list[str] = []
    if gang.first:
        found = checkpoint.newest(folder, report=damaged.append)
        if remote is not None:
            found = remote.newest(folder, local=found, report=damaged.append)
        for problem in damaged:
            log.warning("%s", problem)
    path = broadcast(str(found) if found else None, gang)
    if path is None:
        if damaged:
            log.error("NO CHECKPOINT IS WHOLE: the trial starts again from step 0")
            session.resumed({"step": 0, "damaged": damaged})
        return None
    return Path(path)


def _refuse(session: Session, path: Path, what: str, then: Any, now: Any) -> None:
    may = ", ".join(sorted(session.may_differ)) or "nothing"
    raise CheckpointError(
        f"{path} was written with {what} {then!r}, and this run has {now!r}: it cannot be "
        f"resumed as the same trial (only {may} may differ). "
        "To start from its weights alone, use init_from; to start over, move "
        "the checkpoints away"
    )
