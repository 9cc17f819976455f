"""The training loop: steps, measurements, checkpoints, evaluations, and when to leave.

A step is open_clip_train 3.3.0's, in its order: learning rate, data to the device, zero gradients,
forward and backward (the recipe's), unscale, clip, optimizer step, bounds on parameters. What is
added only looks: the gradient norm is measured before clipping, and one small all-reduce carries
the mean loss, the stop flags and the fault counters, so that all ranks leave at the same step.

No step waits for the device. On a GPU the measured scalars go into a ring on the device that is
copied to pinned memory every FLUSH_STEPS steps and read when the next copy is due; so records,
markers and stop flags lag by at most twice that. On a CPU they are read at once.

The randomness inside a step (dropout) is seeded from (seed, step, rank), and data order and
augmentation are functions of the position, so no generator's state needs saving.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from ablate.errors import CheckpointError
from ablate.markers import Event, Monitor
from ablate.recipes import Task
from ablate.records import AttemptWriter, TrialRecord, write_json
from ablate.training import checkpoint, data
from ablate.training.augment import mix, seed_globals
from ablate.training.distributed import (
    Gang,
    broadcast,
    broadcast_buffers,
    gather,
    sum_over_ranks,
)
from ablate.training.optim import (
    GradientNorms,
    UpdateMeter,
    ZeroGradients,
    load_named_state,
    named_state,
)
from ablate.training.pulse import Pulse
from ablate.training.remote import Remote, Uploader

log = logging.getLogger(__name__)

FLUSH_STEPS = 16
"""Steps between two copies of measurements from a GPU to the host."""
GROUP_STEPS = 10
"""Steps between two records of the gradient norms of groups."""
UPDATE_STEPS = 50
"""Steps between two measurements of the updates, which take a copy of the weights."""
LOOK_STEPS = 200
"""Steps between two looks inside of the model."""
HEARTBEAT_S = 1.0

_RESTORED = {
    "progress": "counters and the best evaluation",
    "scaler": "gradient scaler",
    "optimizer_numbers": "the optimizer's plain numbers",
    "zero_gradients": "counts of zero gradients",
    "monitor": "the markers' windows",
}
"""Parts of a checkpoint's state that :meth:`_Run.resume` puts back; the others are compared."""

Status = Literal["completed", "diverged", "stopped", "failed"]


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


@dataclass(frozen=True, slots=True)
class Ending:
    """Why and where the loop ended."""

    status: Status
    reason: str
    progress: Progress
    steps_total: int


@dataclass(frozen=True, slots=True)
class Objective:
    """What a trial is judged by."""

    metric: str
    direction: Literal["maximize", "minimize"] = "maximize"

    def better(self, new: Mapping[str, float], old: Mapping[str, float] | None) -> bool:
        """Whether `new` beats `old`; a missing or non-finite value beats nothing."""
        value = new.get(self.metric, math.nan)
        if not math.isfinite(value):
            return False
        if old is None:
            return True
        return (
            value > old[self.metric] if self.direction == "maximize" else (value < old[self.metric])
        )


def train(
    task: Task,
    gang: Gang,
    *,
    trial_id: str,
    checkpoints: Path,
    objective: Objective,
    stop_asked: Callable[[], bool],
    config: Mapping[str, Any] | None = None,
    may_differ: Collection[str] = (),
    workers: int | None = None,
    writer: AttemptWriter | None = None,
    monitor: Monitor | None = None,
    remote: Remote | None = None,
) -> Ending:
    """Train `task` from its newest checkpoint to its end, on every rank of `gang` at once.

    `writer`, `monitor` and `remote` (where checkpoints are copied to) are rank 0's. `stop_asked`
    tells whether this process was asked to stop (SIGTERM); one rank is enough. `config` is saved
    with each checkpoint, and a run resumes only under the same one, but for its fields in
    `may_differ`. `workers` is how many ranks the trial asks for, where fewer stand in for them.

    Raises:
        CheckpointError: the newest checkpoint belongs to another run, or cannot be written.
    """
    return _Run(
        task,
        gang,
        trial_id,
        checkpoints,
        objective,
        stop_asked,
        dict(config or {}),
        may_differ,
        workers or gang.world_size,
        writer,
        monitor,
        remote,
    ).train()


class _Run:
    """One rank's run; the state that the steps share."""

    def __init__(
        self,
        task: Task,
        gang: Gang,
        trial_id: str,
        checkpoints: Path,
        objective: Objective,
        stop_asked: Callable[[], bool],
        config: Mapping[str, Any],
        may_differ: Collection[str],
        workers: int,
        writer: AttemptWriter | None,
        monitor: Monitor | None,
        remote: Remote | None,
    ) -> None:
        self.task = task
        self.gang = gang
        self.trial_id = trial_id
        self.objective = objective
        self.stop_asked = stop_asked
        self.config = config
        self.may_differ = may_differ
        self.workers = workers
        self.writer = writer
        self.monitor = monitor
        self.folder = checkpoints
        self.remote = remote
        uploader = Uploader(checkpoints, remote) if remote is not None else None
        self.checkpoints = checkpoint.Writer(checkpoints, uploader) if gang.first else None
        self.per_epoch = data.steps_per_epoch(
            task.num_samples,
            batch_size=task.batch_size,
            accum_freq=task.accum_freq,
            world_size=gang.world_size,
        )
        self.total = self.per_epoch * task.epochs
        self.global_batch = task.batch_size * gang.world_size * task.accum_freq
        if not self.total:
            raise ValueError(
                f"an epoch of {task.num_samples} samples has no whole step of "
                f"{self.global_batch}; lower batch_size or accum_freq"
            )
        self.progress = Progress(scale=task.scaler.get_scale() if task.scaler else None)
        self.norms = GradientNorms(task.model)
        self.updates = UpdateMeter(task.model, task.optimizer, watched=task.watched)
        self.zero_gradients = ZeroGradients(task.model)
        self.exchange = _Exchange(gang)
        self.stop_seen = False
        self.verdict_seen = False
        self.unusable = ""
        """Why this rank's data cannot be used."""
        self.void_from: int | None = None
        """First step that some rank had no data for."""
        self.beat = 0.0
        self.pulse = Pulse()
        _, _, self.step_key = data.child_seeds(task.seed)

    # ------------------------------------------------------------------- the way through

    def train(self) -> Ending:
        self.resume()
        model = self.wrap()
        try:
            ending = self.pending_evaluation()
            if ending is None:
                ending = self.run_steps(model)
            return ending
        finally:
            if self.checkpoints is not None:
                self.checkpoints.close()

    def run_steps(self, model: torch.nn.Module) -> Ending:
        task, progress = self.task, self.progress
        batches = self.batches()
        began = progress.step
        end = time.perf_counter()
        for step in range(began, self.total):
            micro, faults, data_s = self.next_batches(batches)
            values = self.optimize(model, step, micro)
            now = time.perf_counter()
            host = {
                "step": step + 1,
                "time": time.time(),
                "lr": task.optimizer.param_groups[0]["lr"],
                "step_time_s": now - end,
                "data_time_s": data_s,
            }
            progress.train_s += now - end
            self.pulse.step(0.0 if step == began else now - end)  # the first one warms up
            end = now
            progress.step = step + 1
            flags = (
                float(self.stop_asked()),
                float(self.wants_end()),
                float(faults),
                float(bool(self.unusable)),
            )
            self.take(self.exchange.push(values, flags, host))
            epoch_ends = (step + 1) % self.per_epoch == 0
            if epoch_ends or self.must_leave():
                self.take(self.exchange.flush())
                self.pulse.rest()
            if self.must_leave():
                return self.leave()
            if epoch_ends:
                ending = self.end_epoch((step + 1) // self.per_epoch)
                if ending is not None:
                    return ending
                self.pulse.step(0.0)
                end = time.perf_counter()
        self.pulse.rest()
        return Ending("completed", f"{self.total} steps", progress, self.total)

    def next_batches(
        self, batches: Iterator[data.Batch]
    ) -> tuple[list[tuple[torch.Tensor, ...]], int, float]:
        """One step's micro-batches on the device, their substitutes, seconds waited."""
        began = time.perf_counter()
        micro, faults = [], 0
        for _ in range(self.task.accum_freq):
            batch = next(batches)
            micro.append(tuple(t.to(self.gang.device, non_blocking=True) for t in batch.tensors))
            faults += batch.substitutes
            self.unusable = self.unusable or batch.unusable
        return micro, faults, time.perf_counter() - began

    def optimize(
        self, model: torch.nn.Module, step: int, micro: list[tuple[torch.Tensor, ...]]
    ) -> dict[str, torch.Tensor]:
        """One optimizer step; its measurements as scalars on the device."""
        task, scaler = self.task, self.task.scaler
        lr = task.schedule(step)
        for group in task.optimizer.param_groups:
            group["lr"] = lr
        self.seed_step(step)
        task.optimizer.zero_grad()
        if task.cuda_graphs:  # whose memory the next pass uses again
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]

        def backward(loss: torch.Tensor) -> None:
            (loss if scaler is None else scaler.scale(loss)).backward()  # type: ignore[no-untyped-call]

        values = task.forward_backward(model, micro, backward)
        if scaler is not None:
            scaler.unscale_(task.optimizer)
        norm = self.norms.measure()
        self.zero_gradients.update(self.norms.each)
        sampled = (step + 1) % UPDATE_STEPS == 0
        if sampled:
            self.updates.start()
        if task.grad_clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.norms.parameters, task.grad_clip_norm, norm)
        if scaler is None:
            task.optimizer.step()
        else:
            scaler.step(task.optimizer)
            scaler.update()
            values["scaler_scale"] = scaler._scale  # type: ignore[assignment]  # get_scale() waits
        values["grad_norm"] = norm
        if (step + 1) % GROUP_STEPS == 0:
            values.update(self.norms.by_group())
        values.update(self.updates.rms())
        if sampled:
            values.update(self.updates.finish())
            names = [f"zero_grad_steps/{name}" for name in self.zero_gradients.names]
            values.update(zip(names, self.zero_gradients.counts.unbind(), strict=True))
        values.update(task.after_step())
        if task.look_inside is not None and (step + 1) % LOOK_STEPS == 0:
            values.update(task.look_inside(micro[0]))
        return values

    def seed_step(self, step: int) -> None:
        """Seed the generators that a model may draw from in a step."""
        mixed = mix(np.array([self.step_key ^ (step << 16) ^ self.gang.rank], np.uint64))
        seed = int(mixed[0])
        seed_globals(seed)
        if self.gang.device.type == "cuda":
            torch.cuda.manual_seed(seed & 0x7FFFFFFFFFFFFFFF)

    # ------------------------------------------------------------------- measurements

    def take(self, rows: Iterable[tuple[dict[str, Any], dict[str, float]]]) -> None:
        """Account for steps whose measurements have arrived; rank 0 records them."""
        progress, records = self.progress, []
        for host, values in rows:
            self.stop_seen |= values.pop("stop") > 0
            self.verdict_seen |= values.pop("end") > 0
            progress.faults += round(values.pop("faults"))
            if values.pop("unusable") > 0 and self.void_from is None:
                self.void_from = host["step"]
            if self.void_from is not None:
                continue  # some rank made this step without data
            if "scaler_scale" in values:
                scale = values["scaler_scale"]
                progress.skipped += progress.scale is not None and scale < progress.scale
                progress.scale = scale
                values["skipped_steps"] = progress.skipped
            if self.writer is not None:
                row = self.row(host, values)
                for name in [n for n in row if n.startswith("zero_grad_steps/") and not row[n]]:
                    del row[name]  # all parameters have one; those at zero say nothing
                records.append(row)
                if self.monitor is not None:
                    self.tell(self.monitor.observe(row))
        if self.writer is not None and records:
            self.writer.step(records)
            self.heartbeat("training", records[-1])

    def row(self, host: Mapping[str, Any], values: Mapping[str, float]) -> dict[str, Any]:
        assert self.writer is not None
        step = int(host["step"])
        return {
            "step": step,
            "attempt": self.writer.attempt,
            "time": round(host["time"], 3),
            "epoch": round(step / self.per_epoch, 6),
            "samples": step * self.global_batch,
            "lr": host["lr"],
            **values,
            "step_time_s": round(host["step_time_s"], 6),
            "data_time_s": round(host["data_time_s"], 6),
            "samples_per_s": round(self.global_batch / host["step_time_s"], 2),
            "data_faults": self.progress.faults,
        }

    def tell(self, events: Iterable[Event]) -> None:
        assert self.writer is not None
        for event in events:
            log.log(
                logging.WARNING if event.severity in ("severe", "fatal") else logging.INFO,
                "marker %s at step %d: %s",
                event.marker,
                event.first_step,
                event.message,
            )
            self.writer.event(event.to_dict())

    def heartbeat(self, phase: str, row: Mapping[str, Any] | None = None) -> None:
        if self.writer is None or (row and time.monotonic() - self.beat < HEARTBEAT_S):
            return
        self.beat = time.monotonic()
        names = ("loss", "samples_per_s", "epoch")
        latest = {name: row[name] for name in names if name in row} if row else {}
        self.writer.heartbeat(
            {
                "time": time.time(),
                "phase": phase,
                "step": self.progress.step,
                "steps_total": self.total,
                **latest,
                "final": self.progress.final,
                "skipped_steps": self.progress.skipped,
                "data_faults": self.progress.faults,
            }
        )

    def wants_end(self) -> bool:
        return self.monitor is not None and self.monitor.stop is not None

    def must_leave(self) -> bool:
        """Whether the run ends before its last step; every rank knows the same."""
        return (
            self.stop_seen
            or self.verdict_seen
            or self.void_from is not None
            or self.too_many_faults()
        )

    def too_many_faults(self) -> bool:
        """Whether more samples were bad than allowed; every rank knows the same number."""
        seen = max(self.progress.step * self.global_batch, self.task.num_samples)
        return self.progress.faults > self.task.max_fault_share * seen

    # ------------------------------------------------------------------- epochs and endings

    def end_epoch(self, epoch: int) -> Ending | None:
        """Checkpoint, then evaluate: a crash in the evaluation costs the evaluation alone."""
        due = [e for e in self.task.evaluations if e.due(epoch)]
        last = epoch == self.task.epochs
        if due or last or epoch % self.task.checkpoint_epochs == 0:
            self.save()
        if self.agree(self.wants_end()):
            return self.leave()
        return self.evaluate(epoch)

    def pending_evaluation(self) -> Ending | None:
        """The evaluation of the checkpoint that was resumed from, if it was not made."""
        epoch, rest = divmod(self.progress.step, self.per_epoch)
        if epoch == 0 or rest or self.progress.evaluated == self.progress.step:
            return None
        return self.evaluate(epoch)

    def evaluate(self, epoch: int) -> Ending | None:
        """Run what is due; an Ending when the markers then say so."""
        due = [e for e in self.task.evaluations if e.due(epoch)]
        if not due:
            return None
        progress, model = self.progress, self.task.model
        self.heartbeat("evaluating")
        began = time.perf_counter()
        broadcast_buffers(model, self.gang)
        model.eval()
        measured: dict[str, float] = {}
        with self.pulse.evaluating():
            for evaluation in due:
                measured.update(evaluation.run(model, self.gang))
        model.train()
        progress.eval_s += time.perf_counter() - began
        progress.evaluated = progress.step
        progress.final = measured
        if self.objective.better(measured, progress.best):
            progress.best = {**measured, "step": progress.step}
        if self.writer is not None:
            row = {
                "step": progress.step,
                "attempt": self.writer.attempt,
                "time": round(time.time(), 3),
                "epoch": epoch,
                **measured,
            }
            self.writer.evaluation(row)
            log.info("epoch %d: %s", epoch, {k: round(v, 4) for k, v in measured.items()})
            if self.monitor is not None:
                self.tell(self.monitor.evaluate(row))
        if self.agree(self.wants_end()):
            return self.leave()
        return None

    def leave(self) -> Ending:
        """End before the last step: the markers' verdict goes first, then faults, then the stop."""
        progress = self.progress
        if self.agree(self.wants_end()):
            stop = self.monitor.stop if self.monitor is not None else None
            why = f"marker {stop.marker} at step {stop.step}" if stop else "a marker"
            return Ending("diverged", why, progress, self.total)
        if self.void_from is not None:
            progress.step = self.void_from - 1
            told = gather(self.unusable, self.gang)
            first = next(rank for rank, why in enumerate(told) if why)
            why = f"data fault: rank {first} at step {self.void_from}: {told[first]}"
            return Ending("failed", why, progress, self.total)
        if self.too_many_faults():
            seen = progress.step * self.global_batch
            why = (
                f"data fault: {progress.faults} of {seen} samples were unreadable, more than "
                f"the share of {self.task.max_fault_share:g} that max_fault_share allows"
            )
            return Ending("failed", why, progress, self.total)
        self.save()
        return Ending("stopped", f"asked to stop at step {progress.step}", progress, self.total)

    def agree(self, mine: bool) -> bool:
        """Rank 0's answer, on all ranks."""
        return bool(broadcast(mine, self.gang))

    # ------------------------------------------------------------------- checkpoints

    def save(self) -> None:
        """Write a checkpoint of this step, on rank 0, beside the training."""
        if self.checkpoints is None:
            return
        self.heartbeat("saving")
        if self.writer is not None:
            self.writer.sync()  # no step before a checkpoint may be lost with the machine
        task, progress = self.task, self.progress
        tensors, numbers = named_state(task.model, task.optimizer)
        state = {
            "format": checkpoint.FORMAT,
            "step": progress.step,
            "trial": self.trial_id,
            "config": self.config,
            "world_size": self.workers,
            "ranks": self.gang.world_size,
            "data": task.samples.fingerprint,
            "parameter_groups": task.parameter_groups.get("hash"),
            "progress": asdict(progress),
            "scaler": task.scaler.state_dict() if task.scaler is not None else None,
            "optimizer_numbers": numbers,
            "monitor": self.monitor.state() if self.monitor is not None else None,
            "zero_gradients": dict(
                zip(self.zero_gradients.names, self.zero_gradients.counts.tolist(), strict=True)
            ),
            "torch": torch.__version__,
        }
        snapshot = checkpoint.Snapshot(
            progress.step,
            checkpoint.copy_to_host(task.model.state_dict()),
            checkpoint.copy_to_host(tensors),
            state,
        )
        self.checkpoints.save(snapshot, keep=self.kept())

    def kept(self) -> set[int]:
        """Steps whose checkpoints are never deleted."""
        kept = {int(self.progress.best["step"])} if self.progress.best else set()
        if self.task.keep_every_epochs:
            every = self.task.keep_every_epochs * self.per_epoch
            kept |= {step for step in checkpoint.steps(self.folder) if step % every == 0}
        return kept

    def resume(self) -> None:
        """Go on from the newest checkpoint: all of its state, or an error.

        Raises:
            CheckpointError: it was written by another trial, for other data or another gang.
        """
        found = None
        damaged: list[str] = []
        if self.gang.first:
            found = checkpoint.newest(self.folder, report=damaged.append)
            if self.remote is not None:
                found = self.remote.newest(self.folder, local=found, report=damaged.append)
            for problem in damaged:
                log.warning("%s", problem)
        path = broadcast(str(found) if found else None, self.gang)
        if path is None:
            if damaged and self.writer is not None:
                log.error("NO CHECKPOINT IS WHOLE: the trial starts again from step 0")
                write_json(self.writer.folder / "resumed.json", {"step": 0, "damaged": damaged})
            return
        task, snapshot = self.task, checkpoint.load(Path(path))
        state = snapshot.state
        changed = checkpoint.differences(state["config"], self.config)
        for name, (then, now) in changed.items():
            if name not in self.may_differ:
                self.refuse(path, name, then, now)
        for what, mine in (
            ("trial", self.trial_id),
            ("world_size", self.workers),
            ("data", task.samples.fingerprint),
            ("parameter_groups", task.parameter_groups.get("hash")),
        ):
            if state[what] != mine:
                self.refuse(path, what, state[what], mine)
        if (state["scaler"] is None) != (task.scaler is None):
            raise CheckpointError(f"{path} and this run differ in having a gradient scaler")
        task.model.load_state_dict(dict(snapshot.model))
        load_named_state(task.model, task.optimizer, snapshot.optimizer, state["optimizer_numbers"])
        if task.scaler is not None:
            task.scaler.load_state_dict(state["scaler"])
        self.progress = Progress(**state["progress"])
        counts = [state["zero_gradients"][name] for name in self.zero_gradients.names]
        self.zero_gradients.counts = torch.tensor(counts, device=self.gang.device)
        self.restore_monitor(state["monitor"])
        if state["ranks"] != self.gang.world_size:
            changed["ranks"] = (state["ranks"], self.gang.world_size)
        if self.writer is not None:
            certificate = checkpoint.Certificate(
                path=path,
                step=snapshot.step,
                steps_total=self.total,
                sha256=checkpoint.checksums(Path(path)),
                model_tensors=len(snapshot.model),
                optimizer_tensors=len(snapshot.optimizer),
                state=tuple(_RESTORED[name] for name in _RESTORED if state[name] is not None),
                changed=changed,
                data_order=data.STREAMED if task.stream else data.BY_POSITION,
                torch=(state["torch"], torch.__version__),
            )
            log.info("%s", certificate)
            write_json(self.writer.folder / "resumed.json", certificate.to_dict())

    def refuse(self, path: str, what: str, then: Any, now: Any) -> None:
        raise CheckpointError(
            f"{path} was written with {what} {then!r}, and this run has {now!r}: it cannot be "
            f"resumed as the same trial (only {', '.join(sorted(self.may_differ)) or 'nothing'} "
            "may differ). To start from its weights alone, use init_from; to start over, move "
            "the checkpoints away"
        )

    def restore_monitor(self, state: Mapping[str, Any]) -> None:
        """Put the markers where they were; under other thresholds, by the trace so far."""
        if self.monitor is None or self.writer is None:
            return
        try:
            self.monitor.load_state(state)
        except ValueError as error:
            log.info("markers judge the trace anew: %s", error)
            trial = TrialRecord(self.writer.folder.parent.parent)
            rows = [(row["step"], 0, row) for row in trial.trace()]
            rows += [(row["step"], 1, row) for row in trial.evaluations()]
            for step, kind, row in sorted(rows, key=lambda item: item[:2]):
                if step <= self.progress.step:
                    self.tell((self.monitor.evaluate if kind else self.monitor.observe)(row))

    # ------------------------------------------------------------------- set-up

    def wrap(self) -> torch.nn.Module:
        """The model as the steps call it."""
        task, model = self.task, self.task.model
        if self.gang.world_size > 1:
            if task.sync_batch_norm:
                model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
            cuda = self.gang.device.type == "cuda"
            model = DistributedDataParallel(
                model,
                device_ids=[self.gang.device] if cuda else None,
                static_graph=task.static_graph,
            )
        if not task.compile:
            return model
        # This mode is inductor's name for CUDA graphs.
        mode = "reduce-overhead" if task.cuda_graphs else None
        return torch.compile(model, mode=mode)  # type: ignore[return-value]

    def batches(self) -> Iterator[data.Batch]:
        task = self.task
        first, last = self.progress.step * task.accum_freq, self.total * task.accum_freq
        if task.stream is not None:
            return task.stream(first, last)
        source = data.Batches(
            task.samples,
            num_samples=task.num_samples,
            batch_size=task.batch_size,
            accum_freq=task.accum_freq,
            rank=self.gang.rank,
            world_size=self.gang.world_size,
            seed=task.seed,
        )
        return data.load(
            source,
            start=first,
            stop=last,
            workers=task.loader_workers,
            prefetch=task.prefetch,
            pin_memory=task.pin_memory and self.gang.device.type == "cuda",
        )


class _Exchange:
    """Measurements averaged over the ranks, and flags added up, without waiting for a GPU.

    Pushed are scalars on the device; what comes back are plain numbers of earlier steps, on a CPU
    of this one. The order in which names come is the same on all ranks.
    """

    def __init__(self, gang: Gang) -> None:
        self._gang = gang
        self._waiting: list[tuple[dict[str, Any], tuple[str, ...], torch.Tensor]] = []
        self._copied: (
            tuple[
                list[tuple[dict[str, Any], tuple[str, ...]]], list[torch.Tensor], torch.cuda.Event
            ]
            | None
        ) = None

    def push(
        self,
        values: Mapping[str, torch.Tensor],
        flags: tuple[float, float, float, float],
        host: dict[str, Any],
    ) -> list[tuple[dict[str, Any], dict[str, float]]]:
        """Take in a step; give back the steps whose numbers have arrived.

        `flags` are (stop asked, markers want an end, substituted samples, data unusable), added
        up over the ranks.
        """
        device, names = self._gang.device, tuple(values)
        # To the widest type among them first: exact, and one conversion in the place of many.
        vector = torch.stack([value.reshape(()) for value in values.values()]).double()
        # From memory that is not pinned, a copy would wait for the GPU.
        told = torch.tensor(flags, dtype=torch.float64, pin_memory=device.type == "cuda")
        vector = torch.cat([vector, told.to(device, non_blocking=True)])
        if self._gang.world_size > 1:
            sum_over_ranks(vector, self._gang)
            vector[: len(names)] /= self._gang.world_size
        if device.type == "cpu":
            return [(host, _named(names, vector))]
        self._waiting.append((host, names, vector))
        if len(self._waiting) < FLUSH_STEPS:
            return []
        arrived = self._arrived()
        self._start_copy()
        return arrived

    def flush(self) -> list[tuple[dict[str, Any], dict[str, float]]]:
        """Everything that was pushed, waiting for the device."""
        arrived = self._arrived()
        if self._waiting:
            self._start_copy()
            arrived += self._arrived()
        return arrived

    def _start_copy(self) -> None:
        on_host = [
            torch.empty(vector.shape, dtype=vector.dtype, pin_memory=True)
            for _, _, vector in self._waiting
        ]
        for (_, _, vector), target in zip(self._waiting, on_host, strict=True):
            target.copy_(vector, non_blocking=True)
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record()
        self._copied = ([(host, names) for host, names, _ in self._waiting], on_host, done)
        self._waiting = []

    def _arrived(self) -> list[tuple[dict[str, Any], dict[str, float]]]:
        if self._copied is None:
            return []
        rows, on_host, done = self._copied
        self._copied = None
        done.synchronize()
        return [
            (host, _named(names, vector))
            for (host, names), vector in zip(rows, on_host, strict=True)
        ]


def _named(names: tuple[str, ...], vector: torch.Tensor) -> dict[str, float]:
    return dict(zip((*names, "stop", "end", "faults", "unusable"), vector.tolist(), strict=True))
