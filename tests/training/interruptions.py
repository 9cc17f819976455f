"""Deaths of a rank by its own SIGKILL, at points that no polling from outside could hit, and
whether a run that came back is the run that never died.

An :class:`Interruption` is given to ``small_trials.start(prepare=...)``; it puts its kill in the
way of the loop of one rank. What dies is the real thing: no handler runs, nothing is flushed.
"""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ablate.records.files import read_json, read_rows
from ablate.records.folder import TrialRecord

MOMENTS = ("first step", "accumulating", "writing a checkpoint", "evaluating", "last step")


TIMES = {"time", "step_time_s", "data_time_s", "samples_per_s", "attempt", "eval_time_s"}

SMALL: dict[str, Any] = {
    "model": "tiny-test-rn",
    "train_num_samples": 64,
    "warmup": 2,
    "epochs": 2,
}
"""2 epochs of 4 steps of 16 samples, each with its checkpoint and evaluation."""


LAST_WORDS = "killed here by itself"


def die() -> None:
    os.write(2, f"{LAST_WORDS}\n".encode())
    os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class Interruption:
    """Kill one rank at one of MOMENTS; what is open about it is drawn from `seed`."""

    moment: str
    ranks: int
    accum_freq: int
    steps: int
    checkpoints: int
    seed: str

    def __call__(self) -> None:
        draw = random.Random(self.seed)
        rank = draw.randrange(self.ranks)
        if self.moment == "writing a checkpoint":
            rank = 0  # the only one that writes
        if int(os.environ["RANK"]) != rank:
            return
        if self.moment == "first step":
            after_step(1)
        elif self.moment == "last step":
            after_step(self.steps)
        elif self.moment == "accumulating":
            step = draw.randrange(2, self.steps + 1)
            _after_backward(step, 1 if self.accum_freq == 1 else draw.randrange(1, self.accum_freq))
        elif self.moment == "writing a checkpoint":
            stage = draw.choice(("one file", "torn file", "no manifest", "renamed"))
            _while_writing(draw.randrange(1, self.checkpoints + 1), stage)
        elif self.moment == "evaluating":
            _while_evaluating(draw.randrange(1, self.checkpoints + 1))
        else:
            raise ValueError(self.moment)


def _wrap(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """Replace a function by wrapper(original, *arguments)."""
    original = getattr(owner, name)

    def wrapped(*arguments: Any, **named: Any) -> Any:
        return wrapper(original, *arguments, **named)

    setattr(owner, name, wrapped)


def after_step(number: int) -> None:
    """After the optimizer's step `number`, before anything of it is recorded."""
    from ablate.training.step import Step

    def optimize(original: Any, run: Any, model: Any, step: int, *rest: Any) -> Any:
        values = original(run, model, step, *rest)
        if step + 1 == number:
            die()
        return values

    _wrap(Step, "take", optimize)


def _after_backward(number: int, micro_batch: int) -> None:
    """In step `number`, after the gradients of so many micro-batches, before the optimizer."""
    import torch

    from ablate.training.step import Step

    seen = {"step": 0, "backward": 0}

    def optimize(original: Any, run: Any, model: Any, step: int, *rest: Any) -> Any:
        seen.update(step=step + 1, backward=0)
        return original(run, model, step, *rest)

    def backward(original: Any, *given: Any, **named: Any) -> Any:
        done = original(*given, **named)
        seen["backward"] += 1
        if (seen["step"], seen["backward"]) == (number, micro_batch):
            die()
        return done

    _wrap(Step, "take", optimize)
    _wrap(torch.Tensor, "backward", backward)


def _while_writing(number: int, stage: str) -> None:
    """In checkpoint `number` of this process: between its files, in one, or before its manifest."""
    import safetensors.torch

    from ablate.training import checkpoint

    saved = {"files": 0, "checkpoints": 0}

    def save_file(original: Any, tensors: Any, path: Path, *rest: Any) -> None:
        original(tensors, path, *rest)
        saved["files"] += 1
        if saved["files"] == 2 * number - 1 and stage == "one file":
            die()
        if saved["files"] == 2 * number and stage == "torn file":
            os.truncate(path, path.stat().st_size // 2)
            die()

    def write_json(original: Any, path: Path, *rest: Any, **named: Any) -> None:
        if path.name == "manifest.json" and saved["files"] == 2 * number:
            if stage == "no manifest":
                die()
        original(path, *rest, **named)

    def sync_folder(original: Any, *given: Any) -> None:
        if saved["files"] == 2 * number and stage == "renamed":
            die()
        original(*given)

    _wrap(safetensors.torch, "save_file", save_file)
    _wrap(checkpoint, "write_json", write_json)
    _wrap(checkpoint, "sync_folder", sync_folder)


def _while_evaluating(number: int) -> None:
    """In evaluation `number`, after the first images have gone through the model."""
    from ablate.training.loop import Run

    evaluations = {"begun": 0}

    def evaluate(original: Any, run: Any, epoch: int) -> Any:
        evaluations["begun"] += 1
        if evaluations["begun"] == number:
            run.task.learner.model.visual.register_forward_hook(lambda *seen: die())
        return original(run, epoch)

    _wrap(Run, "evaluate", evaluate)


def measured(rows: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Rows by step without what depends on the clock; floats are compared to the last bit."""
    return {
        row["step"]: {k: json.dumps(v) for k, v in row.items() if k.partition("/")[0] not in TIMES}
        for row in rows
    }


def left_behind(trial: TrialRecord) -> dict[str, Any]:
    """The last checkpoint: hashes of all tensors, and its state without clock times and the number
    of the attempt, by which a marker knows a resume."""
    last = sorted((trial.folder / "checkpoints").glob("step-*"))[-1]
    files = read_json(last / "manifest.json")["files"]
    state = read_json(last / "state.json")
    for name in ("train_s", "eval_s"):
        del state["progress"][name]
    del state["config"]["workers"]
    del state["monitor"]["rules"]["resume_jump"]["attempt"]
    for name in ("final", "best"):
        if state["progress"][name]:
            for clock in [key for key in state["progress"][name] if key.startswith("eval_time_s")]:
                del state["progress"][name][clock]
    return {
        **{name: file["sha256"] for name, file in files.items() if name != "state.json"},
        "state": json.dumps(state, sort_keys=True),
    }


def assert_same(trial: TrialRecord, whole: TrialRecord) -> None:
    """Every row of every attempt, every evaluation and the last checkpoint are the same."""
    expected = measured(whole.trace())
    assert measured(trial.trace()) == expected
    for attempt in trial.attempts():
        for step, row in measured(read_rows(trial.attempt_folder(attempt) / "trace.jsonl")).items():
            assert row == expected[step], f"attempt {attempt} replayed step {step} differently"
    assert measured(trial.evaluations()) == measured(whole.evaluations())
    assert left_behind(trial) == left_behind(whole)
