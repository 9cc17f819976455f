"""What a learner holds beside model and optimizer comes back, by rank; groups have their rates."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from sessions import alone
from small_trials import PRELOADED
from test_loop import ALONE, Pairs
from torch import nn

from ablate.errors import CheckpointError
from ablate.records.files import read_json
from ablate.records.folder import TrialRecord
from ablate.training import checkpoint, optim, ranks
from ablate.training.loop import Run
from ablate.training.ranks import Gang
from ablate.training.task import Data, Learner, Length, Task
from ablate.trial.session import Session

TRIAL = {"id": "t", "seed": 0, "gang": {"workers": 2}, "objective": {"metric": "accuracy"}}


class Queued(Learner):
    """Pulls towards the mean of the points it saw last: a queue of this rank's own."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(4, 4)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.queue = torch.zeros(0, 4)
        self.at = 0

    def rates(self, step: int) -> float:
        self.at = step + 1
        return optim.set_rates(self.optimizer, 0.1)

    def loss(self, model: Any, batches: Any, backward: Any) -> dict[str, torch.Tensor]:
        (points, _), *_ = batches
        seen = self.queue.mean(dim=0) if len(self.queue) else torch.zeros(4)
        loss = (model(points) - seen).square().mean()
        backward(loss)
        self.queue = torch.cat([self.queue, points])[-24:]
        return {"loss": loss.detach()}

    def state(self) -> dict[str, torch.Tensor]:
        return {"queue": self.queue} if len(self.queue) else {}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        self.queue = state.get("queue", torch.zeros(0, 4)).clone()


def task(learner: Learner) -> Task:
    length = Length(num_samples=64, batch_size=8, epochs=3)
    return Task(learner=learner, data=Data(Pairs()), length=length)


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in TrialRecord(folder).trace()]


def go(folder: Path, *, attempt: int = 1, stop_after: int = 10**9) -> Queued:
    learner = Queued()
    with alone(folder, attempt=attempt, stop_asked=lambda: learner.at >= stop_after) as session:
        Run(task(learner), ALONE, session).train()
    return learner


def test_a_queue_comes_back(tmp_path: Path) -> None:
    """A run stopped inside of an epoch goes on with its queue, and ends as one never stopped."""
    whole = go(tmp_path / "whole")
    go(tmp_path / "cut", stop_after=5)
    path = checkpoint.path_of(tmp_path / "cut" / "checkpoints", 5)
    assert (path / "learner-0.safetensors").is_file()
    assert "learner-0.safetensors" in read_json(path / "manifest.json")["files"]
    ended = go(tmp_path / "cut", attempt=2)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert torch.equal(ended.queue, whole.queue)
    told = read_json(TrialRecord(tmp_path / "cut").attempt_folder(2) / "resumed.json")
    assert "learner-0.safetensors" in told["sha256"]
    assert "what the learner of each rank holds" in told["state"]


@pytest.mark.parametrize("harm", ["torn", "gone"])
def test_a_damaged_queue_is_a_damaged_checkpoint(tmp_path: Path, harm: str) -> None:
    """It is put aside like one with damaged weights, and the one before it is taken."""
    whole = go(tmp_path)
    folder = tmp_path / "checkpoints"
    file = checkpoint.path_of(folder, 24) / "learner-0.safetensors"
    if harm == "torn":
        os.truncate(file, file.stat().st_size - 1)
    else:
        file.unlink()
    told: list[str] = []
    assert checkpoint.newest(folder, report=told.append) == checkpoint.path_of(folder, 16)
    assert "learner-0.safetensors" in told[0]
    assert torch.equal(go(tmp_path, attempt=2).queue, whole.queue)


def of_two(rank: int, port: int, folder: str) -> None:
    """Two epochs of two ranks, each with a queue of its own, left in the second and resumed."""
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    gang = ranks.join(gpus_per_worker=0)
    queues = []
    for name, stops in (("whole", (99,)), ("cut", (6, 99))):
        for attempt, stop_after in enumerate(stops, start=1):
            learner = Queued()
            stop = lambda learner=learner, last=stop_after: learner.at >= last  # noqa: E731
            with _session(Path(folder, name), gang, attempt, stop) as session:
                Run(task(learner), gang, session).train()
        queues.append(learner.queue)
    assert torch.equal(queues[0], queues[1])
    other = ranks.gather(queues[0].tolist(), gang)
    assert other[0] != other[1], "a queue of each rank's own"
    ranks.leave()


def _session(folder: Path, gang: Gang, attempt: int, stop: Any) -> Session:
    options: dict[str, Any] = {"attempt": attempt, "stop_asked": stop}
    if gang.first:
        return alone(folder, **options)
    trial = {**TRIAL, "gang": {"workers": 1}}  # as alone() has it
    return Session(trial, folder, config=None, recorded={}, rank=1, world_size=2, **options)


def test_each_rank_has_its_own_queue_back(tmp_path: Path) -> None:
    """Two ranks that were left and resumed end as two that never were; one rank is refused."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.set_forkserver_preload(PRELOADED)
    torch.multiprocessing.start_processes(
        of_two, (port, str(tmp_path)), nprocs=2, start_method="forkserver"
    )
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    newest = sorted((tmp_path / "cut" / "checkpoints").glob("step-*"))[-1]
    assert {path.name for path in newest.glob("learner-*")} == {
        "learner-0.safetensors", "learner-1.safetensors"
    }  # fmt: skip
    with pytest.raises(CheckpointError, match="2 ranks .* here are 1.*run it with 2 ranks"):
        go(tmp_path / "cut", attempt=9)


class Layered(Learner):
    """A model under timm's layer-wise rates."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        import timm
        from timm.optim import create_optimizer_v2

        self.model = timm.create_model(
            "vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=12, num_heads=2, num_classes=2
        )
        self.optimizer = create_optimizer_v2(
            self.model, "adamw", lr=0.1, weight_decay=0.05, layer_decay=0.5
        )

    def rates(self, step: int) -> float:
        return optim.set_rates(self.optimizer, 0.01 * (step + 1))

    def loss(self, model: Any, batches: Any, backward: Any) -> dict[str, torch.Tensor]:
        (points, labels), *_ = batches
        loss = nn.functional.cross_entropy(
            model(points[:, :3, None, None].expand(-1, -1, 32, 32)), labels.long()
        )
        backward(loss)
        return {"loss": loss.detach()}


def test_layer_wise_rates_are_honoured(tmp_path: Path) -> None:
    """Each group has the step's rate times its lr_scale; the record has the step's, and a run that
    was left goes on with both."""
    for attempt, stop_after in ((1, 0.02), (2, 99)):
        learner = Layered()
        first = learner.optimizer.param_groups[-1]
        stop = lambda group=first, last=stop_after: group["lr"] >= last  # noqa: E731
        with alone(tmp_path, attempt=attempt, stop_asked=stop) as session:
            Run(task(learner), ALONE, session).train()
    rows = TrialRecord(tmp_path).trace()
    assert [row["lr"] for row in rows] == [0.01 * (step + 1) for step in range(24)]
    rates = {(group["lr_scale"], group["lr"]) for group in learner.optimizer.param_groups}
    assert len(rates) == 4 and all(lr == rows[-1]["lr"] * scale for scale, lr in rates)


def test_groups_are_named_and_compared_by_who_is_in_them(tmp_path: Path) -> None:
    """An optimizer that groups parameters otherwise does not resume the run."""
    go(tmp_path, stop_after=5)
    other = Queued()
    weight, bias = other.model.parameters()
    groups = [{"params": [weight], "name": "weights"}, {"params": [bias]}]
    other.optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    described = optim.describe(optim.read_groups(other.model, other.optimizer))
    assert [name for name in described if name != "hash"] == ["weights", "group_1"]
    with alone(tmp_path, attempt=2) as session:
        with pytest.raises(CheckpointError, match="parameter_groups"):
            Run(task(other), ALONE, session).train()
