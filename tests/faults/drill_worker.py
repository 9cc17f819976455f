"""The real worker with one thing wrong inside of it, where no signal from outside reaches.

Entries: ``nan_at_<step>`` (one rank's images), ``hang_at_<step>`` (one rank, first attempt),
``slow_evaluation``, ``hung_evaluation``, ``clock_jumps_at_<step>``, ``no_memory_at_<step>``,
``break_one``.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

PATIENCE_S = 4.0


def _work(at_step: Callable[[Any, int, list[Any]], None]) -> int:
    """Run the worker; `at_step` may look at and change a step (from 1) and its micro-batches."""
    from ablate.training.step import Step
    from ablate.trial import worker

    take = Step.take

    def disturb_and_take(taker: Any, model: Any, step: int, micro: list[Any]) -> Any:
        at_step(taker, step + 1, micro)
        return take(taker, model, step, micro)

    Step.take = disturb_and_take  # type: ignore[method-assign]
    return worker.main([])


def _nan(step: int) -> int:
    def disturb(taker: Any, now: int, micro: list[Any]) -> None:
        if now == step and taker.gang.rank == taker.gang.world_size - 1:
            images, *rest = micro[0]
            # As the recipe makes of bytes: channels first, numbers in place of pixels.
            micro[0] = (images.permute(0, 3, 1, 2).float() * float("nan"), *rest)

    return _work(disturb)


def _hang(step: int) -> int:
    os.environ["ABLATE_PATIENCE_S"] = str(PATIENCE_S)

    def disturb(taker: Any, now: int, micro: list[Any]) -> None:
        first_attempt = os.environ["ABLATE_ATTEMPT"] == "1"
        if now == step and taker.gang.rank == 1 and first_attempt:
            while True:
                time.sleep(60)

    return _work(disturb)


def slow_evaluation() -> int:
    """A first evaluation that takes longer than a step may, and longer than one of its batches."""
    os.environ["ABLATE_PATIENCE_S"] = str(PATIENCE_S)
    os.environ["ABLATE_EVALUATION_PATIENCE_S"] = str(PATIENCE_S / 2)  # first: 3 times as much
    return _evaluate(lambda: time.sleep(PATIENCE_S))


def hung_evaluation() -> int:
    """One rank never ends a batch of its first evaluation."""
    os.environ["ABLATE_EVALUATION_PATIENCE_S"] = str(PATIENCE_S / 3)

    def hang() -> None:
        while os.environ["RANK"] == "1" and os.environ["ABLATE_ATTEMPT"] == "1":
            time.sleep(60)

    return _evaluate(hang)


def _evaluate(after_batch: Callable[[], None]) -> int:
    """Run the worker; `after_batch` follows the batches of the first evaluation."""
    from ablate.training import loop
    from ablate.training.evaluations.features import Encoder
    from ablate.trial import worker

    images, texts, run = Encoder.images, Encoder.texts, loop.Run.evaluate
    epochs = [0]

    def follow(encode: Callable[..., Any]) -> Callable[..., Any]:
        def encode_and_follow(*given: Any) -> Any:
            features = encode(*given)
            if epochs[-1] == 1:
                after_batch()
            return features

        return encode_and_follow

    def note(self: Any, epoch: int) -> Any:
        epochs.append(epoch)
        return run(self, epoch)

    Encoder.images = follow(images)  # type: ignore[method-assign]
    Encoder.texts = follow(texts)  # type: ignore[method-assign]
    loop.Run.evaluate = note  # type: ignore[method-assign]
    return worker.main([])


def _clock(step: int) -> int:
    """The time of day leaps ahead by an hour, and two hours back a step later."""
    true = time.time

    def disturb(taker: Any, now: int, micro: list[Any]) -> None:
        if now == step:
            time.time = lambda: true() + 3600.0
        elif now == step + 1:
            time.time = lambda: true() - 3600.0

    return _work(disturb)


def _memory(step: int) -> int:
    """What torch raises on an accelerator that is too small."""

    def disturb(taker: Any, now: int, micro: list[Any]) -> None:
        import torch

        if now == step:
            raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB")

    return _work(disturb)


def break_one() -> int:
    """One of the two trials fails at its first step, whatever is tried."""

    def disturb(taker: Any, now: int, micro: list[Any]) -> None:
        if taker.task.learner.optimizer.defaults["betas"][1] == 0.999:
            raise RuntimeError("it breaks at its first step")

    return _work(disturb)


for _step in range(1, 19):
    globals()[f"nan_at_{_step}"] = partial(_nan, _step)
    globals()[f"hang_at_{_step}"] = partial(_hang, _step)
    globals()[f"clock_jumps_at_{_step}"] = partial(_clock, _step)
    globals()[f"no_memory_at_{_step}"] = partial(_memory, _step)
