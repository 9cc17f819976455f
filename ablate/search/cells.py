"""What came of a cell, as the sampler and the storage see it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any, Literal

from ablate.analysis.results import Result, Score
from ablate.trial.identity import Outcome


@dataclass(frozen=True, slots=True)
class Entry:
    """A known cell: running, or ended."""

    ended: Ended | None = None
    """None while the cell is running."""
    source: str | None = None
    """The earlier study that a cell was taken over from."""
    course: Mapping[int, float] = field(default_factory=dict)
    """Score at each rung passed, by percent of the schedule."""

    @property
    def failed(self) -> bool:
        return self.ended is not None and self.ended.state == "failed"


@dataclass(frozen=True, slots=True)
class Ended:
    """What came of a cell, over all its seeds."""

    state: Literal["completed", "pruned", "failed", "infeasible"]
    value: float | None
    """Mean score; finite. Only completed cells have one."""
    cost: float | None
    """Mean cost of completed seeds, where the study weighs one; finite."""
    seeds: Mapping[int, Mapping[str, Any]]
    """Per seed: trial, outcome, score, verdict."""

    @property
    def outcomes(self) -> str:
        """For people: ``completed 2, diverged 1``."""
        names = [seed["outcome"] for seed in self.seeds.values()]
        return ", ".join(f"{name} {names.count(name)}" for name in dict.fromkeys(sorted(names)))

    @property
    def std(self) -> float | None:
        scores = [seed["score"] for seed in self.seeds.values() if seed["score"] is not None]
        return stdev(scores) if len(scores) > 1 else None


def end_of(results: Sequence[Result], score: Score) -> Ended:
    """What came of a cell whose seeds ended with these results."""
    seeds: dict[int, dict[str, Any]] = {}
    for result in sorted(results, key=lambda result: result.seed):
        value = score(result)
        if value is not None and not math.isfinite(value):
            value = None  # no sampler, and no mean, ever sees a non-finite number
        seeds[result.seed] = {
            "trial": result.trial_id,
            "outcome": str(result.outcome),
            "score": value,
            "verdict": result.verdict,
        }
    outcomes = {seed["outcome"] for seed in seeds.values()}
    scores = [seed["score"] for seed in seeds.values() if seed["score"] is not None]
    costs = [r.cost for r in results if r.cost is not None and math.isfinite(r.cost)]
    cost = fmean(costs) if costs else None
    if Outcome.PRUNED in outcomes:
        return Ended("pruned", None, None, seeds)
    if scores:
        return Ended("completed", fmean(scores), cost, seeds)
    return Ended("infeasible" if Outcome.INFEASIBLE in outcomes else "failed", None, None, seeds)
