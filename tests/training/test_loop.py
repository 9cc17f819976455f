"""The generic loop on a small task of its own: anything a recipe may give it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ablate.errors import CheckpointError
from ablate.markers import Context, Monitor
from ablate.recipes import Task
from ablate.records import AttemptWriter, TrialRecord
from ablate.training.distributed import Gang
from ablate.training.loop import Ending, Objective, train

ALONE = Gang(0, 1, 0, 1, torch.device("cpu"))


class Pairs:
    """64 points whose label is the sign of their first coordinate; some may be bad."""

    shard_sizes = np.array([24, 40])
    fingerprint = "pairs"

    def __init__(self, *, bad: int = 0) -> None:
        self.bad = bad

    def batch(self, ids: Any, seeds: Any) -> tuple[tuple[torch.Tensor, ...], Any]:
        points = torch.stack(
            [torch.randn(4, generator=torch.Generator().manual_seed(int(i))) for i in ids]
        )
        return (points, (points[:, 0] > 0).float()), np.asarray(ids) < self.bad


class Net(nn.Module):
    """Dropout, which draws from the global generator, and a layer that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        self.dead = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.body(x)
        return out.squeeze(1)


class Accuracy:
    name = "accuracy"

    def __init__(self, values: list[float] | None = None) -> None:
        self.values = values

    def due(self, epoch: int) -> bool:
        return True

    def run(self, model: nn.Module, gang: Gang) -> dict[str, float]:
        assert not model.training
        if self.values is not None:
            return {"imagenet_top1": self.values.pop(0)}
        return {"imagenet_top1": float(model(torch.eye(4))[0].detach())}


def task(**changes: Any) -> Task:
    torch.manual_seed(0)
    model = Net()

    def forward_backward(net: Any, batches: Any, backward: Any) -> dict[str, torch.Tensor]:
        (points, labels), *_ = batches
        loss = nn.functional.binary_cross_entropy_with_logits(net(points), labels)
        backward(loss)
        return {"loss": loss.detach()}

    options: dict[str, Any] = {
        "model": model,
        "samples": Pairs(),
        "num_samples": 64,
        "batch_size": 16,
        "epochs": 20,
        "optimizer": torch.optim.AdamW(model.parameters(), lr=0.01),
        "schedule": lambda step: 0.01,
        "forward_backward": forward_backward,
        "after_step": dict,
        "evaluations": (Accuracy(),),
        "seed": 4,
        **changes,
    }
    return Task(**options)


def go(
    folder: Path,
    what: Task,
    *,
    attempt: int = 1,
    trial: str = "t",
    stop_after: int | None = None,
    monitor: Monitor | None = None,
) -> Ending:
    writer = AttemptWriter(folder, attempt)
    asked = iter(range(10**9))
    stop: Callable[[], bool] = lambda: stop_after is not None and next(asked) + 1 >= stop_after  # noqa: E731
    try:
        return train(
            what,
            ALONE,
            trial_id=trial,
            checkpoints=folder / "checkpoints",
            objective=Objective("imagenet_top1"),
            stop_asked=stop,
            writer=writer,
            monitor=monitor or Monitor(context=Context()),
        )
    finally:
        writer.close()


def numbers(folder: Path) -> list[tuple[Any, ...]]:
    rows = TrialRecord(folder).trace()
    dead = "zero_grad_steps/dead.weight"
    return [(row["step"], row["loss"], row["grad_norm"], row.get(dead)) for row in rows]


@pytest.mark.parametrize("stops", [(1,), (3, 4), (4,), (49, 2)])
def test_a_stopped_run_ends_as_a_whole_one(tmp_path: Path, stops: tuple[int, ...]) -> None:
    """With dropout, a parameter without gradient, and stops in and between epochs."""
    assert go(tmp_path / "whole", task()).status == "completed"
    for attempt, steps in enumerate(stops, start=1):
        ending = go(tmp_path / "cut", task(), attempt=attempt, stop_after=steps)
        assert ending.status == "stopped"
    done = go(tmp_path / "cut", task(), attempt=9)
    assert done.status == "completed" and done.progress.step == 80
    assert numbers(tmp_path / "cut") == numbers(tmp_path / "whole")
    assert numbers(tmp_path / "cut")[49][3] == 50
    whole, cut = TrialRecord(tmp_path / "whole"), TrialRecord(tmp_path / "cut")
    top1 = [row["imagenet_top1"] for row in whole.evaluations()]
    assert [row["imagenet_top1"] for row in cut.evaluations()] == top1


def test_the_same_seed_gives_the_same_numbers(tmp_path: Path) -> None:
    """Global generators that others have used before make no difference."""
    go(tmp_path / "a", task(epochs=2))
    what = task(epochs=2)
    torch.rand(17), np.random.rand(5)
    go(tmp_path / "b", what)
    assert numbers(tmp_path / "a") == numbers(tmp_path / "b")
    go(tmp_path / "c", task(epochs=2, seed=5))
    assert numbers(tmp_path / "a") != numbers(tmp_path / "c")


def test_the_best_checkpoint_is_kept(tmp_path: Path) -> None:
    """Last two and best by the objective; NaN is never the best."""
    values = [0.1, 0.5, math.nan, 0.3, 0.2, 0.2]
    ending = go(tmp_path, task(epochs=6, evaluations=(Accuracy(values),)))
    assert ending.progress.best == {"imagenet_top1": 0.5, "step": 8}
    assert ending.progress.final == {"imagenet_top1": 0.2}
    kept = sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*"))
    assert kept == ["step-000008", "step-000020", "step-000024"]


def test_checkpoints_of_some_epochs_can_be_kept(tmp_path: Path) -> None:
    """keep_every_epochs keeps those of every so many epochs for good."""
    values = [0.5] + [0.1] * 6
    go(tmp_path, task(epochs=7, keep_every_epochs=2, evaluations=(Accuracy(values),)))
    kept = sorted(int(path.name[5:]) // 4 for path in (tmp_path / "checkpoints").glob("step-*"))
    assert kept == [1, 2, 4, 6, 7]


def test_too_many_bad_samples_fail_the_trial(tmp_path: Path) -> None:
    """Substitutes are counted; above the allowed share of an epoch the trial is a data fault."""
    fine = go(tmp_path / "fine", task(epochs=1, samples=Pairs(bad=6), max_fault_share=0.1))
    assert fine.status == "completed" and fine.progress.faults == 6
    assert TrialRecord(tmp_path / "fine").trace()[-1]["data_faults"] == 6
    bad = go(tmp_path / "bad", task(epochs=1, samples=Pairs(bad=30), max_fault_share=0.1))
    assert bad.status == "failed" and "data fault" in bad.reason
    assert bad.progress.step < 4


def test_markers_end_the_run(tmp_path: Path) -> None:
    """Three losses that are no numbers, and the run leaves as diverged one step later."""

    def nan(net: Any, batches: Any, backward: Any) -> dict[str, torch.Tensor]:
        loss = net(batches[0][0]).sum() * float("nan")
        backward(loss)
        return {"loss": loss.detach()}

    ending = go(tmp_path, task(forward_backward=nan))
    assert ending.status == "diverged" and ending.progress.step == 4
    assert "non_finite" in ending.reason
    rows = TrialRecord(tmp_path).trace()
    assert all(math.isnan(row["loss"]) for row in rows)


def test_an_epoch_without_a_step_is_refused(tmp_path: Path) -> None:
    """A batch larger than what accumulation leaves of an epoch says what to lower."""
    with pytest.raises(ValueError, match="lower batch_size or accum_freq"):
        go(tmp_path, task(accum_freq=5))


def test_another_trials_checkpoint_is_refused(tmp_path: Path) -> None:
    """Resume never crosses trials; the message names the way to start from weights."""
    go(tmp_path, task(epochs=1))
    with pytest.raises(CheckpointError, match="init_from"):
        go(tmp_path, task(epochs=1), trial="other", attempt=2)


def test_the_scalers_skips_are_counted(tmp_path: Path) -> None:
    """An infinite gradient is a skipped step with half the scale, and no update."""

    def overflow(net: Any, batches: Any, backward: Any) -> dict[str, torch.Tensor]:
        loss = net(batches[0][0]).sum() * (1e35 if net.body[0].weight.grad is None else 1.0)
        backward(loss)
        return {"loss": loss.detach()}

    what = task(forward_backward=overflow, scaler=torch.amp.GradScaler("cpu"), epochs=1)
    before = what.model.state_dict()["body.0.weight"].clone()
    ending = go(tmp_path, what)
    rows = TrialRecord(tmp_path).trace()
    assert [row["skipped_steps"] for row in rows] == [1, 2, 3, 4]
    assert rows[-1]["scaler_scale"] == 2.0**12
    assert ending.progress.skipped == 4
    assert torch.equal(what.model.state_dict()["body.0.weight"], before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_every_row(tmp_path: Path) -> None:
    """With measurements read late, no step is lost, and the loss falls."""
    device = torch.device("cuda", 0)
    what = task()
    what.model.to(device)
    gang = Gang(0, 1, 0, 1, device)
    writer = AttemptWriter(tmp_path, 1)
    train(
        what, gang, trial_id="t", checkpoints=tmp_path / "checkpoints",
        objective=Objective("imagenet_top1"), stop_asked=lambda: False, writer=writer,
    )  # fmt: skip
    writer.close()
    assert [row["step"] for row in TrialRecord(tmp_path).trace()] == list(range(1, 81))
