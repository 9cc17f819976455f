"""The generic loop on a small task of its own: anything a recipe may give it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sessions import alone
from torch import nn

from ablate.errors import CheckpointError
from ablate.records.folder import TrialRecord
from ablate.training.loop import Run
from ablate.training.ranks import Gang
from ablate.training.resume import Progress
from ablate.training.task import Data, Execution, Keep, Learner, Length, Task
from ablate.trial.session import Ending

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


class Classifier(Learner):
    """Says on which side a point is; `loss` may be another one."""

    def __init__(self, loss: Callable[..., dict[str, torch.Tensor]] | None = None) -> None:
        torch.manual_seed(0)
        self.model = Net()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self._loss = loss

    def rates(self, step: int) -> float:
        return 0.01

    def loss(self, model: Any, batches: Any, backward: Any) -> dict[str, torch.Tensor]:
        if self._loss is not None:
            return self._loss(model, batches, backward)
        (points, labels), *_ = batches
        loss = nn.functional.binary_cross_entropy_with_logits(model(points), labels)
        backward(loss)
        return {"loss": loss.detach()}


def task(
    learner: Learner | None = None, *, epochs: int = 20, accum_freq: int = 1, **changes: Any
) -> Task:
    options: dict[str, Any] = {
        "data": Data(Pairs()),
        "evaluations": (Accuracy(),),
        "seed": 4,
        **changes,
    }
    length = Length(num_samples=64, batch_size=16, accum_freq=accum_freq, epochs=epochs)
    return Task(learner=learner or Classifier(), length=length, **options)


def go(
    folder: Path, what: Task, *, attempt: int = 1, trial: str = "t", stop_after: int | None = None
) -> tuple[Ending, Progress]:
    asked = iter(range(10**9))
    stop: Callable[[], bool] = lambda: stop_after is not None and next(asked) + 1 >= stop_after  # noqa: E731
    with alone(folder, attempt=attempt, trial=trial, stop_asked=stop) as session:
        run = Run(what, ALONE, session)
        ending = run.train()
        session.conclude(ending)
    return ending, run.progress


def numbers(folder: Path) -> list[tuple[Any, ...]]:
    rows = TrialRecord(folder).trace()
    dead = "zero_grad_steps/dead.weight"
    return [(row["step"], row["loss"], row["grad_norm"], row.get(dead)) for row in rows]


@pytest.mark.parametrize("stops", [(1,), (3, 4), (4,), (49, 2)])
def test_a_stopped_run_ends_as_a_whole_one(tmp_path: Path, stops: tuple[int, ...]) -> None:
    """With dropout, a parameter without gradient, and stops in and between epochs."""
    assert go(tmp_path / "whole", task())[0].status == "completed"
    for attempt, steps in enumerate(stops, start=1):
        ending, _ = go(tmp_path / "cut", task(), attempt=attempt, stop_after=steps)
        assert ending.status == "stopped"
    done, _ = go(tmp_path / "cut", task(), attempt=9)
    assert done.status == "completed" and done.step == 80
    assert numbers(tmp_path / "cut") == numbers(tmp_path / "whole")
    assert numbers(tmp_path / "cut")[49][3] == 50
    whole, cut = TrialRecord(tmp_path / "whole"), TrialRecord(tmp_path / "cut")
    top1 = [row["imagenet_top1"] for row in whole.evaluations()]
    assert [row["imagenet_top1"] for row in cut.evaluations()] == top1


def test_what_is_frozen_on_purpose_is_not_dead(tmp_path: Path) -> None:
    """A layer that the recipe holds still for 110 steps is never told as one without gradients; one
    that nothing uses is."""

    class Patient(Classifier):
        def frozen(self, step: int) -> list[str]:
            return ["body.0.weight", "body.0.bias"] if step < 110 else []

        def loss(self, model: Any, batches: Any, backward: Any) -> dict[str, torch.Tensor]:
            values = super().loss(model, batches, backward)
            step = int(self.optimizer.state[self.model.body[2].weight].get("step", 0))
            for name in self.frozen(step):
                self.model.get_parameter(name).grad = None
            return values

    go(tmp_path, task(Patient(), epochs=30))
    rows = [row for row in TrialRecord(tmp_path).trace() if row["step"] % 50 == 0]
    told = {name for row in rows for name in row if name.startswith("zero_grad_steps/")}
    assert told == {"zero_grad_steps/dead.weight", "zero_grad_steps/dead.bias"}
    (event,) = [e for e in TrialRecord(tmp_path).events() if e["marker"] == "dead_gradient"]
    assert event["flag"] == "DEAD_PARAM(dead.*)"


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
    ending, _ = go(tmp_path, task(epochs=6, evaluations=(Accuracy(values),)))
    assert ending.best == {"imagenet_top1": 0.5, "step": 8}
    assert ending.final == {"imagenet_top1": 0.2}
    kept = sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*"))
    assert kept == ["step-000008", "step-000020", "step-000024"]


def test_checkpoints_of_some_epochs_can_be_kept(tmp_path: Path) -> None:
    """Keep.for_good keeps those of every so many epochs for good."""
    values = [0.5] + [0.1] * 6
    go(tmp_path, task(epochs=7, keep=Keep(for_good=2), evaluations=(Accuracy(values),)))
    kept = sorted(int(path.name[5:]) // 4 for path in (tmp_path / "checkpoints").glob("step-*"))
    assert kept == [1, 2, 4, 6, 7]


def test_too_many_bad_samples_fail_the_trial(tmp_path: Path) -> None:
    """Substitutes are counted; above the allowed share of an epoch the trial is a data fault."""
    fine, seen = go(tmp_path / "fine", task(epochs=1, data=Data(Pairs(bad=6), 0.1)))
    assert fine.status == "completed" and seen.faults == 6
    assert TrialRecord(tmp_path / "fine").trace()[-1]["data_faults"] == 6
    bad, _ = go(tmp_path / "bad", task(epochs=1, data=Data(Pairs(bad=30), 0.1)))
    assert bad.status == "failed" and "data fault" in bad.reason
    assert bad.step < 4


def test_markers_end_the_run(tmp_path: Path) -> None:
    """Three losses that are no numbers, and the run leaves as diverged one step later."""

    def nan(net: Any, batches: Any, backward: Any) -> dict[str, torch.Tensor]:
        loss = net(batches[0][0]).sum() * float("nan")
        backward(loss)
        return {"loss": loss.detach()}

    ending, _ = go(tmp_path, task(Classifier(nan)))
    assert ending.status == "diverged" and ending.step == 4
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

    execution = Execution(scaler=torch.amp.GradScaler("cpu"))
    what = task(Classifier(overflow), execution=execution, epochs=1)
    before = what.learner.model.state_dict()["body.0.weight"].clone()
    _, progress = go(tmp_path, what)
    rows = TrialRecord(tmp_path).trace()
    assert [row["skipped_steps"] for row in rows] == [1, 2, 3, 4]
    assert rows[-1]["scaler_scale"] == 2.0**12
    assert progress.skipped == 4
    assert torch.equal(what.learner.model.state_dict()["body.0.weight"], before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_every_row(tmp_path: Path) -> None:
    """With measurements read late, no step is lost, and the loss falls."""
    device = torch.device("cuda", 0)
    what = task()
    what.learner.model.to(device)
    gang = Gang(0, 1, 0, 1, device)
    with alone(tmp_path) as session:
        Run(what, gang, session).train()
    assert [row["step"] for row in TrialRecord(tmp_path).trace()] == list(range(1, 81))
