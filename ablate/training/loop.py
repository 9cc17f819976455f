"""The training loop: steps, checkpoints, evaluations, and when to leave.

One small all-reduce a step carries the mean loss, the stop flags and the fault counters, so that
all ranks leave at the same step. No step of ours waits for the device
(:mod:`ablate.training.exchange` reads measurements later); with ``precision: amp`` torch's
GradScaler does, once a step, unless AdamW is fused: it asks whether a gradient overflowed before it
lets the optimizer step. Data order and augmentation are functions of the position, so no
generator's state needs saving.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from ablate.records.answers import pack, pack_labels
from ablate.training.evaluations.evaluation import Answering, Evaluation
from ablate.training.exchange import Exchange
from ablate.training.feed import Feed
from ablate.training.interruption import span_of_data
from ablate.training.ranks import Gang, broadcast, broadcast_buffers, gather
from ablate.training.resume import Checkpoints, Progress
from ablate.training.step import Step, compiled, parallel, settle_buckets
from ablate.training.task import Task
from ablate.trial.session import Ending, Session, Status

log = logging.getLogger(__name__)


class Run:
    """One rank's run, from its newest checkpoint to its end; the state that the steps share."""

    def __init__(self, task: Task, gang: Gang, session: Session) -> None:
        self.task = task
        self.gang = gang
        self.session = session
        self.pulse = session.pulse
        self.per_epoch = task.length.steps_per_epoch(gang.world_size)
        self.total = self.per_epoch * task.length.epochs
        self.global_batch = task.length.global_batch(gang.world_size)
        scaler = task.execution.scaler
        self.progress = Progress(scale=scaler.get_scale() if scaler else None)
        self.step = Step(task, gang)
        self.feed = Feed(task, gang)
        self.labelled: set[str] = set()
        """Measurements of whose images this attempt has told the classes."""
        self.exchange = Exchange(gang)
        self.checkpoints = Checkpoints(task, gang, session, self.step)
        self.stop_seen = False
        self.verdict_seen = False
        self.save_seen = False
        """A checkpoint is due within the epoch; every rank knows the same."""
        self.void_from: int | None = None
        """First step that some rank had no data for."""

    # ------------------------------------------------------------------- the way through

    def train(self) -> Ending:
        """Train to the end, on every rank at once.

        Raises:
            CheckpointError: the newest checkpoint belongs to another run, or cannot be written.
        """
        resumed = self.checkpoints.resume(steps_total=self.total)
        self.progress = resumed or self.progress
        model = self.wrap()
        try:
            return self.pending_evaluation() or self.run_steps(model)
        finally:
            self.checkpoints.close()

    def wrap(self) -> torch.nn.Module:
        """The model as the steps call it."""
        model = parallel(self.step)
        step = self.progress.step
        if self.gang.world_size > 2 and step < self.total:
            settle_buckets(self.task, model, self.feed.peek(self.span(step)[0]))
        return compiled(self.task, model)

    def run_steps(self, model: torch.nn.Module) -> Ending:
        progress = self.progress
        began = progress.step
        self.feed.start(*self.span(began))
        self.exchange.begin()
        end = time.perf_counter()
        for step in range(began, self.total):
            if step == self.step.borders.broken and self.span(step)[0] != step:
                self.feed.start(*self.span(step))
            micro, faults, data_s = self.feed.next_batches()
            lr, values = self.step.take(model, step, micro)
            now = time.perf_counter()
            host = {
                "step": step + 1,
                "time": time.time(),
                "lr": lr,
                "step_time_s": now - end,
                "data_time_s": data_s,
            }
            progress.train_s += now - end
            self.pulse.step(0.0 if step == began else now - end)  # the first one warms up
            end = now
            progress.step = step + 1
            flags = (
                float(self.session.leave == "stopped"),
                float(self.wants_end()),
                float(faults),
                float(bool(self.feed.unusable)),
                float(self.checkpoints.is_due()),
            )
            self.take(self.exchange.push(values, flags, host))
            epoch_ends = (step + 1) % self.per_epoch == 0
            if epoch_ends or self.save_seen or self.must_leave():
                self.take(self.exchange.flush())
                self.pulse.rest()
            if self.must_leave():
                return self.leave()
            if epoch_ends:
                ending = self.end_epoch((step + 1) // self.per_epoch)
                if ending is not None:
                    return ending
            elif self.save_seen:
                self.save()
            if epoch_ends or self.save_seen:
                self.save_seen = False
                self.pulse.step(0.0)
                self.exchange.begin()
                end = time.perf_counter()
        self.pulse.rest()
        return self.ending("completed", f"{self.total} steps")

    def span(self, step: int) -> tuple[int, int]:
        """Whose samples `step` takes, and the step after the last that goes on so."""
        return span_of_data(self.task.interruption, step, self.total)

    # ------------------------------------------------------------------- measurements

    def take(self, rows: Iterable[tuple[dict[str, Any], dict[str, float]]]) -> None:
        """Account for steps whose measurements have arrived; rank 0 records them."""
        progress = self.progress
        for host, values in rows:
            self.stop_seen |= values.pop("stop") > 0
            self.verdict_seen |= values.pop("end") > 0
            self.save_seen |= values.pop("save") > 0
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
            if self.session.first:
                row = row_of(host, values, per_epoch=self.per_epoch, global_batch=self.global_batch)
                self.session.step({**row, "data_faults": progress.faults})

    def wants_end(self) -> bool:
        return self.session.leave == "diverged"

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
        seen = max(self.progress.step * self.global_batch, self.task.length.num_samples)
        return self.progress.faults > self.task.data.max_fault_share * seen

    # ------------------------------------------------------------------- epochs and endings

    def end_epoch(self, epoch: int) -> Ending | None:
        """Checkpoint, then evaluate: a crash in the evaluation costs the evaluation alone."""
        due = [e for e in self.task.evaluations if e.due(epoch)]
        last = epoch == self.task.length.epochs
        if due or last or epoch % self.task.keep.every == 0:
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
        progress, model = self.progress, self.task.learner.judged
        self.session.phase("evaluating")
        began = time.perf_counter()
        broadcast_buffers(model, self.gang)
        mode = model.training
        model.eval()
        measured: dict[str, float] = {}
        with self.pulse.evaluating():
            for evaluation in due:
                measured.update(evaluation.run(model, self.gang))
        model.train(mode)
        progress.eval_s += time.perf_counter() - began
        progress.evaluated = progress.step
        progress.final = measured
        if self.session.is_better(measured, progress.best):
            progress.best = {**measured, "step": progress.step}
        if self.session.first:
            log.info("epoch %d: %s", epoch, {k: round(v, 4) for k, v in measured.items()})
        self.session.evaluation({"step": progress.step, "epoch": epoch, **measured})
        self.tell_answers(due)
        if self.agree(self.wants_end()):
            return self.leave()
        return None

    def tell_answers(self, ran: Sequence[Evaluation]) -> None:
        """Which images were right, and once an attempt of which class each is."""
        told: dict[str, Any] = {}
        for evaluation in ran if self.session.first else ():
            if isinstance(evaluation, Answering):
                for metric, right in evaluation.right.items():
                    told[metric] = {"images": len(right), "right": pack(right)}
                    if metric not in self.labelled:
                        told[metric]["labels"] = pack_labels(evaluation.labels)
                        self.labelled.add(metric)
        if told:
            self.session.answers({"step": self.progress.step, "of": told})

    def leave(self) -> Ending:
        """End before the last step: the markers' verdict goes first, then faults, then the stop."""
        progress = self.progress
        if self.agree(self.wants_end()):
            return self.ending("diverged", self.session.why_diverged)
        if self.void_from is not None:
            progress.step = self.void_from - 1
            told = gather(self.feed.unusable, self.gang)
            first = next(rank for rank, why in enumerate(told) if why)
            why = f"data fault: rank {first} at step {self.void_from}: {told[first]}"
            return self.ending("failed", why)
        if self.too_many_faults():
            seen = progress.step * self.global_batch
            why = (
                f"data fault: {progress.faults} of {seen} samples were unreadable, more than "
                f"the share of {self.task.data.max_fault_share:g} that max_fault_share allows"
            )
            return self.ending("failed", why)
        self.save()
        return self.ending("stopped", f"stopped at step {progress.step} of {self.total}")

    def ending(self, status: Status, reason: str) -> Ending:
        progress = self.progress
        return Ending(
            status=status,
            reason=reason,
            step=progress.step,
            steps_total=self.total,
            final=progress.final or {},
            best=progress.best or {},
        )

    def agree(self, mine: bool) -> bool:
        """Rank 0's answer, on all ranks."""
        return bool(broadcast(mine, self.gang))

    def save(self) -> None:
        """A checkpoint of this step."""
        self.checkpoints.save(self.progress, per_epoch=self.per_epoch)


def row_of(
    host: Mapping[str, Any],
    values: Mapping[str, float],
    *,
    per_epoch: int,
    global_batch: int,
) -> dict[str, Any]:
    """A step for the record. All parameters have a count of zero gradients; 0 says nothing."""
    step = int(host["step"])
    told = {n: v for n, v in values.items() if v or not n.startswith("zero_grad_steps/")}
    return {
        "step": step,
        "time": round(host["time"], 3),
        "epoch": round(step / per_epoch, 6),
        "samples": step * global_batch,
        "lr": host["lr"],
        **told,
        "step_time_s": round(host["step_time_s"], 6),
        "data_time_s": round(host["data_time_s"], 6),
        "samples_per_s": round(global_batch / host["step_time_s"], 2),
    }
