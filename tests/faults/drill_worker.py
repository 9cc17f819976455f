"""The real worker with one thing wrong inside of it, where no signal from outside reaches.

Entries: ``nan_at_<step>`` (one rank's images), ``hang_at_<step>`` (one rank, first attempt),
``slow_evaluation``, ``clock_jumps_at_<step>``, ``no_memory_at_<step>``, ``break_one``.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

PATIENCE_S = 4.0


def _work(at_step: Callable[[Any, list[Any]], None] | None = None) -> int:
    """Run the worker; `at_step` may look at and change a step's micro-batches."""
    from ablate.training import loop, worker

    take = loop._Run.next_batches

    def take_and_disturb(run: Any, batches: Any) -> Any:
        taken = take(run, batches)
        if at_step is not None:
            at_step(run, taken[0])
        return taken

    loop._Run.next_batches = take_and_disturb  # type: ignore[method-assign]
    return worker.main([])


def _nan(step: int) -> int:
    def disturb(run: Any, micro: list[Any]) -> None:
        if run.progress.step + 1 == step and run.gang.rank == run.gang.world_size - 1:
            images, *rest = micro[0]
            # As the recipe makes of bytes: channels first, numbers in place of pixels.
            micro[0] = (images.permute(0, 3, 1, 2).float() * float("nan"), *rest)

    return _work(disturb)


def _hang(step: int) -> int:
    os.environ["ABLATE_PATIENCE_S"] = str(PATIENCE_S)

    def disturb(run: Any, micro: list[Any]) -> None:
        first_attempt = os.environ["ABLATE_ATTEMPT"] == "1"
        if run.progress.step + 1 == step and run.gang.rank == 1 and first_attempt:
            while True:
                time.sleep(60)

    return _work(disturb)


def slow_evaluation() -> int:
    """An evaluation that takes longer than any step may."""
    from ablate.training import loop

    os.environ["ABLATE_PATIENCE_S"] = str(PATIENCE_S)
    evaluate = loop._Run.evaluate

    def evaluate_slowly(run: Any, epoch: int) -> Any:
        if epoch == 1:
            time.sleep(PATIENCE_S + 3)
        return evaluate(run, epoch)

    loop._Run.evaluate = evaluate_slowly  # type: ignore[method-assign]
    return _work()


def _clock(step: int) -> int:
    """The time of day leaps ahead by an hour, and two hours back a step later."""
    true = time.time

    def disturb(run: Any, micro: list[Any]) -> None:
        if run.progress.step + 1 == step:
            time.time = lambda: true() + 3600.0
        elif run.progress.step == step:
            time.time = lambda: true() - 3600.0

    return _work(disturb)


def _memory(step: int) -> int:
    """What torch raises on an accelerator that is too small."""

    def disturb(run: Any, micro: list[Any]) -> None:
        import torch

        if run.progress.step + 1 == step:
            raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB")

    return _work(disturb)


def break_one() -> int:
    """One of the two trials fails at its first step, whatever is tried."""

    def disturb(run: Any, micro: list[Any]) -> None:
        if run.config["beta2"] == 0.999:
            raise RuntimeError("it breaks at its first step")

    return _work(disturb)


for _step in range(1, 19):
    globals()[f"nan_at_{_step}"] = partial(_nan, _step)
    globals()[f"hang_at_{_step}"] = partial(_hang, _step)
    globals()[f"clock_jumps_at_{_step}"] = partial(_clock, _step)
    globals()[f"no_memory_at_{_step}"] = partial(_memory, _step)
