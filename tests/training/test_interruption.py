"""A break on purpose: what is kept goes on bit for bit, what is lost is named by a marker."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sessions import alone
from test_loop import ALONE
from torch import nn

from ablate.errors import LoadError
from ablate.records.folder import TrialRecord
from ablate.training import optim
from ablate.training.interruption import Borders, Interruption, span_of_data
from ablate.training.loop import Run
from ablate.training.task import Data, Learner, Length, Task

STEPS = 60


class Points:
    """8,192 points and which side of a bent line they lie on."""

    shard_sizes = np.array([8192])
    fingerprint = "points"

    def batch(self, ids: Any, seeds: Any) -> Any:
        generator = torch.Generator().manual_seed(0)
        points = torch.randn(8192, 8, generator=generator)
        sides = (points[:, 0] * points[:, 1] + points[:, 2] > 0).long()
        chosen = torch.from_numpy(ids)
        return (points[chosen], sides[chosen]), np.zeros(len(ids), bool)


class Classifier(Learner):
    def __init__(self, method: str, *, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(),
                                   nn.Linear(32, 2))  # fmt: skip
        parameters = self.model.parameters()
        self.optimizer: torch.optim.Optimizer = (
            torch.optim.AdamW(parameters, lr=1e-3)
            if method == "adamw"
            else torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True)
        )
        self.base = 3e-3 if method == "adamw" else 0.05
        self.at = 0

    def rates(self, step: int) -> float:
        self.at = step + 1
        return optim.set_rates(self.optimizer, self.base * (1.0 if step < 32 else 0.3))

    def loss(self, model: Any, batches: Any, backward: Any) -> dict[str, torch.Tensor]:
        [(points, sides)] = batches
        loss = nn.functional.cross_entropy(model(points), sides)
        backward(loss)
        return {"loss": loss.detach()}


def go(
    folder: Path,
    method: str = "adamw",
    *,
    seed: int = 0,
    stops: tuple[int, ...] = (),
    **interruption: Any,
) -> tuple[list[dict[str, Any]], set[str]]:
    """The rows of a run of 64 steps in 4 epochs, and the flags of its events."""
    broken = Interruption(at=0.6, **interruption) if interruption else None
    for attempt, stop in enumerate((*stops, 10**9), start=1):
        learner = Classifier(method, seed=seed)
        task = Task(
            learner=learner,
            data=Data(Points()),
            length=Length(num_samples=8192, batch_size=512, epochs=4),
            seed=seed,
            interruption=broken,
        )
        asked = lambda learner=learner, stop=stop: learner.at >= stop  # noqa: E731
        with alone(folder, attempt=attempt, stop_asked=asked) as session:
            Run(task, ALONE, session).train()
            flags = set(session.monitor.verdict().flags)
    return TrialRecord(folder).trace(), flags


def numbers(rows: list[dict[str, Any]], *, without: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    clocks = ("time", "step_time_s", "data_time_s", "samples_per_s", "attempt", *without)
    return [{k: v for k, v in row.items() if k not in clocks} for row in rows]


TOLD = ("interrupted", "resume_lr_ratio", "update_norm", "update_turn")
"""What is measured about a break; a run without one does not have it there."""


def _leaves_after(steps: int, rows: list[dict[str, Any]], other: list[dict[str, Any]]) -> None:
    """So many steps are the same, and what follows the next one's update is not."""
    one, two = (numbers(each, without=TOLD) for each in (rows, other))
    assert one[:steps] == two[:steps] and one[steps + 1 :] != two[steps + 1 :]


@pytest.mark.parametrize("method", ["adamw", "sgd"])
def test_all_kept_is_the_run_without_it(tmp_path: Path, method: str) -> None:
    """Broken off with everything kept, each number of each row is that of the run that was not;
    the step is marked, and no marker speaks."""
    plain, quiet = go(tmp_path / "plain", method)
    kept, flags = go(tmp_path / "kept", method, optimizer="kept")
    assert numbers(kept, without=TOLD) == numbers(plain, without=TOLD)
    assert [row["step"] for row in kept if row.get("interrupted")] == [39]
    assert "RESUME_JUMP" not in quiet | flags and "SCHEDULE_RESTARTED" not in quiet | flags


@pytest.mark.parametrize(
    ("method", "lost", "flag"),
    [
        ("adamw", {"optimizer": "lost"}, "RESUME_JUMP"),
        ("sgd", {"optimizer": "lost"}, "RESUME_JUMP"),
        ("adamw", {"optimizer": "foreign"}, "RESUME_JUMP"),
        ("sgd", {"optimizer": "foreign"}, "RESUME_JUMP"),
        ("adamw", {"schedule": "restarted"}, "SCHEDULE_RESTARTED"),
        ("sgd", {"schedule": "restarted"}, "SCHEDULE_RESTARTED"),
    ],
)
def test_what_is_lost_is_named(
    tmp_path: Path, method: str, lost: dict[str, str], flag: str
) -> None:
    """Up to the break the run is the other; then the marker names what did not come back: no
    state, one of another run of the same kind, whose updates are as large, a schedule."""
    plain, _ = go(tmp_path / "plain", method)
    if lost == {"optimizer": "foreign"}:
        go(tmp_path / "other", method, seed=1)
        lost = {**lost, "optimizer_from": str(tmp_path / "other")}
    rows, flags = go(tmp_path / "broken", method, **lost)
    _leaves_after(38, rows, plain)
    assert flag in flags, [row.get("update_norm") for row in rows[32:42]]


def test_samples_begin_anew(tmp_path: Path) -> None:
    """With the data restarted, the loss of the first steps after is of the first samples again;
    a run of several attempts takes the same."""
    whole, _ = go(tmp_path / "whole", data="restarted")
    cut, _ = go(tmp_path / "cut", data="restarted", stops=(20, 45))
    plain, _ = go(tmp_path / "plain")
    assert numbers(cut) == numbers(whole)
    _leaves_after(38, whole, plain)
    assert whole[38]["loss"] != plain[38]["loss"]
    broken = Interruption(at=0.6, data="restarted")
    assert span_of_data(broken, 10, 64) == (10, 38) and span_of_data(broken, 40, 64) == (2, 26)


def test_exact_resumes_are_silent(tmp_path: Path) -> None:
    """Stopped and resumed at borders and between them, the marker has nothing to say, and each
    number is that of the run that was never stopped."""
    for method in ("adamw", "sgd"):
        whole, _ = go(tmp_path / f"{method}-whole", method)
        cut, flags = go(tmp_path / f"{method}-cut", method, stops=(16, 37, 48))
        assert numbers(cut) == numbers(whole)
        assert len({row["attempt"] for row in cut}) == 4 and "RESUME_JUMP" not in flags


def test_moments_of_another_run_come_from_its_checkpoint(tmp_path: Path) -> None:
    """A foreign state is read from another run's checkpoint; one of another model is refused with
    its name, and so is a place without a checkpoint."""
    go(tmp_path / "other", seed=1)
    rows, _ = go(tmp_path / "taken", optimizer="foreign", optimizer_from=str(tmp_path / "other"))
    shifted, _ = go(tmp_path / "shifted", optimizer="shifted")
    kept, _ = go(tmp_path / "kept", optimizer="kept")
    for changed in (rows, shifted):
        _leaves_after(38, changed, kept)
    go(tmp_path / "momentum", "sgd", seed=1)
    with pytest.raises(LoadError, match="is no whole checkpoint"):
        go(tmp_path / "none", optimizer="foreign", optimizer_from=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="foreign needs optimizer_from"):
        Interruption(at=0.5, optimizer="foreign")


def test_updates_are_measured_about_borders() -> None:
    """The last five steps before a checkpoint and the first after it, and so about a break."""
    borders = Borders(total=64, checkpoint_steps=16, interruption=Interruption(at=0.39))
    near = [step for step in range(30) if borders.is_near(step)]
    assert near == [11, 12, 13, 14, 15, 16, 20, 21, 22, 23, 24, 25, 27, 28, 29]
