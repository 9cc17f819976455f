"""Where runs of a sweep diverge: over which value, or at which level, and how sure that is.

Along a factor with an order the probability of divergence is a step at a threshold, more or less
soft; the threshold's posterior is summed on a grid, against a probability that the factor does not
change. The factor that explains best is taken first; others are asked about what it leaves over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import betaln, expit, logsumexp

from ablate.analysis.axes import Axis, positions
from ablate.analysis.results import FloatArray, Table

_EVIDENCE = np.log(20.0)
"""How much better than chance a factor must explain, "strong" in Kass & Raftery 1995."""
_PLACES = np.linspace(-0.1, 1.1, 241)
_SOFTNESS = np.array([0.003, 0.01, 0.03, 0.1])
"""Width of the step as a share of the axis."""
_LAPSE = 0.01
"""Runs that diverge, or do not, whatever the factor says."""
_LEAST = 2
"""Diverged cells below which nothing is said."""


@dataclass(frozen=True, slots=True)
class Cliff:
    """Divergence that a factor explains."""

    axis: int
    above: bool
    """Runs diverge above the threshold, or below it; of names it means nothing."""
    at: float
    """Median position of the threshold; NaN for names."""
    interval: tuple[float, float]
    """90 %, positions."""
    levels: tuple[tuple[str, int, int], ...]
    """(level, runs that diverged, runs) of names; empty for others."""
    places: FloatArray
    probabilities: FloatArray
    """Of divergence, at the places: positions, or the axis' nodes."""

    def probability(self, x: FloatArray) -> FloatArray:
        """At these positions; 0 where the factor does not count."""
        if self.levels:
            index = np.clip(np.nan_to_num(x), 0, len(self.probabilities) - 1).astype(int)
            found = self.probabilities[index]
        else:
            found = np.interp(np.nan_to_num(x), self.places, self.probabilities)
        return np.where(np.isnan(x), 0.0, found)


def cliffs(table: Table, axes: Sequence[Axis]) -> tuple[Cliff, ...]:
    """What explains the diverged runs, the best explanation first; none if nothing does."""
    diverged = (table.outcomes == "diverged").sum(axis=1).astype(float)
    ran = diverged + (table.outcomes == "completed").sum(axis=1)
    x = positions(axes, table.cells)
    left = ran > 0
    found: list[Cliff] = []
    while (diverged[left] > 0).sum() >= _LEAST and (diverged[left] == 0).any():
        asked = [i for i in range(len(axes)) if i not in {cliff.axis for cliff in found}]
        explained = [
            (evidence, cliff)
            for i in asked
            if (made := _explain(i, axes[i], x[:, i], diverged, ran, left)) is not None
            for evidence, cliff in [made]
        ]
        if not explained:
            break
        evidence, best = max(explained, key=lambda item: item[0])
        if evidence < _EVIDENCE:
            break
        found.append(best)
        # Beyond the threshold nothing more can be learnt about other factors.
        left = left & (best.probability(x[:, best.axis]) < 0.5)
    return tuple(found)


def _explain(
    index: int, axis: Axis, x: FloatArray, diverged: FloatArray, ran: FloatArray, left: FloatArray
) -> tuple[float, Cliff] | None:
    rows = left.astype(bool) & ~np.isnan(x)
    x, k, n = x[rows], diverged[rows], ran[rows]
    if not k.sum() or k.sum() == n.sum():
        return None
    # Seeds of a cell diverge together, so that a cell says as much as one run.
    share = k / n
    null = _log_beta(share.sum(), len(share))
    if not axis.is_smooth:
        counts = [(int(k[x == i].sum()), int(n[x == i].sum())) for i in range(len(axis.levels))]
        evidence = sum(_log_beta(share[x == i].sum(), (x == i).sum()) for i in axis.nodes) - null
        rates = np.array([(a + 0.5) / (b + 1.0) for a, b in counts])
        levels = tuple((name, *pair) for name, pair in zip(axis.levels, counts, strict=True))
        nan = (float("nan"), float("nan"))
        return evidence, Cliff(index, True, nan[0], nan, levels, axis.nodes, rates)
    signs = np.array([1.0, -1.0])
    # [sign, softness, threshold, cell]
    step = expit(
        signs[:, None, None, None]
        * (x[None, None, None, :] - _PLACES[None, None, :, None])
        / _SOFTNESS[None, :, None, None]
    )
    p = _LAPSE + (1 - 2 * _LAPSE) * step
    likelihood = (share * np.log(p) + (1 - share) * np.log1p(-p)).sum(axis=-1)
    evidence = float(logsumexp(likelihood) - np.log(likelihood.size)) - null
    weights = np.exp(likelihood - logsumexp(likelihood))
    above = bool(weights[0].sum() >= weights[1].sum())
    side = weights[0 if above else 1]
    side = side / side.sum()
    below = np.cumsum(side.sum(axis=0))
    low, at, high = (float(np.interp(q, below, _PLACES)) for q in (0.05, 0.5, 0.95))
    places = np.linspace(-0.5, 1.5, 201)
    steps = expit(
        (1.0 if above else -1.0)
        * (places[None, None, :] - _PLACES[None, :, None])
        / _SOFTNESS[:, None, None]
    )
    curve = np.einsum("st,stp->p", side, steps)
    return evidence, Cliff(index, above, at, (low, high), (), places, curve)


def _log_beta(k: float, n: float) -> float:
    """Log probability of k of n under a rate of which nothing is known."""
    return float(betaln(k + 1, n - k + 1))
