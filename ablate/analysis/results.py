"""What the analysis reads: one `Result` per trial, and the cells x seeds table made of them.

The unit of every statistic is the run; the block is the seed, shared by all cells, so that
differences are taken within a seed (the noise two cells share cancels).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from ablate.errors import AnalysisError

FloatArray = npt.NDArray[np.float64]
Cell = tuple[str, ...]
"""Level names in the order of `Table.factors`."""

LARGEST_SCORE = 1e60
"""The analysis takes fourth powers of scores (variances of variances)."""
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


@dataclass(frozen=True, slots=True)
class Objective:
    """The question's scale, fixed before any result is seen."""

    metric: str = "value"
    direction: str = "maximize"
    margin: float | None = None
    """Differences smaller than this are of no interest; None: equivalence is never claimed."""
    chance: float | None = None
    """What a run that learnt nothing scores; the score of a diverged run."""
    images: int | None = None
    """How many images a score is a share of; it comes in steps of 1 / images."""
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

    @property
    def least_variance(self) -> float:
        """Of one score, from its rounding to whole images alone (uniform: step^2 / 12)."""
        return 1 / (12 * self.images**2) if self.images else 0.0

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
    _rows: Mapping[Cell, int] = field(init=False, repr=False, compare=False)
    _levels: Mapping[str, tuple[str, ...]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        rows = {cell: row for row, cell in enumerate(self.cells)}
        columns = list(zip(*self.shared, strict=True)) or [()] * len(self.factors)
        levels = {f: tuple(dict.fromkeys(c)) for f, c in zip(self.factors, columns, strict=True)}
        object.__setattr__(self, "_rows", rows)  # asked for again and again
        object.__setattr__(self, "_levels", levels)

    def index(self, cell: Cell) -> int | None:
        """Row of the cell whose runs stand for `cell`; None when it was not run."""
        home = self.shared.get(cell)
        return None if home is None else self._rows[home]

    def levels(self, factor: str) -> tuple[str, ...]:
        """Level names of `factor` in order of appearance, over all cells, shared ones too."""
        return self._levels[factor]

    def of_seeds(self, seeds: Sequence[int]) -> Table:
        """The same cells with only these seeds' runs."""
        columns = [self.seeds.index(seed) for seed in seeds]
        return replace(
            self,
            seeds=tuple(seeds),
            values=self.values[:, columns],
            outcomes=self.outcomes[:, columns],
        )

    def without(self, changes: Collection[tuple[int, str]]) -> Table:
        """The table without the cells that have one of these (factor's place, level)."""
        kept = [
            row
            for row, cell in enumerate(self.cells)
            if not any(cell[place] == level for place, level in changes)
        ]
        cells = tuple(self.cells[row] for row in kept)
        return replace(
            self,
            cells=cells,
            values=self.values[kept],
            outcomes=self.outcomes[kept],
            shared={
                cell: home
                for cell, home in self.shared.items()
                if home in cells and not any(cell[place] == level for place, level in changes)
            },
        )

    def count(self, row: int, outcome: str) -> int:
        return int((self.outcomes[row] == outcome).sum())


def is_score(value: float) -> bool:
    """Whether a run that ended with `value` can be compared; otherwise it diverged (a perplexity
    may well be 1e217)."""
    return abs(value) <= LARGEST_SCORE  # false of NaN


def tabulate(results: Iterable[Result]) -> Table:
    """Arrange results as cells x seeds; the order of first appearance is kept.

    Raises AnalysisError for an unknown outcome, a completed run without a value that can be
    compared, results that do not name the same factors, and two different runs of one cell with
    one seed.
    """
    rows = list(results)
    if not rows:
        raise AnalysisError("no results to analyse: launch the study, or give a file with rows")
    factors = tuple(factor for factor, _ in rows[0].levels)
    if len(set(factors)) != len(factors):
        raise AnalysisError(f"a result names a factor twice: {', '.join(factors)}")
    placed = _placed(rows, factors)
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


def _placed(rows: Sequence[Result], factors: tuple[str, ...]) -> dict[tuple[Cell, int], Result]:
    """Each run at its cell and seed."""
    placed: dict[tuple[Cell, int], Result] = {}
    cells: dict[tuple[tuple[str, str], ...], Cell] = {}
    for row in rows:
        _check(row)
        cell = cells.get(row.levels)
        if cell is None:  # once for all seeds: there may be thousands of factors
            _check_names(row, factors)
            named = dict(row.levels)
            cell = cells[row.levels] = tuple(named[factor] for factor in factors)
        before = placed.get((cell, row.seed))
        if before is not None and not (before.trial_id and before.trial_id == row.trial_id):
            raise AnalysisError(
                f"two runs of {dict(zip(factors, cell, strict=True))} with seed {row.seed}: "
                "give each replicate its own seed"
            )
        placed[cell, row.seed] = row
    return placed


def _check_names(row: Result, factors: tuple[str, ...]) -> None:
    names = sorted(dict(row.levels))
    if set(names) != set(factors) or len(row.levels) != len(factors):
        raise AnalysisError(
            f"trial {row.trial_id or row.levels} names the factors {names}, another "
            f"one {sorted(factors)}: every result must give a level to every factor"
        )


def _check(row: Result) -> None:
    if row.outcome not in OUTCOMES:
        raise AnalysisError(
            f"trial {row.trial_id or row.levels}: outcome {row.outcome!r}; "
            f"use one of {', '.join(OUTCOMES)}"
        )
    if row.outcome == "completed" and (row.value is None or not is_score(row.value)):
        raise AnalysisError(
            f"trial {row.trial_id or row.levels}, seed {row.seed}: completed with value "
            f"{row.value!r}; give its final number, or call it diverged"
        )
