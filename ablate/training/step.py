"""One optimizer step.

It is open_clip_train 3.3.0's, in its order: learning rate, zero gradients, forward and backward
(the recipe's), unscale, clip, optimizer step, bounds on parameters. What is added only looks: the
gradient norm is measured before clipping.

The randomness inside a step (dropout) is seeded from (seed, step, rank), so no generator's state
needs saving.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from ablate.training.data.augment import mix, seed_globals
from ablate.training.data.order import child_seeds
from ablate.training.embeddings import large_embeddings, sum_rows
from ablate.training.interruption import Borders, break_off
from ablate.training.optim import GradientNorms, UpdateMeter, ZeroGradients
from ablate.training.ranks import Gang, broadcast_buffers, broadcast_tensors, keep_apart
from ablate.training.task import MicroBatch, Task

GROUP_STEPS = 10
"""Steps between two records of the gradient norms of groups."""
UPDATE_STEPS = 50
"""Steps between two measurements of the updates, which take a copy of the weights."""
LOOK_STEPS = 200
"""Steps between two looks inside of the model."""


class Step:
    """Takes the steps of one rank's task, and measures them."""

    def __init__(self, task: Task, gang: Gang) -> None:
        self.task = task
        self.gang = gang
        model, optimizer = task.learner.model, task.learner.optimizer
        self.norms = GradientNorms(model)
        self.updates = UpdateMeter(model, optimizer, watched=task.watch.moments)
        self.zero_gradients = ZeroGradients(model)
        # Of several micro-batches DDP sums each; the sum of their sum would round otherwise.
        accumulates = task.length.accum_freq > 1
        self.embeddings = {} if accumulates else large_embeddings(model, gang)
        per_epoch = task.length.steps_per_epoch(gang.world_size)
        self.borders = Borders(
            total=per_epoch * task.length.epochs,
            checkpoint_steps=per_epoch * task.keep.every,
            interruption=task.interruption,
        )
        _, _, self.key = child_seeds(task.seed)

    def take(
        self, model: torch.nn.Module, step: int, micro: list[MicroBatch]
    ) -> tuple[float, dict[str, torch.Tensor]]:
        """One optimizer step: its learning rate, its measurements as scalars on the device."""
        learner, execution = self.task.learner, self.task.execution
        optimizer, scaler = learner.optimizer, execution.scaler
        broken = self.broken_off(step)
        scheduled = self.borders.rate_of(step)
        lr = learner.rates(scheduled)
        self.seed(step)
        optimizer.zero_grad()
        if execution.cuda_graphs:  # whose memory the next pass uses again
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]

        def backward(loss: torch.Tensor) -> None:
            (loss if scaler is None else scaler.scale(loss)).backward()  # type: ignore[no-untyped-call]

        values = learner.loss(model, micro, backward)
        sum_rows(self.embeddings.values(), self.gang)
        if scaler is not None:
            scaler.unscale_(optimizer)
        norm = self.norms.measure()
        self.zero_gradients.update(self.norms.each, frozen=learner.frozen(scheduled))
        sampled, near = (step + 1) % UPDATE_STEPS == 0, self.borders.is_near(step) and lr > 0
        if sampled or near:
            self.updates.start()
        if execution.grad_clip_norm is not None:
            most = execution.grad_clip_norm
            torch.nn.utils.clip_grads_with_norm_(self.norms.parameters, most, norm)
        if execution.clip is not None:
            execution.clip(self.norms.parameters, norm)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
            values["scaler_scale"] = scaler._scale  # type: ignore[assignment]  # get_scale() waits
        values["grad_norm"] = norm
        if near:
            values["update_norm"] = self.updates.norm() / lr
            values.update(self.turned(step))
        values.update(self.moved(step, sampled=sampled))
        values.update(broken)
        values.update(learner.settle())
        look_inside = self.task.watch.look_inside
        if look_inside is not None and (step + 1) % LOOK_STEPS == 0:
            broadcast_buffers(learner.model, self.gang)
            values.update(look_inside(micro[0]))
        return lr, values

    def turned(self, step: int) -> dict[str, torch.Tensor]:
        """About an interruption: how far an update goes where the one before went."""
        if not self.borders.is_about_break(step):
            return {}
        turn = self.updates.turn()
        if step == self.borders.broken:
            self.updates.forget()
        return {} if turn is None else {"update_turn": turn}

    def moved(self, step: int, *, sampled: bool) -> dict[str, torch.Tensor]:
        """What is measured of gradients and updates after the optimizer's step."""
        values = self.norms.by_group() if (step + 1) % GROUP_STEPS == 0 else {}
        values.update(self.updates.rms())
        if sampled:
            values.update(self.updates.finish())
            names = [f"zero_grad_steps/{name}" for name in self.zero_gradients.names]
            values.update(zip(names, self.zero_gradients.counts.unbind(), strict=True))
        return values

    def broken_off(self, step: int) -> dict[str, torch.Tensor]:
        """At an interruption: drop what does not come back, and say how far the rate jumps."""
        interruption, learner = self.task.interruption, self.task.learner
        if interruption is None or step != self.borders.broken:
            return {}
        break_off(interruption, learner.model, learner.optimizer)
        usual, lr = learner.rates(step), learner.rates(self.borders.rate_of(step))
        told = {"interrupted": 1.0, "resume_lr_ratio": lr / usual if usual else 1.0}
        return {name: torch.tensor(v, device=self.gang.device) for name, v in told.items()}

    def seed(self, step: int) -> None:
        """Seed the generators that a model may draw from in a step."""
        mixed = mix(np.array([self.key ^ (step << 16) ^ self.gang.rank], np.uint64))
        seed = int(mixed[0])
        seed_globals(seed)
        if self.gang.device.type == "cuda":
            torch.cuda.manual_seed(seed & 0x7FFFFFFFFFFFFFFF)


def parallel(step: Step) -> torch.nn.Module:
    """The model as the ranks train it together; itself with one rank."""
    task, gang = step.task, step.gang
    model, execution = task.learner.model, task.execution
    if gang.world_size == 1:
        return model
    if execution.sync_batch_norm:
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
    apart = [weight.detach() for weight in step.embeddings.values()]
    broadcast_tensors(apart, gang)  # as DDP does with those that it sums itself
    keep_apart(model, step.embeddings)
    return DistributedDataParallel(
        model,
        device_ids=[gang.device] if gang.device.type == "cuda" else None,
        static_graph=execution.static_graph,
        gradient_as_bucket_view=True,  # else each gradient is copied there and back
    )


def settle_buckets(task: Task, model: torch.nn.Module, micro: list[MicroBatch]) -> None:
    """Passes through the next step's batch, of which nothing is kept but DDP's buckets.

    DDP lays them out anew after its first backward pass (of a static graph, after its second), and
    sums of three or more ranks round by their place in a bucket: without this, a resumed run's
    first step would round otherwise than the same step of a run that was never left. (Sums of two
    do not depend on the order.)
    """
    learner = task.learner
    kept = [buffer.clone() for buffer in learner.model.buffers()]
    held = {name: value.clone() for name, value in learner.state().items()}
    for _ in range(2 if task.execution.static_graph else 1):
        learner.loss(model, micro, lambda loss: loss.backward())  # type: ignore[no-untyped-call]
        learner.optimizer.zero_grad()
    if held or learner.state():
        learner.load_state(held)
    with torch.no_grad():
        for buffer, value in zip(learner.model.buffers(), kept, strict=True):
            buffer.copy_(value)


def compiled(task: Task, model: torch.nn.Module) -> torch.nn.Module:
    """`model` as the steps call it."""
    if not task.execution.compile:
        return model
    # This mode is inductor's name for CUDA graphs.
    mode = "reduce-overhead" if task.execution.cuda_graphs else None
    return torch.compile(model, mode=mode)  # type: ignore[return-value]
