"""Trials that are made to go wrong, in this process, by the worker that trains every trial.

What is wrong comes from the configuration, from the data, or from a change to the task that the
recipe built (a hook on the model, another optimizer): never from code that the product carries.
The model is tiny-rn-a, RN50's small sister; the data are emoji.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import small_trials
import torch

from ablate.markers import Event
from ablate.recipes import openclip
from ablate.records.folder import TrialRecord
from ablate.report.replay import diagnose_run, judge_trial
from ablate.training.task import Task
from ablate.trial import worker

SANE: dict[str, Any] = {
    "batch_size": 32,
    "lr": 1e-3,
    "beta2": 0.98,
    "eps": 1e-6,
    "warmup": 20,
    "epochs": 1,
    "fused": True,
    "grad_clip_norm": 1.0,
    "train_data": "train/{00000..00001}.tar",
    "imagenet_val": None,
    "zeroshot_frequency": 0,
}
"""A recipe that learns. Evaluations run only where a provocation needs them."""

EVALUATED = {"imagenet_val": "val", "zeroshot_frequency": 1}

Change = Callable[[Task], Task]


@dataclass(frozen=True, slots=True)
class Provoked:
    """A trial that has ended, as its records tell it."""

    record: TrialRecord
    result: Mapping[str, Any]
    events: list[dict[str, Any]]

    @property
    def ending(self) -> tuple[str, str, str | None]:
        """Status, verdict, and the marker that stopped it."""
        stop = self.result["stop"]
        return self.result["status"], self.result["verdict"], stop and stop["marker"]

    def told(self, marker: str, kind: str | None = None) -> list[dict[str, Any]]:
        """Its events of a marker."""
        return [
            item
            for item in self.events
            if item["marker"] == marker and kind in (None, item["evidence"]["kind"])
        ]

    @property
    def suspect(self) -> str | None:
        """The likeliest cause, as `ablate diagnose` names it, its flags asked about."""
        asked = self.result["flags"]
        found = diagnose_run(self.record.folder, asked=asked).get(self.record.folder.name)
        return found[0]["cause"] if found else None

    @property
    def markers(self) -> set[str]:
        return {item["marker"] for item in self.events}


def provoke(
    folder: Path,
    data: Path,
    *changes: Change,
    steps: int,
    markers: Mapping[str, Any] | None = None,
    **fields: Any,
) -> Provoked:
    """Run one trial of `steps` optimizer steps an epoch to its end, with `changes` made to it.

    Whatever happens, its finished trace must be judged as it was judged live.
    """
    fields = {**SANE, **fields}
    fields.setdefault("train_num_samples", steps * fields["batch_size"])
    record = small_trials.write_trial(folder, data, markers=markers, **fields)
    build = openclip.task.build

    def build_changed(*given: Any, **named: Any) -> Task:
        task = build(*given, **named)
        for change in changes:
            task = change(task)
        return task

    openclip.task.build = build_changed
    try:
        assert worker.run(folder, lambda: False) == 0
    finally:
        openclip.task.build = build
    result = record.result(1)
    assert result is not None
    judged = judge_trial(folder)
    assert judged.verdict.name == result["verdict"]
    assert judged.to_dict()["stop"] == result["stop"]
    live = [Event.from_dict(item) for item in record.events()]
    assert {item.key: item for item in judged.events} == {item.key: item for item in live}
    return Provoked(record, result, record.events())


# --------------------------------------------------------------------------- changes to a task


def training(module: torch.nn.Module) -> bool:
    """Whether a forward pass is one of a training step, and not of an evaluation."""
    return module.training and torch.is_grad_enabled()


class _Steps:
    """Counts the forward passes of training steps, from 1."""

    def __init__(self, wanted: Callable[[int], bool]) -> None:
        self.wanted = wanted
        self.seen = 0

    def __call__(self, module: torch.nn.Module) -> bool:
        self.seen += training(module)
        return training(module) and self.wanted(self.seen)


def inputs_at(
    wanted: Callable[[int], bool],
    change: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
) -> Change:
    """(images, texts) of the training steps (from 1) that `wanted` names are changed."""
    due = _Steps(wanted)

    def hook(module: torch.nn.Module, args: Any) -> Any:
        return change(*args) if due(module) else None

    def apply(task: Task) -> Task:
        task.learner.model.register_forward_pre_hook(hook)
        return task

    return apply


def gradient_times(factor: float, *, first: int) -> Change:
    """From step `first` on, the gradient that enters the image tower is this much larger."""
    due = _Steps(lambda step: step >= first)

    def hook(module: torch.nn.Module, args: Any, output: torch.Tensor) -> None:
        if due(module):
            output.register_hook(lambda gradient: gradient * factor)

    def apply(task: Task) -> Task:
        task.learner.model.visual.register_forward_hook(hook)  # type: ignore[union-attr]
        return task

    return apply


def faster(part: str, factor: float) -> Change:
    """Parameters whose name starts with `part`: `factor` times the learning rate, no decay."""

    def apply(task: Task) -> Task:
        chosen = [p for name, p in task.learner.model.named_parameters() if name.startswith(part)]
        others = [
            p for name, p in task.learner.model.named_parameters() if not name.startswith(part)
        ]
        groups = [
            {"params": others, "weight_decay": 0.2},
            {"params": chosen, "weight_decay": 0.0, "lr_scale": factor},
        ]
        task.learner.optimizer = torch.optim.AdamW(
            groups, lr=1e-3, betas=(0.9, 0.98), eps=1e-6, fused=True
        )
        return task

    return apply


def weights_times(factor: float) -> Change:
    """All initial weights but the temperature are this much larger."""

    def apply(task: Task) -> Task:
        with torch.no_grad():
            for name, p in task.learner.model.named_parameters():
                if name != "logit_scale":
                    p.mul_(factor)
        return task

    return apply


def batch_norms(change: Callable[[torch.nn.BatchNorm2d], None]) -> Change:
    def apply(task: Task) -> Task:
        for module in task.learner.model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                change(module)
        return task

    return apply


class AlteredSamples:
    """Samples of which `alter` changes the tensors (images as bytes, tokens)."""

    def __init__(self, samples: Any, alter: Callable[..., Any]) -> None:
        self._samples, self._alter = samples, alter
        self.shard_sizes, self.fingerprint = samples.shard_sizes, samples.fingerprint

    def batch(self, ids: Any, seeds: Any) -> Any:
        tensors, bad = self._samples.batch(ids, seeds)
        return self._alter(*tensors), bad


def samples(alter: Callable[[torch.Tensor, torch.Tensor], Any]) -> Change:
    """All training batches are altered, those of the model's health too, if made after it."""

    def apply(task: Task) -> Task:
        altered = AlteredSamples(task.data.samples, alter)
        return dataclasses.replace(task, data=dataclasses.replace(task.data, samples=altered))

    return apply
