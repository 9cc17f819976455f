"""What the analysis reads: one `Result` per trial, and the cells x seeds table made of them.

The unit of every statistic is the run; the block is the seed, shared by all cells, so that
differences are taken within a seed (the noise two cells share cancels).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ablate import metrics
from ablate.errors import AnalysisError
from ablate.trial import Trial

FloatArray = npt.NDArray[np.float64]
Cell = tuple[str, ...]
"""Level names in the order of `Table.factors`."""

OUTCOMES = ("completed", "diverged", "pruned", "failed", "infeasible", "lost")


@dataclass(frozen=True, slots=True)
class Result:
    """One trial's place in the analysis."""

    levels: tuple[tuple[str, str], ...]
    """(factor, level name) of every factor."""
    seed: int
    outcome: str
    """One of OUTCOMES. Only completed runs carry a value; only diverged ones count as an effect."""
    value: float | None = None
    """The objective at the last step, for completed trials."""
    trial_id: str = ""
    """Results that share an id are one run standing in several cells; it is counted once."""
    verdict: str = ""
    """The markers' verdict on the run ("STABLE", "SPIKY", ...), for display."""
    flags: tuple[str, ...] = ()
    cost: float | None = None
    """What the objective is weighed against, for completed trials of studies that name it."""


Score = Callable[[Result], float | None]
"""The number a trial counts with; None if it says nothing about its setting."""


def result_of(trial: Trial, outcome: Mapping[str, Any]) -> Result:
    """A trial with its outcome.json, as the analysis reads it."""
    return Result(
        levels=trial.cell.levels,
        seed=trial.seed,
        outcome=outcome["outcome"],
        value=outcome["value"],
        trial_id=trial.id,
        verdict=outcome.get("verdict") or "",
        flags=tuple(outcome.get("flags") or ()),
        cost=cost_of(trial.objective.get("cost"), outcome, workers=trial.gang["workers"]),
    )


def cost_of(name: str | None, outcome: Mapping[str, Any], *, workers: int) -> float | None:
    """The cost called `name` (``metrics.costs``) of a completed trial, from its outcome.json.

    None for other trials (one that diverged early is not cheap), and where it was not measured.
    """
    if name is None or outcome["outcome"] != "completed":
        return None
    value: Any
    if name == "gpu_hours":
        # Said where an attempt had fewer workers.
        value = outcome.get("worker_s", outcome["wall_s"] * workers) / 3600
    elif name == "mean_step_time_s":
        steps = outcome.get("step")
        value = outcome["train_s"] / steps if steps and outcome.get("train_s") else None
    elif name in metrics.COSTS:
        value = outcome.get(name)
    else:
        value = (outcome.get("final") or {}).get(name)
    return float(value) if value is not None and math.isfinite(value) else None


@dataclass(frozen=True, slots=True)
class Objective:
    """The question's scale, fixed before any result is seen."""

    metric: str = "value"
    direction: str = "maximize"
    margin: float | None = None
    """Differences smaller than this are of no interest; None: equivalence is never claimed."""
    chance: float | None = None
    """What a run that learnt nothing scores; the score of a diverged run."""
    percent: bool = False
    """The metric is a fraction and sentences shall speak of percentage points."""

    def __post_init__(self) -> None:
        if self.direction not in ("maximize", "minimize"):
            raise AnalysisError(
                f"objective direction {self.direction!r}: use 'maximize' or 'minimize'"
            )
        if self.margin is not None and not (math.isfinite(self.margin) and self.margin >= 0):
            raise AnalysisError(
                f"objective margin {self.margin!r}: give a finite number >= 0 in the units of "
                f"{self.metric}, or leave it out"
            )

    def gain(self, delta: float) -> float:
        """`delta` with the sign of an improvement: positive is better."""
        return delta if self.direction == "maximize" else -delta


@dataclass(frozen=True, slots=True)
class Table:
    """Cells x seeds. Arrays are [cell, seed]."""

    factors: tuple[str, ...]
    cells: tuple[Cell, ...]
    seeds: tuple[int, ...]
    values: FloatArray
    """The objective; NaN where the run did not complete."""
    outcomes: npt.NDArray[np.str_]
    """Outcome, or "" where no run exists."""
    shared: Mapping[Cell, Cell]
    """Cell -> the first cell that stands on the very same runs (itself, when it has its own)."""

    def index(self, cell: Cell) -> int | None:
        """Row of the cell whose runs stand for `cell`; None when it was not run."""
        home = self.shared.get(cell)
        return None if home is None else self.cells.index(home)

    def levels(self, factor: str) -> tuple[str, ...]:
        """Level names of `factor` in order of appearance, over all cells, shared ones too."""
        column = self.factors.index(factor)
        return tuple(dict.fromkeys(cell[column] for cell in self.shared))

    def of_seeds(self, seeds: Sequence[int]) -> Table:
        """The same cells with only these seeds' runs."""
        columns = [self.seeds.index(seed) for seed in seeds]
        return replace(
            self,
            seeds=tuple(seeds),
            values=self.values[:, columns],
            outcomes=self.outcomes[:, columns],
        )

    def count(self, row: int, outcome: str) -> int:
        return int((self.outcomes[row] == outcome).sum())


def tabulate(results: Iterable[Result]) -> Table:
    """Arrange results as cells x seeds; the order of first appearance is kept.

    Raises AnalysisError for an unknown outcome, a completed run without a finite value, results
    that do not name the same factors, and two different runs of one cell with one seed.
    """
    rows = list(results)
    if not rows:
        raise AnalysisError("no results to analyse: launch the study, or give a file with rows")
    factors = tuple(factor for factor, _ in rows[0].levels)
    if len(set(factors)) != len(factors):
        raise AnalysisError(f"a result names a factor twice: {', '.join(factors)}")
    placed: dict[tuple[Cell, int], Result] = {}
    for row in rows:
        named = dict(row.levels)
        if set(named) != set(factors) or len(row.levels) != len(factors):
            raise AnalysisError(
                f"trial {row.trial_id or row.levels} names the factors {sorted(named)}, another "
                f"one {sorted(factors)}: every result must give a level to every factor"
            )
        if row.outcome not in OUTCOMES:
            raise AnalysisError(
                f"trial {row.trial_id or row.levels}: outcome {row.outcome!r}; "
                f"use one of {', '.join(OUTCOMES)}"
            )
        if row.outcome == "completed" and (row.value is None or not math.isfinite(row.value)):
            raise AnalysisError(
                f"trial {row.trial_id or row.levels}, seed {row.seed}: completed with value "
                f"{row.value!r}; give its final number, or call it diverged"
            )
        cell = tuple(named[factor] for factor in factors)
        before = placed.get((cell, row.seed))
        if before is not None and not (before.trial_id and before.trial_id == row.trial_id):
            raise AnalysisError(
                f"two runs of {dict(zip(factors, cell, strict=True))} with seed {row.seed}: "
                "give each replicate its own seed"
            )
        placed[cell, row.seed] = row

    seeds = tuple(sorted({seed for _, seed in placed}))
    owner: dict[str, Cell] = {}
    shared: dict[Cell, Cell] = {}
    runs: dict[tuple[Cell, int], Result] = {}
    for (cell, seed), row in placed.items():
        # An id is the hash of the resolved configuration: one run in two cells means that the two
        # cells are one configuration. Without ids nothing is known to be shared.
        home = owner.setdefault(row.trial_id, cell) if row.trial_id else cell
        shared.setdefault(cell, home)
        runs.setdefault((shared[cell], seed), row)
    cells = tuple(cell for cell, home in shared.items() if cell == home)

    values = np.full((len(cells), len(seeds)), np.nan)
    outcomes = np.full((len(cells), len(seeds)), "", dtype="<U10")
    for i, cell in enumerate(cells):
        for j, seed in enumerate(seeds):
            found = runs.get((cell, seed))
            if found is None:
                continue
            outcomes[i, j] = found.outcome
            if found.outcome == "completed" and found.value is not None:
                values[i, j] = found.value
    return Table(factors, cells, seeds, values, outcomes, shared)
