"""Does a cheaper rung of a study give the verdicts of the whole? Agreement, with intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import scipy

from ablate.analysis.answer import Contrast
from ablate.analysis.verdict import INCONCLUSIVE

Verdicts = Mapping[tuple[str, str], Contrast]
"""Contrasts by (factor, level)."""

ENOUGH = 0.9
"""Share of the whole study's verdicts that a rung must give to stand for it."""
_LEAST_RANKED = 5
"""Levels below which a rank correlation has no interval."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """A rung against the whole study, over the comparisons that the whole study decides."""

    same: int
    of: int
    against: int
    """Comparisons in which the rung shows a difference the other way."""
    interval: tuple[float, float] | None
    """Of the share of equal verdicts (Clopper and Pearson, 95 %); None without any."""
    tau: float | None
    """Kendall's rank correlation of the differences of all levels that both have."""
    tau_interval: tuple[float, float] | None
    """95 %, by Fieller, Hartley and Pearson (1957); None below five levels."""

    @property
    def share(self) -> float:
        return self.same / self.of if self.of else 0.0

    @property
    def stands_for_it(self) -> bool:
        """Whether the verdicts are the same in nine of ten, and none is the opposite."""
        return self.of > 0 and self.share >= ENOUGH and not self.against


def agree(whole: Verdicts, rung: Verdicts) -> Agreement:
    """How far a rung's verdicts are those of the whole study."""
    shared = [key for key in whole if key in rung]
    decided = [key for key in whole if whole[key].verdict != INCONCLUSIVE]
    same = sum(key in rung and _says(rung[key]) == _says(whole[key]) for key in decided)
    against = sum(
        key in rung and {whole[key].direction, rung[key].direction} == {"better", "worse"}
        for key in decided
    )
    pairs = [
        (a, b)
        for key in shared
        if (a := whole[key].delta) is not None and (b := rung[key].delta) is not None
    ]
    tau = _rank_agreement(pairs)
    return Agreement(
        same=same,
        of=len(decided),
        against=against,
        interval=_share_interval(same, len(decided)),
        tau=tau,
        tau_interval=_rank_interval(tau, len(pairs)),
    )


def _says(contrast: Contrast) -> str:
    """What a reader takes away: better, worse, no difference that matters, or open."""
    if contrast.verdict == INCONCLUSIVE:
        return "open"
    return (contrast.direction or "same") if contrast.verdict == "MATTERS" else "same"


def _rank_agreement(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Kendall's tau; None of fewer than two pairs, and of ties alone."""
    if len(pairs) < 2:
        return None
    tau = float(scipy.stats.kendalltau(*zip(*pairs, strict=True)).statistic)
    return None if math.isnan(tau) else tau


def _share_interval(hits: int, number: int) -> tuple[float, float] | None:
    if not number:
        return None
    found = scipy.stats.binomtest(hits, number).proportion_ci(0.95, method="exact")
    return float(found.low), float(found.high)


def _rank_interval(tau: float | None, number: int) -> tuple[float, float] | None:
    if tau is None or number < _LEAST_RANKED:
        return None
    reach = 1.96 * math.sqrt(0.437 / (number - 4))
    z = math.atanh(max(-1 + 1e-9, min(1 - 1e-9, tau)))
    return math.tanh(z - reach), math.tanh(z + reach)
