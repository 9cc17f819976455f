"""What is measured inside of a trial's process, put in the way of its loop.

Each probe is given to ``small_trials.start(prepare=...)`` and leaves ``probe.json`` in the trial's
folder. The run is the real one: its model, batches, optimizer, exchange of measurements.
"""

from __future__ import annotations

import json
import os
import signal
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any


def wrap(name: str, wrapper: Callable[..., Any]) -> None:
    """Replace a method of the loop's steps, or its feed, by wrapper(original, self, *arguments)."""
    from ablate.training.feed import Feed
    from ablate.training.step import Step

    owner: Any = Step if hasattr(Step, name) else Feed
    original = getattr(owner, name)

    def wrapped(run: Any, *given: Any, **named: Any) -> Any:
        return wrapper(original, run, *given, **named)

    setattr(owner, name, wrapped)


def leave(folder: Path, **found: Any) -> None:
    """Note what was found and end the process: nobody needs the rest of the run."""
    write(folder, **found)
    os._exit(0)


def write(folder: Path, **found: Any) -> None:
    (folder / "probe.json").write_text(json.dumps(found))


def one_batch_for_all() -> None:
    """Every step has the first step's batch, already on the device: no reading is measured."""
    held: dict[str, Any] = {}

    def next_batches(original: Any, feed: Any) -> Any:
        if not held:
            held["micro"], _, _ = original(feed)
        return held["micro"], 0, 0.0

    wrap("next_batches", next_batches)


def time_steps(folder: Path, first: int, last: int, in_memory: bool = True) -> None:
    """Milliseconds, peak memory and floating-point operations of steps `first` to `last`."""
    if in_memory:
        one_batch_for_all()
    began: dict[str, float] = {"process": time.perf_counter()}

    def optimize(original: Any, run: Any, model: Any, step: int, micro: Any) -> Any:
        import torch
        from torch.utils.flop_counter import FlopCounterMode

        cuda = run.gang.device.type == "cuda"
        if step == 1:
            settle(cuda)
            began["first step"] = time.perf_counter() - began["process"]
        if step == 2 and not run.task.execution.compile:
            with FlopCounterMode(display=False) as counter:
                values = original(run, model, step, micro)
            began["flops"] = float(counter.get_total_flops())
            return values
        if step == first:
            settle(cuda)
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            began["steps"] = time.perf_counter()
        values = original(run, model, step, micro)
        if step == last:
            settle(cuda)
            seconds = (time.perf_counter() - began["steps"]) / (last - first + 1)
            leave(
                folder,
                ms_a_step=1000 * seconds,
                samples_per_s=run.task.length.global_batch(run.gang.world_size) / seconds,
                tflop_a_step=began.get("flops", 0.0) / 1e12,
                seconds_to_first_step=began["first step"],
                peak_gib=torch.cuda.max_memory_allocated() / 2**30 if cuda else None,
                reserved_gib=torch.cuda.max_memory_reserved() / 2**30 if cuda else None,
            )
        return values

    wrap("take", optimize)


def settle(cuda: bool) -> None:
    import torch

    if cuda:
        torch.cuda.synchronize()


def count_waits(folder: Path, first: int, last: int) -> None:
    """How often steps `first` to `last` wait for the device, and in which lines."""
    one_batch_for_all()
    seen: Counter[str] = Counter()

    def optimize(original: Any, run: Any, model: Any, step: int, micro: Any) -> Any:
        import torch

        cuda = run.gang.device.type == "cuda"
        if cuda and first <= step <= last:
            torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            values = original(run, model, step, micro)
        if cuda:
            torch.cuda.set_sync_debug_mode("default")
        for warning in said:
            if "synchroniz" in str(warning.message):
                seen[f"{warning.filename}:{warning.lineno}"] += 1
        if step == last:
            steps = last - first + 1
            leave(folder, waits_a_step=sum(seen.values()) / steps, where=dict(seen))
        return values

    wrap("take", optimize)


def ask_to_stop(folder: Path, at: int) -> None:
    """SIGTERM in step `at`; how many steps later the loop leaves."""

    def optimize(original: Any, run: Any, model: Any, step: int, micro: Any) -> Any:
        if step == at:
            os.kill(os.getpid(), signal.SIGTERM)
        write(folder, asked_at=at, last_step=step, steps_later=step - at)
        return original(run, model, step, micro)

    wrap("take", optimize)


def hold(folder: Path, at: int) -> None:
    """Say after step `at` that the device is in use, and hold it until killed."""

    def optimize(original: Any, run: Any, model: Any, step: int, micro: Any) -> Any:
        values = original(run, model, step, micro)
        if step == at:
            settle(run.gang.device.type == "cuda")
            write(folder, held=True)
            signal.pause()
        return values

    wrap("take", optimize)


def run_out_of_memory(folder: Path, rank: int, at: int) -> None:
    """On that rank, in step `at`: note the time, and raise what an accelerator does."""
    if int(os.environ["RANK"]) != rank:
        return

    def optimize(original: Any, run: Any, model: Any, step: int, micro: Any) -> Any:
        import torch

        if step == at:
            write(folder, at=time.time())
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return original(run, model, step, micro)

    wrap("take", optimize)
