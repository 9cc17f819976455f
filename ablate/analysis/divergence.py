"""Divergence as an outcome: how often, against what, and the score that counts every run.

Averaging only the runs that survived rewards a setting for killing its weak runs. So a contrast
in which any run diverged is read in three lines: the divergence rates, the composite score (a
diverged run scores chance; worst-rank idea of Lachin 1999, "Worst-rank score analysis"), and the
survivors' difference, labelled as such.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from math import comb

import numpy as np
import numpy.typing as npt
import scipy

from ablate.analysis.results import Cell, FloatArray, Table

EXACT_LIMIT = 20_000
"""Up to this many label assignments the permutation test enumerates them all."""


@dataclass(frozen=True, slots=True)
class Divergence:
    """Diverged runs of a level and of what it is compared with."""

    level: tuple[int, int]
    """(diverged, runs that completed or diverged)"""
    reference: tuple[int, int]
    level_rate_ci: tuple[float, float]
    """95 % Clopper-Pearson interval of the level's divergence rate."""
    reference_rate_ci: tuple[float, float]
    fisher_p: float
    """Level against the reference alone."""
    higher: float
    """Probability that the level's rate is the higher one, both rates uniform beforehand."""
    pooled_p: float | None
    """The arm that diverged against the other arm and every cell without a diverged run; None
    unless exactly one of the two arms diverged."""
    composite_delta: float | None
    """Mean difference with diverged runs scored at chance; None when chance is not known, and
    when no run diverged."""
    composite_p: float | None
    """Permutation test of the composite score, level against reference."""
    composite_better: bool | None
    """Whether the level's composite score is the better one; None when equal or not formed."""

    @property
    def any(self) -> bool:
        return self.level[0] + self.reference[0] > 0


def clopper_pearson(k: int, n: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Exact interval of a proportion; (0, 1) when nothing was observed."""
    if n == 0:
        return 0.0, 1.0
    tail = (1 - confidence) / 2
    low = 0.0 if k == 0 else float(scipy.special.betaincinv(k, n - k + 1, tail))
    high = 1.0 if k == n else float(scipy.special.betainccinv(k + 1, n - k, tail))
    return low, high


def fisher(level: tuple[int, int], reference: tuple[int, int]) -> float:
    """Two-sided exact p of equal rates; 1 when an arm has no run."""
    if level[1] == 0 or reference[1] == 0:
        return 1.0
    counts = np.array([[k, n - k] for k, n in (level, reference)])
    return float(scipy.stats.fisher_exact(counts).pvalue)


@lru_cache(maxsize=256)
def higher_rate(level: tuple[int, int], reference: tuple[int, int]) -> float:
    """P(level's rate > reference's) of two Beta(1 + k, 1 + n - k) rates."""
    (k1, n1), (k0, n0) = level, reference
    grid = (np.arange(2000) + 0.5) / 2000
    quantiles = scipy.special.betaincinv(1 + k0, 1 + n0 - k0, grid)
    return float(np.mean(scipy.special.betaincc(1 + k1, 1 + n1 - k1, quantiles)))


def exploding(table: Table, reference: Cell) -> set[tuple[int, str]]:
    """(factor's place, level) of changes with which at least half of the runs diverge, and that
    explain it: Fisher's test against all runs without them is beyond .001."""
    found: set[tuple[int, str]] = set()
    counts = {
        row: (table.count(row, "diverged"), table.count(row, "completed"))
        for row in range(len(table.cells))
    }
    if not any(gone for gone, _ in counts.values()):
        return found
    for place, factor in enumerate(table.factors):
        for level in table.levels(factor):
            if level == reference[place]:
                continue
            mine = [c for row, c in counts.items() if table.cells[row][place] == level]
            rest = [c for row, c in counts.items() if table.cells[row][place] != level]
            gone, ran = sum(g for g, _ in mine), sum(g + c for g, c in mine)
            others, all_others = sum(g for g, _ in rest), sum(g + c for g, c in rest)
            if ran and 2 * gone >= ran and fisher((gone, ran), (others, all_others)) < 0.001:
                found.add((place, level))
    return found


def compare_divergence(
    level: FloatArray,
    reference: FloatArray,
    *,
    stable_runs: int,
    chance: float | None,
    maximize: bool,
) -> Divergence:
    """Compare two arms; NaN in `level` and `reference` (1-d, one entry per run) = diverged.

    `stable_runs`: completed runs of all other cells in which no run diverged. If only one arm
    diverged they join the other arm, as the other cells' runs join in the pooled variance: with
    three seeds the two arms alone can never show that 3 of 3 against 0 of 3 is real.
    """
    k1, n1 = int(np.isnan(level).sum()), len(level)
    k0, n0 = int(np.isnan(reference).sum()), len(reference)
    pooled = None
    if k1 and not k0 and n0:
        pooled = fisher((k1, n1), (0, n0 + stable_runs))
    elif k0 and not k1 and n1:
        pooled = fisher((0, n1 + stable_runs), (k0, n0))
    delta, p, better = None, None, None
    if n1 and n0 and k1 + k0:
        one, zero = _score(level, reference, chance, maximize)
        p = permutation_p(one, zero)
        gain = float(one.mean() - zero.mean()) * (1 if maximize else -1)
        better = gain > 0 if gain else None
        if chance is not None:
            delta = float(one.mean() - zero.mean())
    return Divergence(
        level=(k1, n1),
        reference=(k0, n0),
        level_rate_ci=clopper_pearson(k1, n1),
        reference_rate_ci=clopper_pearson(k0, n0),
        fisher_p=fisher((k1, n1), (k0, n0)),
        higher=higher_rate((k1, n1), (k0, n0)),
        pooled_p=pooled,
        composite_delta=delta,
        composite_p=p,
        composite_better=better,
    )


def _score(
    level: FloatArray, reference: FloatArray, chance: float | None, maximize: bool
) -> tuple[FloatArray, FloatArray]:
    """Scores of both arms with diverged runs at chance, or far below the worst survivor."""
    if chance is None:
        alive = np.concatenate([level, reference])
        alive = alive[~np.isnan(alive)]
        if len(alive) == 0:
            chance = 0.0
        else:
            # The distance only has to exceed any sum of survivors' differences.
            gap = 1.0 + float(np.ptp(alive)) * (len(level) + len(reference))
            chance = float(alive.min() - gap if maximize else alive.max() + gap)
    return (
        np.where(np.isnan(level), chance, level),
        np.where(np.isnan(reference), chance, reference),
    )


def permutation_p(one: FloatArray, zero: FloatArray, *, draws: int = 20_000) -> float:
    """Two-sided permutation p of equal means, exact up to EXACT_LIMIT assignments.

    Unpaired on purpose: flipping signs within n pairs cannot go below 2/2^n (0.06 at n = 5),
    exchanging labels reaches 2/C(2n, n) (0.008); a positive correlation within pairs only makes
    it cautious.
    """
    values = np.concatenate([one, zero])
    n1, n = len(one), len(values)
    observed = abs(float(one.mean() - zero.mean()))
    total = values.sum()
    slack = 1e-12 * (1 + float(np.abs(values).max()))
    if comb(n, n1) <= EXACT_LIMIT:
        sums = values[_assignments(n, n1)].sum(axis=1)
        extreme = np.abs(sums / n1 - (total - sums) / (n - n1)) >= observed - slack
        return float(extreme.mean())
    generator = np.random.default_rng(20)
    sums = np.array([generator.permutation(values)[:n1].sum() for _ in range(draws)])
    extreme = np.abs(sums / n1 - (total - sums) / (n - n1)) >= observed - slack
    return float((extreme.sum() + 1) / (draws + 1))


@lru_cache(maxsize=32)
def _assignments(n: int, n1: int) -> npt.NDArray[np.intp]:
    """All choices of n1 out of n: [choice, place]."""
    return np.array(list(combinations(range(n), n1)), dtype=np.intp)


def to_blame(table: Table, reference: Cell) -> set[tuple[int, str]]:
    """(factor's place, level) of the changes to which diverged runs are put down.

    A change that diverged where nothing else was changed, or in every cell that has it and any
    runs; what is left unexplained is put down to all changes of its cell.
    """
    gone: dict[Cell, bool] = {
        cell: table.count(row, "diverged") > 0
        for row, cell in enumerate(table.cells)
        if table.count(row, "diverged") + table.count(row, "completed")
    }
    changes = {
        cell: {(i, level) for i, level in enumerate(cell) if level != reference[i]} for cell in gone
    }
    every = set().union(*changes.values())
    blamed = {
        change
        for change in every
        if any(gone[cell] and changes[cell] == {change} for cell in gone)
        or all(gone[cell] for cell in gone if change in changes[cell])
    }
    if gone.get(reference):
        return blamed  # the baseline diverges by itself, so a change need not be to blame
    for cell, lost in gone.items():
        if lost and not changes[cell] & blamed:
            blamed |= changes[cell]
    return blamed
