"""Trials that are made to go wrong, in this process, by the worker that trains every trial.

What is wrong comes from the configuration, from the data, or from a change to the task that the
recipe built (a hook on the model, another optimizer): never from code that the product carries.
The data set is the emoji one, the model tiny-rn-a, its real small sister of RN50.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import small_trials
import torch

from ablate.markers import Event
from ablate.markers.replay import judge_trial
from ablate.recipes import Task, openclip
from ablate.records import TrialRecord
from ablate.training import worker

SANE: dict[str, Any] = {
    "batch_size": 32,
    "lr": 1e-3,
    "beta2": 0.98,
    "eps": 1e-6,
    "warmup": 20,
    "epochs": 1,
    "fused": True,
    "grad_clip_norm": 1.0,
    "train_data": "train/{00000..00007}.tar",
    "imagenet_val": None,
    "zeroshot_frequency": 0,
}
"""A recipe that learns; evaluations only where a provocation needs them."""

Change = Callable[[Task], Task]


@dataclass(frozen=True, slots=True)
class Provoked:
    """A trial that has ended, as its records tell it."""

    record: TrialRecord
    status: str
    result: Mapping[str, Any]
    events: list[dict[str, Any]]

    @property
    def verdict(self) -> str:
        return str(self.result["verdict"])

    @property
    def stop(self) -> dict[str, Any] | None:
        stop: dict[str, Any] | None = self.result["stop"]
        return stop

    def told(self, marker: str, kind: str | None = None) -> list[dict[str, Any]]:
        """Its events of a marker."""
        return [
            item
            for item in self.events
            if item["marker"] == marker and kind in (None, item["evidence"]["kind"])
        ]


def provoke(
    folder: Path,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    steps: int,
    change: Change | None = None,
    markers: Mapping[str, Any] | None = None,
    **fields: Any,
) -> Provoked:
    """Run one trial of `steps` optimizer steps an epoch to its end, with `change` made to it.

    Whatever happens, the verdict of the finished trace must be the live one.
    """
    fields = {**SANE, **fields}
    fields["train_num_samples"] = steps * fields["batch_size"]
    record = small_trials.write_trial(folder, data, markers=markers, **fields)
    build = openclip.build

    def changed(*given: Any, **named: Any) -> Task:
        task = build(*given, **named)
        return task if change is None else change(task)

    with monkeypatch.context() as patched:
        patched.setattr(openclip, "build", changed)
        assert worker._run(folder, lambda: False) == 0  # type: ignore[arg-type]
    result = record.result(1)
    assert result is not None
    judged = judge_trial(folder)
    assert judged.verdict.name == result["verdict"]
    told = [Event.from_dict(item) for item in record.events()]
    assert {item.key: item for item in judged.events} == {item.key: item for item in told}
    return Provoked(record, str(result["status"]), result, record.events())


# --------------------------------------------------------------------------- changes


class Altered:
    """Samples whose tensors are altered: ``alter(images, tokens, ids)``, images as floats that
    the recipe takes as they are (normalised, N x 3 x S x S)."""

    def __init__(self, samples: Any, alter: Callable[..., Any]) -> None:
        self._samples = samples
        self._alter = alter

    @property
    def shard_sizes(self) -> Any:
        return self._samples.shard_sizes

    @property
    def fingerprint(self) -> str:
        return str(self._samples.fingerprint)

    def batch(self, ids: Any, seeds: Any) -> Any:
        tensors, bad = self._samples.batch(ids, seeds)
        return self._alter(*tensors, ids), bad


def altered(alter: Callable[..., Any]) -> Change:
    return lambda task: dataclasses.replace(task, samples=Altered(task.samples, alter))


def from_step(first: int, change: Callable[[torch.Tensor], torch.Tensor], last: int = 10**9) -> Any:
    """A hook for the image tower: its input of training steps `first` to `last` is changed."""
    seen = 0

    def hook(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> Any:
        nonlocal seen
        if not (module.training and torch.is_grad_enabled()):
            return None
        seen += 1
        return (change(args[0]), *args[1:]) if first <= seen <= last else None

    return hook
