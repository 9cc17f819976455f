"""A task trained to its end on one rank, and what its result says beside the measurements."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ablate.training import loop, ranks
from ablate.training.arithmetic import name_device, name_float32
from ablate.training.inspection.inspect import trial_record
from ablate.training.inspection.specimen import Specimen
from ablate.training.memory import fitting
from ablate.training.ranks import Gang
from ablate.training.sketches import sentence
from ablate.training.task import Task
from ablate.trial.session import Ending, Session

COUNTED_ON = ("cuda",)
"""Devices whose runs say what a sample takes: there it costs a moment, and a peak is known."""


def fit(
    session: Session, task: Task, gang: Gang, *, specimen: Callable[[], Specimen] | None = None
) -> Ending:
    """Train `task` from its newest checkpoint to its end, on every rank of `gang` at once.

    `specimen` makes the model with its initial weights; with it, a run that ended leaves what its
    weights and features say (learning.json).

    Raises:
        CheckpointError: the newest checkpoint belongs to another run, or cannot be written.
        DataError: the data cannot be used.
        InfeasibleError: it does not fit the memory; says what to try.
    """
    ranks.meet(gang)
    with fitting(task):
        run = loop.Run(task, gang, session)
        if session.first:
            loop.log.info("%s", sentence(run.checkpoints.groups))
        ending = run.train()
        used = _flops(run) if ending.status == "completed" else {}
    makes = ranks.gather(name_device(gang.device), gang)
    ranks.leave()
    if not session.first or ending.status == "stopped":
        return ending
    session.note(**_facts(run, makes), **used)
    session.conclude(ending)
    learner = task.learner
    if specimen is not None and ending.status in ("completed", "diverged"):
        ranks.take_over(gang)
        learned = trial_record(specimen, learner, step=ending.step)
        session.learning(learned)
        loop.log.info("%s: %s", learned["verdict"], "; ".join(learned["reasons"]))
    return ending


def _flops(run: loop.Run) -> dict[str, Any]:
    """What a sample takes, and what a card could do."""
    if run.gang.device.type not in COUNTED_ON:
        return {}
    from ablate.training.flops import flops_per_sample, peak_flops  # half a second of imports

    card = name_device(run.gang.device)
    (batch, *_) = run.feed.peek(0)
    needed = flops_per_sample(run.task.learner, batch)
    return {"flops_per_sample": needed, "peak_flops_per_worker": peak_flops(card)}


def _facts(run: loop.Run, makes: Sequence[str]) -> dict[str, Any]:
    task, gang, progress = run.task, run.gang, run.progress
    memory = None
    if gang.device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(gang.device) / 2**30
    return {
        "train_s": progress.train_s,
        "eval_s": progress.eval_s,
        "skipped_steps": progress.skipped,
        "data_faults": progress.faults,
        "peak_memory_gib": memory,
        "num_parameters": sum(p.numel() for p in task.learner.model.parameters()),
        "parameter_groups": run.checkpoints.groups,
        "facts": {
            "threads": torch.get_num_threads(),
            "device": str(gang.device),
            "makes": sorted(set(makes)),
            "fp32": name_float32(gang.device),
            "torch": torch.__version__,
            "data": task.data.samples.fingerprint,
            **task.facts,
        },
    }
