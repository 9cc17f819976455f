"""Sweeps of real learners: a linear classifier by stochastic gradient descent, on the data sets
that scikit-learn brings. Nothing of the response is made up: neither its shape nor its noise.

A run trains on a part of the data that its seed draws, in an order that its seed draws; its score
is the accuracy on the other part. The truth of a setting is the mean of 12 runs of other seeds.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from sklearn import datasets
from sklearn.linear_model import SGDClassifier

from ablate.analysis.axes import Axis
from ablate.analysis.results import Cell, Objective, Result

TRAINED = 200
"""Examples a run sees: the fewer, the noisier."""


@functools.cache
def data(name: str) -> tuple[np.ndarray, np.ndarray]:
    """[example, feature], standardised, and its classes."""
    x, y = getattr(datasets, f"load_{name}")(return_X_y=True)
    return (x - x.mean(axis=0)) / (x.std(axis=0) + 1e-9), y


@functools.cache
def accuracy(name: str, cell: Cell, seed: int) -> float:
    lr, penalty, loss, passes, average = cell
    x, y = data(name)
    order = np.random.default_rng(seed).permutation(len(x))
    mine, rest = order[: min(TRAINED, len(x) // 2)], order[min(TRAINED, len(x) // 2) :]
    learner = SGDClassifier(
        loss=loss,
        alpha=float(penalty),
        learning_rate="constant",
        eta0=float(lr),
        average=average == "yes",
        random_state=seed,
    )
    for _ in range(int(passes)):
        learner.partial_fit(x[mine], y[mine], classes=np.unique(y))
    return float(learner.score(x[rest], y[rest]))


@dataclass
class Learner:
    """One data set; `seed` is that of the sampler and of the first run."""

    kind: str
    seed: int
    rng: np.random.Generator = field(init=False)
    axes = (
        Axis("lr", low=1e-5, high=10.0, is_log=True),
        Axis("penalty", low=1e-6, high=1.0, is_log=True),
        Axis("loss", levels=("log_loss", "hinge", "modified_huber")),
        Axis("passes", levels=("1", "3", "9"), is_ordered=True),
        Axis("average", levels=("no", "yes")),
    )
    baseline: Cell = ("0.01", "0.0001", "log_loss", "3", "no")
    goal = Objective("accuracy", "maximize", margin=0.005, percent=True)
    chance = 0.1
    best = 1.0
    """So that a regret is the error."""

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)

    def run(self, cell: Cell, seeds: Iterable[int]) -> list[Result]:
        levels = tuple(zip((axis.name for axis in self.axes), cell, strict=True))
        return [
            Result(levels, seed, "completed", accuracy(self.kind, cell, 100 * self.seed + seed))
            for seed in seeds
        ]

    def truth(self, cell: Cell) -> float:
        return float(np.mean([accuracy(self.kind, cell, 10**7 + seed) for seed in range(12)]))
