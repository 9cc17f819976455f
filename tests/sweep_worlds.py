"""Sweeps whose truth is known: TPE over a learning rate and four listed factors, run on paper.

The learning rate has an optimum and, above a threshold, divergence; the others add to the score;
in some worlds two of them interact; in one nothing does anything.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import optuna

from ablate.analysis.axes import Axis
from ablate.analysis.results import Cell, Objective, Result, Table, tabulate
from ablate.analysis.sweep import Answer, answer

GOAL = Objective("top1", "maximize", margin=0.005, percent=True)
AXES = (
    Axis("lr", low=1e-4, high=1e-2, is_log=True),
    Axis("warmup", levels=("1000", "5000", "10000"), is_ordered=True),
    Axis("beta2", levels=("a", "b", "c")),
    Axis("precision", levels=("amp", "fp32")),
    Axis("augmentation", levels=("default", "strong")),
)
BASELINE: Cell = ("0.001", "5000", "a", "amp", "default")
SPREADS = {"warmup": 0.006, "beta2": 0.006, "precision": 0.004, "augmentation": 0.008}
NOISE, BLOCK, CHANCE, PAIR = 0.004, 0.004, 0.001, 0.012
KINDS = {
    "plain": (40, 1),
    "seeds": (14, 3),
    "replicates": (40, 3),
    "cliff": (40, 1),
    "interaction": (40, 1),
    "null": (40, 1),
}
"""(cells, seeds) of each kind of world."""


@dataclass
class World:
    """The truth of one sweep, and its runs."""

    kind: str
    seed: int
    rng: np.random.Generator = field(init=False)
    axes = AXES
    baseline = BASELINE
    goal = GOAL
    chance = CHANCE

    def __post_init__(self) -> None:
        self.rng = rng = np.random.default_rng([self.seed, len(self.kind)])
        null = self.kind == "null"
        self.optimum = rng.uniform(-3.3, -2.7)
        self.width = rng.uniform(0.4, 0.9)
        self.cliff = rng.uniform(-2.6, -2.3) if self.kind == "cliff" else rng.uniform(-2.3, -2.0)
        if null:
            self.cliff = math.inf
        self.curvature = 0.0 if null else 0.015
        self.effects = {
            axis.name: rng.normal(0, 0.0 if null else SPREADS[axis.name], len(axis.levels))
            for axis in AXES[1:]
        }
        self.pair = np.zeros((3, 2))
        if self.kind == "interaction":
            self.pair = rng.normal(0, PAIR, (3, 2))  # of beta2 and augmentation
            self.pair -= self.pair.mean(0) + self.pair.mean(1)[:, None] - self.pair.mean()

    def truth(self, cell: Cell) -> float:
        """Score without noise; chance beyond the cliff."""
        if self.diverges(cell):
            return CHANCE
        return self.smooth(cell)

    def smooth(self, cell: Cell) -> float:
        levels = dict(zip((axis.name for axis in AXES), cell, strict=True))
        away = (math.log10(float(levels["lr"])) - self.optimum) / self.width
        total = 0.19 - self.curvature * away**2
        for axis in AXES[1:]:
            total += self.effects[axis.name][axis.levels.index(levels[axis.name])]
        beta2, augmentation = (AXES[i].levels.index(levels[AXES[i].name]) for i in (2, 4))
        return float(total + self.pair[beta2, augmentation])

    def diverges(self, cell: Cell) -> bool:
        return math.log10(float(cell[0])) > self.cliff

    @property
    def best(self) -> float:
        lr = repr(10 ** min(self.optimum, self.cliff - 1e-9))
        rest = itertools.product(*(axis.levels for axis in AXES[1:]))
        return max(self.smooth((lr, *others)) for others in rest)

    def likely_largest(self, table: Table) -> str:
        """The listed factor that most likely has the largest effect, to one who knows the noise,
        how lr acts and how strong effects are on average: what no answer can surpass for long."""
        rows = [i for i in range(len(table.cells)) if not np.isnan(table.values[i]).all()]
        cells = [table.cells[i] for i in rows]
        runs = (~np.isnan(table.values[rows])).sum(axis=1)
        away = np.log10([float(cell[0]) for cell in cells]) - self.optimum
        parts, sds, owners = [np.ones(len(rows)), (away / self.width) ** 2], [1.0, 1.0], ["", ""]
        for i, axis in enumerate(AXES[1:], start=1):
            for level in axis.levels:
                parts.append(np.array([cell[i] == level for cell in cells], dtype=float))
                sds.append(SPREADS[axis.name])
                owners.append(axis.name)
        if self.pair.any():
            for pair in itertools.product(AXES[2].levels, AXES[4].levels):
                parts.append(np.array([(cell[2], cell[4]) == pair for cell in cells], dtype=float))
                sds.append(PAIR)
                owners.append("")
        x = np.array(parts).T / NOISE * np.sqrt(runs)[:, None]
        y = np.nanmean(table.values[rows], axis=1) / NOISE * np.sqrt(runs)
        precision = x.T @ x + np.diag(1 / np.square(sds))
        root = np.linalg.cholesky(np.linalg.inv(precision))
        normal = np.random.default_rng(0).standard_normal((2000, len(sds)))
        drawn = np.linalg.solve(precision, x.T @ y) + normal @ root.T
        names = [axis.name for axis in AXES[1:]]
        mine = [[owner == name for owner in owners] for name in names]
        spans = np.array([np.ptp(drawn[:, own], axis=1) for own in mine])
        return names[int(np.bincount(spans.argmax(axis=0), minlength=len(names)).argmax())]

    def run(self, cell: Cell, seeds: Iterable[int]) -> list[Result]:
        levels = tuple(zip((axis.name for axis in AXES), cell, strict=True))
        rows = []
        for seed in seeds:
            shared = np.random.default_rng([self.seed, 7, seed]).normal(0, BLOCK)
            value = self.smooth(cell) + shared + self.rng.normal(0, NOISE)
            gone = self.diverges(cell)
            rows.append(
                Result(levels, seed, "diverged" if gone else "completed", None if gone else value)
            )
        return rows

    def sweep(self, *, cells: int | None = None, seeds: int | None = None) -> list[Result]:
        """The baseline, then what Optuna's TPE asks for."""
        cells = cells or KINDS[self.kind][0]
        seeds = seeds or KINDS[self.kind][1]
        return search(self, cells=cells, seeds=seeds)


class Searched(Protocol):
    """What can be swept: a world, or a learner."""

    seed: int
    axes: tuple[Axis, ...]
    baseline: Cell
    goal: Objective
    chance: float

    def run(self, cell: Cell, seeds: Iterable[int]) -> list[Result]: ...


def usual(world: Searched) -> dict[str, float | str]:
    """The baseline as a sampler is told it."""
    pairs = zip(world.axes, world.baseline, strict=True)
    return {axis.name: level if axis.levels else float(level) for axis, level in pairs}


def ask(trial: optuna.Trial, axes: Sequence[Axis]) -> Cell:
    """The cell that a trial of Optuna asks for; values of a range to four digits."""
    return tuple(
        trial.suggest_categorical(axis.name, axis.levels)
        if axis.levels
        else repr(float(f"{trial.suggest_float(axis.name, axis.low, axis.high, log=True):.4g}"))
        for axis in axes
    )


def search(
    world: Searched,
    *,
    cells: int,
    seeds: int,
    sampler: Callable[..., optuna.samplers.BaseSampler] = optuna.samplers.TPESampler,
) -> list[Result]:
    """The baseline, then what a sampler of Optuna asks for; a cell asked again is not run."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(direction="maximize", sampler=sampler(seed=world.seed))
    study.enqueue_trial(usual(world))
    known: dict[Cell, list[Result]] = {}
    while len(known) < cells:
        trial = study.ask()
        cell = ask(trial, world.axes)
        if cell not in known:
            known[cell] = world.run(cell, range(seeds))
        values = [world.chance if row.value is None else row.value for row in known[cell]]
        study.tell(trial, float(np.mean(values)))
    return [row for rows in known.values() for row in rows]


def judge(
    rows: Sequence[Result], *, seed: int = 0, of: type[Searched] | Searched = World
) -> Answer:
    return answer(tabulate(rows), of.axes, of.baseline, of.goal, seed=seed)


def confirm(
    world: Searched, rows: Sequence[Result], first: Answer, *, cells: int, seeds: int
) -> Answer:
    """The answer after the best cells have run on fresh seeds, beside the baseline."""
    chosen = dict.fromkeys([world.baseline, *first.confirm[:cells]])
    fresh = range(1000, 1000 + seeds)
    confirming = [row for cell in chosen for row in world.run(cell, fresh)]
    return judge([*rows, *confirming], of=world)


def best_observed(table: Table) -> Cell:
    means = np.array([np.nanmean(v) if not np.isnan(v).all() else -np.inf for v in table.values])
    return table.cells[int(means.argmax())]
