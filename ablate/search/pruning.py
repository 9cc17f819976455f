"""When a search may end a trial early without fooling itself.

Early scores say how fast a setting learns, not how good it becomes: at a ninth of the schedule a
long warmup looks worst, and plain successive halving throws it away even where it wins at the end.
So a trial is ended at a rung (a fraction of its schedule) only if all of these hold:

- the study is a search; designs that estimate effects are never pruned (their intervals would be
  conditioned on early luck);
- scores are compared at the same fraction of schedules of the same length, never at the same step
  of different lengths, where a decaying learning rate makes mid-values incomparable;
- the rung lies behind every warmup of the space, by a tenth of the schedule at least;
- it is compared within its own level of every factor that is known to change the speed;
- in at least eight complete runs, the order at this rung has foretold the order at the end
  (Kendall's tau at least 0.7, and above 0.5 with 97.5 % confidence by bootstrap);
- one in ten of those that would be ended is run to its end all the same (a canary), and the rule
  switches itself off when the canaries show that it ends winners.

Pruned trials never enter an interval or a mean. No learning curve is ever extrapolated, neither to
end a trial nor to judge one: a curve that has not seen the decay of its learning rate does not hold
the gain that comes with it, so a fit mistakes the schedule for the setting. What a stop-loss by
prediction could save safely, runs that are lost for good, the markers end by what was measured
(divergence, chance level). Costs are forecast from steps, not from scores.

The rule that is restrained here is asynchronous successive halving (Li et al. 2018, "A System for
Massively Parallel Hyperparameter Tuning").
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
import numpy.typing as npt
import scipy

from ablate.errors import PlanError
from ablate.study import EARLIEST_RUNG

_AFTER_WARMUP = 0.1
_COMPLETE_RUNS = 8
_TAU, _TAU_LOW = 0.7, 0.5
_BOOTSTRAPS = 400
_CANARY_SHARE = 0.1
_FALSE_PRUNES = 0.1
"""Share of pruned trials that would have been winners, above which the rule ends itself."""

FloatArray = npt.NDArray[np.float64]
Stratum = tuple[tuple[str, str], ...]
"""Levels of the speed-sensitive factors of a trial."""


class Decision(StrEnum):
    """What to do with a trial at a rung."""

    GO_ON = "go_on"
    PRUNE = "prune"
    CANARY = "canary"
    """Would be pruned, and runs on to show whether that would have been right."""


def earliest_rung(warmup_fractions: Iterable[float]) -> float:
    """Smallest fraction of the schedule at which settings with these warmups may be compared."""
    return max([EARLIEST_RUNG, *(share + _AFTER_WARMUP for share in warmup_fractions)])


def check_rungs(rungs: Sequence[float], warmup_fractions: Iterable[float]) -> None:
    """Refuse rungs at which the comparison would be unfair.

    Raises:
        PlanError: a rung lies outside (0, 1) or too early; says from where on one is allowed.
    """
    shares = list(warmup_fractions)
    first = earliest_rung(shares)
    for rung in rungs:
        if not 0 < rung < 1:
            raise PlanError(f"rung {rung:g} is no fraction of a schedule; give one within (0, 1)")
        if rung < first - 1e-9:
            raise PlanError(
                f"rung {rung:g} is too early: the longest warmup takes "
                f"{max(shares, default=0.0):.0%} of its schedule, a tenth must have followed, and "
                "a quarter be over at least; "
                + (
                    f"the first rung allowed is {first:.2f}"
                    if first < 1
                    else "no rung is left; remove prune, or shorten the warmup"
                )
            )


@dataclass(frozen=True, slots=True)
class Gate:
    """Whether scores at a rung foretell those at the end."""

    num_runs: int
    tau: float
    """Kendall's tau; NaN below two runs."""
    low: float
    """Lower 97.5 % bound by bootstrap over runs."""

    @property
    def open(self) -> bool:
        return self.num_runs >= _COMPLETE_RUNS and self.tau >= _TAU and self.low > _TAU_LOW


def gate(
    early: Sequence[float],
    final: Sequence[float],
    *,
    rng: np.random.Generator,
    strata: Sequence[Stratum] | None = None,
) -> Gate:
    """Judge a rung by complete runs: their scores there, and at the end (same order).

    With `strata` only runs of the same stratum are compared, as the rule itself does.
    """
    pairs = np.array([(a, b) for a, b in zip(early, final, strict=True)], dtype=float)
    pairs = pairs.reshape(-1, 2)
    known = np.isfinite(pairs).all(axis=1)
    pairs = pairs[known]
    numbers = np.unique([str(s) for s in strata], return_inverse=True)[1] if strata else known * 0
    same = np.equal.outer(numbers[known], numbers[known])
    if len(pairs) < _COMPLETE_RUNS:
        return Gate(len(pairs), math.nan, math.nan)
    counts = rng.multinomial(
        len(pairs), np.full(len(pairs), 1 / len(pairs)), size=_BOOTSTRAPS
    ).astype(float)
    draws = _taus(pairs, counts, same)
    tau = float(_taus(pairs, np.ones((1, len(pairs))), same)[0])
    return Gate(len(pairs), tau, float(np.quantile(draws, 0.025)))


def _taus(pairs: FloatArray, counts: FloatArray, same: npt.NDArray[np.bool_]) -> FloatArray:
    """Kendall's tau-b of samples [sample, run] that hold each run `counts` times; 0 if constant.

    The pairs of runs that are in the `same` stratum are compared once, and every sample only
    weighs them.
    """
    early, final = (np.sign(np.subtract.outer(column, column)) * same for column in pairs.T)

    def weigh(compared: FloatArray) -> FloatArray:
        weighed: FloatArray = ((counts @ compared) * counts).sum(axis=1)
        return weighed

    scale = np.sqrt(weigh(np.abs(early)) * weigh(np.abs(final)))
    together = weigh(early * final)
    agreement: FloatArray = np.divide(together, scale, out=np.zeros_like(together), where=scale > 0)
    return agreement


@dataclass(frozen=True, slots=True)
class FalsePrunes:
    """What the canaries tell: how often pruning would have ended a winner."""

    num_false: int
    num_canaries: int
    low: float
    high: float
    """95 % Clopper-Pearson interval of the share."""

    @property
    def tolerable(self) -> bool:
        return self.low <= _FALSE_PRUNES


def false_prunes(num_false: int, num_canaries: int) -> FalsePrunes:
    """The share of false prunes with its interval; (0, 1) before the first canary."""
    if num_canaries == 0:
        return FalsePrunes(0, 0, 0.0, 1.0)
    interval = scipy.stats.binomtest(num_false, num_canaries).proportion_ci(0.95, method="exact")
    return FalsePrunes(num_false, num_canaries, float(interval.low), float(interval.high))


@dataclass(slots=True)
class _Course:
    stratum: Stratum
    cell: str
    scores: dict[float, float] = field(default_factory=dict)
    final: float | None = None
    canary: bool = False


class Rungs:
    """The scores of a search's trials at its rungs, and what follows from them.

    `keep` is the share of trials that a rung lets through. Scores are better when larger; negate
    those that are not. All trials have schedules of one length. Everything follows from what was
    reported, so a restarted controller reports again and decides as before.

    Raises:
        PlanError: see :func:`check_rungs`.
    """

    def __init__(
        self,
        rungs: Sequence[float],
        *,
        warmup_fractions: Iterable[float],
        keep: float = 0.5,
        seed: int = 0,
    ) -> None:
        check_rungs(rungs, warmup_fractions)
        if not 0 < keep < 1:
            raise PlanError(f"keep is the share of trials let through, within (0, 1), not {keep:g}")
        self.rungs = tuple(sorted(rungs))
        self.keep = keep
        self._seed = seed
        self._courses: dict[str, _Course] = {}
        self._gates: dict[tuple[float, int], Gate] = {}
        """By rung and number of complete runs: they only ever grow."""

    def report(
        self,
        trial: str,
        stratum: Stratum,
        rung: float,
        score: float,
        *,
        cell: str = "",
        may_end: bool = True,
    ) -> Decision:
        """A trial has reached a rung with this score.

        Seeds of one `cell` are canaries together: ending one would leave the others without a
        mean. A trial that may not be ended counts among those that others are compared with.
        """
        course = self._courses.setdefault(trial, _Course(stratum, cell or trial))
        if not math.isfinite(score):
            # Never compared: it is no number, and enters no threshold.
            return Decision.PRUNE if may_end else Decision.GO_ON
        course.scores[rung] = score
        if course.canary:
            return Decision.CANARY
        if not may_end:
            return Decision.GO_ON
        peers = [
            other.scores[rung]
            for other in self._courses.values()
            if other.stratum == stratum and rung in other.scores
        ]
        if score >= np.quantile(peers, 1 - self.keep):
            return Decision.GO_ON
        if not self.gate(rung).open or not self.false_prunes().tolerable:
            return Decision.GO_ON
        course.canary = self._drawn_as_canary(course.cell)
        return Decision.CANARY if course.canary else Decision.PRUNE

    def recall(
        self,
        trial: str,
        stratum: Stratum,
        rung: float,
        score: float,
        decision: Decision,
        *,
        cell: str,
    ) -> None:
        """Take up what was reported and decided before; nothing is decided anew."""
        course = self._courses.setdefault(trial, _Course(stratum, cell))
        if math.isfinite(score):
            course.scores[rung] = score
        course.canary = course.canary or decision == Decision.CANARY

    def finish(self, trial: str, score: float) -> None:
        """A trial has run to its end."""
        if trial in self._courses and math.isfinite(score):
            self._courses[trial].final = score

    def gate(self, rung: float) -> Gate:
        """Whether this rung may be used, by the trials that ended so far."""
        ended = [
            (course.scores[rung], course.final, course.stratum)
            for course in self._courses.values()
            if course.final is not None and rung in course.scores
        ]
        if (rung, len(ended)) not in self._gates:
            self._gates[rung, len(ended)] = gate(
                [early for early, _, _ in ended],
                [final for _, final, _ in ended],
                rng=np.random.default_rng([self._seed, len(ended)]),
                strata=[stratum for _, _, stratum in ended],
            )
        return self._gates[rung, len(ended)]

    def false_prunes(self) -> FalsePrunes:
        """Canaries that ended among the best `keep` of their stratum's complete runs."""
        ended = [course for course in self._courses.values() if course.final is not None]
        canaries = [course for course in ended if course.canary]
        winners = 0
        for course in canaries:
            finals = [other.final for other in ended if other.stratum == course.stratum]
            assert course.final is not None
            winners += course.final >= float(np.quantile(np.array(finals), 1 - self.keep))
        return false_prunes(winners, len(canaries))

    def _drawn_as_canary(self, cell: str) -> bool:
        """One in ten, drawn from the cell's name, so that its seeds and a restart draw the same."""
        digest = hashlib.sha256(f"{self._seed}/{cell}".encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64 < _CANARY_SHARE
