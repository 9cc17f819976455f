"""The answer of a sweep: what to use, what could still be gained, what moved the score, and where.

Everything rests on the posterior of :mod:`response` and the cliffs of :mod:`cliff`; the best
observed score by itself is no answer, for the best of many noisy numbers is too good. How good the
answers are is measured in tests/calibration/test_sweeps.py.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
import scipy

from ablate.analysis.axes import Axis, positions
from ablate.analysis.cliff import Cliff, cliffs
from ablate.analysis.response import Response, fit
from ablate.analysis.results import Cell, FloatArray, Objective, Table
from ablate.analysis.threads import one_thread

MOVED, NOTHING, OPEN = "moved", "nothing", "open"
"""What a factor did: more than the margin, less than the margin, or not known yet."""

_SURE = 0.975
"""Probability from which something is claimed."""
_SPACE = 7
"""Log2 of the settings drawn over the whole space, of which the best that is left is asked."""
_NEAR, _BEST = 24, 5
"""Settings drawn around each of the best cells."""
_MOST_SEEN = 120
"""Of the cells that have run, those whose scores are drawn jointly: the best by their posterior."""
_RISK = 0.2
"""Probability of divergence from which a setting is never proposed."""
_CONFIRMED = 8
"""Settings listed to be confirmed; whoever runs them takes as many as are worth it."""
_CHANCE = 0.1
"""Of being better than the first, below which a setting is not confirmed: where nothing alike has
run, a setting that is poor by its mean has a tail beyond all others."""
_HAIR = 0.1
"""Part of the margin below which a believed gain is no reason to leave the baseline."""
_COARSE = 9
"""Places of a range in the picture of a pair."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A posterior mean with its 95 % interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Use:
    """A cell that has run, and what is believed of it."""

    cell: Cell
    score: Estimate
    gain: Estimate | None
    """Over the baseline; positive is better. None for the baseline, or when it has no score."""
    runs: int


@dataclass(frozen=True, slots=True)
class Effect:
    """What one factor does, averaged over the others."""

    axis: Axis
    verdict: str
    """MOVED | NOTHING | OPEN."""
    span: Estimate
    """Between its best and its worst place, in the score's unit."""
    nodes: FloatArray
    """Positions."""
    mean: FloatArray
    """Score at the nodes, the others averaged."""
    low: FloatArray
    """90 % band."""
    high: FloatArray
    good: tuple[bool, ...]
    """Nodes within the margin of the best, by the mean."""
    points: tuple[tuple[float, float], ...]
    """(position, score with what the other factors did taken out) of each cell."""
    best: int
    """Place of the best node."""
    worst: int


@dataclass(frozen=True, slots=True)
class Pair:
    """Two factors of which the effect of one depends on the other."""

    axes: tuple[Axis, Axis]
    is_shown: bool
    """The dependence is more than the margin."""
    size: Estimate
    """Of what the one changes between two places of the other: a difference of differences."""
    at: tuple[tuple[str, str], tuple[str, str]]
    """The two levels of each between which it is largest."""
    nodes: tuple[FloatArray, FloatArray]
    surface: FloatArray
    """Mean score over both, the others averaged: [first, second]."""


@dataclass(frozen=True, slots=True)
class Proposal:
    """What to run next."""

    cell: Cell
    improvement: float
    """By which it is expected to beat what is used now, counting only the gains."""
    is_new: bool
    """A setting that has not run; else a replicate of one that has."""


@dataclass(frozen=True, slots=True)
class Answer:
    """Of a sweep; :mod:`ablate.report.sweep` puts it into words."""

    use: Use | None
    """None while no cell has completed without divergence."""
    ranking: tuple[Use, ...]
    """The best cells by their posterior, the one to use first."""
    left: Estimate | None
    """What the best setting of the space would gain over the one to use; None where unknown."""
    effects: tuple[Effect, ...]
    """Largest span first; empty when there is no model."""
    pair: Pair | None
    """The strongest pair."""
    cliffs: tuple[Cliff, ...]
    confirm: tuple[Cell, ...]
    """To be run on fresh seeds, new settings among them: first the one to use, then always the one
    that adds most to the expected best of those listed."""
    next: tuple[Proposal, ...]
    axes: tuple[Axis, ...]
    noise: float | None
    """sd of one run beyond what its seed shares."""
    completed: int
    """Cells with a completed run."""
    diverged: int
    """Cells with a diverged run."""
    pruned: int
    """Cells that were ended early; they take no part."""
    why_no_model: str
    """Empty when there is one."""


@one_thread()
def answer(
    table: Table,
    axes: Sequence[Axis],
    reference: Cell,
    objective: Objective,
    *,
    may_use: Callable[[Cell], bool] = lambda cell: True,
    seed: int = 0,
) -> Answer:
    """What the finished cells of a sweep say; what one may not use (`may_use`) is
    neither handed out nor proposed."""
    steep = cliffs(table, axes)
    response = fit(table, axes, seed=seed)
    tally = (
        int((~np.isnan(table.values)).any(axis=1).sum()),
        int((table.outcomes == "diverged").any(axis=1).sum()),
        int((table.outcomes == "pruned").any(axis=1).sum()),
    )
    eligible = [
        cell
        for row, cell in enumerate(table.cells)
        if may_use(cell) and set(table.outcomes[row]) <= {"completed", ""}
    ]
    if response is None:
        found = _observed(table, eligible, reference, objective)
        why = _why_no_model(table)
        return Answer(
            found, (found,) if found else (), None, (), None, steep, (), (), tuple(axes), None,
            *tally, why,
        )  # fmt: skip
    rng = np.random.default_rng([seed, 1, len(table.cells)])
    look = _look(response, eligible, reference, objective, steep, rng, table, may_use)
    return Answer(
        look[0][0] if look[0] else None,
        look[0],
        look[1],
        _effects(response, objective, steep, rng),
        _pair(response, objective, rng),
        steep,
        look[3],
        look[2],
        tuple(axes),
        response.noise,
        *tally,
        "",
    )


def _why_no_model(table: Table) -> str:
    scores = table.values[~np.isnan(table.values)]
    if not len(scores):
        return "no cell has a completed run"
    cells = int((~np.isnan(table.values)).any(axis=1).sum())
    if cells < 4:
        return f"{cells} of the cells have a completed run, and a model needs four"
    return "every cell scores the same, so no setting can be told from another"


def _observed(
    table: Table, eligible: Sequence[Cell], reference: Cell, objective: Objective
) -> Use | None:
    """The best mean, where nothing better can be had: its interval is not known."""
    means = {
        cell: float(np.nanmean(table.values[table.cells.index(cell)]))
        for cell in eligible
        if not np.isnan(table.values[table.cells.index(cell)]).all()
    }
    if not means:
        return None
    first = max(means, key=lambda cell: objective.gain(means[cell]))
    if reference in means and means[first] == means[reference]:
        first = reference
    unknown = (-math.inf, math.inf)
    gain = None
    if reference in means and first != reference:
        gain = Estimate(objective.gain(means[first] - means[reference]), *unknown)
    runs = int((~np.isnan(table.values[table.cells.index(first)])).sum())
    return Use(first, Estimate(means[first], *unknown), gain, runs)


def _estimate(samples: FloatArray, level: float = 0.95) -> Estimate:
    low, high = np.quantile(samples, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(float(samples.mean()), float(low), float(high))


# ------------------------------------------------------------------ what to use, what is left


def _look(
    response: Response,
    eligible: Sequence[Cell],
    reference: Cell,
    objective: Objective,
    steep: Sequence[Cliff],
    rng: np.random.Generator,
    table: Table,
    may_use: Callable[[Cell], bool],
) -> tuple[tuple[Use, ...], Estimate | None, tuple[Proposal, ...], tuple[Cell, ...]]:
    """The best cells, what could be gained over the first, what to run to gain it, and what to
    run on fresh seeds."""
    axes = response.axes
    usable = set(eligible)
    seen = [cell for cell in response.cells if cell in usable or cell == reference]
    if not usable & set(seen):
        return (), None, (), ()
    observed = dict(zip(response.cells, objective.gain(1.0) * response.data.y, strict=True))
    seen = sorted(seen, key=lambda c: (c != reference, -observed[c]))[:_MOST_SEEN]
    near = positions(axes, [cell for cell in seen if cell in usable][:_BEST])
    drawn = _not_run(_anywhere(axes, rng, near), axes, reference, steep, set(table.cells), may_use)
    samples = response.sample(np.concatenate([positions(axes, seen), drawn]), rng)
    gains = objective.gain(1.0) * samples
    order = sorted(
        (i for i, cell in enumerate(seen) if cell in usable), key=lambda i: -gains[:, i].mean()
    )
    base = seen.index(reference) if reference in seen else None
    if base in order:
        lead = float((gains[:, order[0]] - gains[:, base]).mean())
        if lead < _HAIR * (objective.margin or 0.0):
            order.sort(key=lambda i: i != base)
    ranking = tuple(_use(i, seen, samples, gains, base, table) for i in order[: _BEST * 2])
    at = order[0]
    over = gains - gains[:, [at]]
    left = _estimate(np.maximum(over[:, [*order, *range(len(seen), len(gains[0]))]].max(1), 0.0))
    improvement = np.maximum(over, 0.0).mean(axis=0)
    proposals = []
    if len(drawn):
        j = len(seen) + int(improvement[len(seen) :].argmax())
        proposals.append(
            Proposal(_cell(axes, drawn[j - len(seen)], reference), float(improvement[j]), True)
        )
    rivals = [i for i in order if i != at]
    if rivals:
        j = max(rivals, key=lambda i: improvement[i])
        proposals.append(Proposal(seen[j], float(improvement[j]), False))
    chance = (over > 0).mean(axis=0)
    rest = [j for j in (*order[1:], *range(len(seen), len(gains[0]))) if chance[j] >= _CHANCE]
    chosen = [
        seen[j] if j < len(seen) else _cell(axes, drawn[j - len(seen)], reference)
        for j in _worth_confirming(gains, [at, *rest])
    ]
    ordered = tuple(sorted(proposals, key=lambda p: -p.improvement))
    return ranking, left, ordered, tuple(dict.fromkeys(chosen))


def _not_run(
    points: FloatArray,
    axes: Sequence[Axis],
    reference: Cell,
    steep: Sequence[Cliff],
    known: Collection[Cell],
    may_use: Callable[[Cell], bool],
) -> FloatArray:
    """Those of the points that are new, before every cliff, and may be used."""
    safe = np.ones(len(points), dtype=bool)
    for cliff in steep:
        safe &= cliff.probability(points[:, cliff.axis]) < _RISK
    cells = [_cell(axes, point, reference) for point in points]
    safe &= [cell not in known and may_use(cell) for cell in cells]
    kept: FloatArray = points[safe]
    return kept


def _worth_confirming(gains: FloatArray, pool: Sequence[int]) -> list[int]:
    """Settings whose best is expected to be highest, added one by one; the first of the pool is in.

    The expected best of a set is submodular, so the greedy set is within 1 - 1/e of the best one.
    """
    chosen = [pool[0]]
    best = gains[:, pool[0]]
    while len(chosen) < min(_CONFIRMED, len(pool)):
        worth = np.maximum(best[:, None], gains[:, pool]).mean(axis=0)
        chosen.append(pool[int(worth.argmax())])
        if chosen[-1] in chosen[:-1]:
            return chosen[:-1]
        best = np.maximum(best, gains[:, chosen[-1]])
    return chosen


def _use(
    i: int,
    seen: Sequence[Cell],
    samples: FloatArray,
    gains: FloatArray,
    base: int | None,
    table: Table,
) -> Use:
    over = None if base is None or base == i else _estimate(gains[:, i] - gains[:, base])
    runs = int((~np.isnan(table.values[table.cells.index(seen[i])])).sum())
    return Use(seen[i], _estimate(samples[:, i]), over, runs)


def _anywhere(axes: Sequence[Axis], rng: np.random.Generator, near: FloatArray) -> FloatArray:
    """Positions over the whole space, and around those given."""
    share = scipy.stats.qmc.Sobol(len(axes), rng=rng).random_base2(_SPACE)
    found = np.empty_like(share)
    for i, axis in enumerate(axes):
        if axis.levels:
            nodes = axis.nodes
            found[:, i] = nodes[np.minimum((share[:, i] * len(nodes)).astype(int), len(nodes) - 1)]
        else:
            found[:, i] = share[:, i]
    around = [found]
    for row in near:
        moved = np.repeat(row[None, :], _NEAR, axis=0)
        for i, axis in enumerate(axes):
            change = rng.random(_NEAR) < 1.5 / len(axes)
            if axis.levels:
                other = axis.nodes[rng.integers(len(axis.nodes), size=_NEAR)]
            else:
                other = np.clip(np.nan_to_num(row[i], nan=0.5) + rng.normal(0, 0.1, _NEAR), 0, 1)
            moved[:, i] = np.where(change | np.isnan(row[i]), other, moved[:, i])
        around.append(moved)
    return _silence(axes, np.concatenate(around))


def _silence(axes: Sequence[Axis], points: FloatArray) -> FloatArray:
    """NaN where a factor does not count at these points."""
    names = {axis.name: i for i, axis in enumerate(axes)}
    for i, axis in enumerate(axes):
        for other, wanted in axis.only_if:
            j = names[other]
            levels = [axes[j].level(p) if not np.isnan(p) else "" for p in points[:, j]]
            points[[level not in wanted for level in levels], i] = np.nan
    return points


def _cell(axes: Sequence[Axis], point: FloatArray, reference: Cell) -> Cell:
    """The levels at a point; where a factor does not count, the baseline's."""
    return tuple(
        usual if np.isnan(p) else axis.level(float(p))
        for axis, p, usual in zip(axes, point, reference, strict=True)
    )


# ------------------------------------------------------------------ what moved the score


def _effects(
    response: Response, objective: Objective, steep: Sequence[Cliff], rng: np.random.Generator
) -> tuple[Effect, ...]:
    overall = response.sample(np.full((1, len(response.axes)), np.nan), rng).mean()
    x = response.data.x
    rest = response.centre + response.unit * response.data.y - response.mean(x)
    found = []
    for i, axis in enumerate(response.axes):
        nodes = axis.nodes
        for cliff in steep:  # of what diverges there is no score
            if cliff.axis == i:
                kept = cliff.probability(nodes) < 0.5
                nodes = nodes[kept] if kept.sum() > 1 else nodes
        samples = response.sample_effect(i, nodes, rng)
        at = x[:, i]
        own = np.interp(at, nodes, samples.mean(axis=0))
        points = tuple(
            (float(p), float(v))
            for p, v in zip(at, overall + own + rest, strict=True)
            if not np.isnan(p)
        )
        found.append(_effect(axis, nodes, samples, float(overall), objective, points))
    return tuple(sorted(found, key=lambda effect: -effect.span.mean))


def _effect(
    axis: Axis,
    nodes: FloatArray,
    samples: FloatArray,
    overall: float,
    objective: Objective,
    points: tuple[tuple[float, float], ...],
) -> Effect:
    margin = objective.margin or 0.0
    sign = objective.gain(1.0)
    mean = samples.mean(axis=0)
    best, worst = int((sign * mean).argmax()), int((sign * mean).argmin())
    span = sign * (samples[:, best] - samples[:, worst])
    widest = np.ptp(samples, axis=1)
    # Best and worst are picked by the same data; shrinkage makes up for it, and the margin.
    if (span > margin).mean() >= _SURE:
        verdict = MOVED
    elif (widest < margin).mean() >= _SURE:
        verdict = NOTHING
    else:
        verdict = OPEN
    low, high = np.quantile(samples, [0.05, 0.95], axis=0)
    return Effect(
        axis=axis,
        verdict=verdict,
        span=_estimate(span),
        nodes=nodes,
        mean=overall + mean,
        low=overall + low,
        high=overall + high,
        good=tuple(bool(g) for g in sign * (mean[best] - mean) <= margin),
        points=points,
        best=best,
        worst=worst,
    )


def _pair(response: Response, objective: Objective, rng: np.random.Generator) -> Pair | None:
    """The pair whose difference of differences is largest for its uncertainty."""
    axes = response.axes
    best: tuple[float, tuple[int, int], tuple[FloatArray, FloatArray], FloatArray] | None = None
    for i, j in itertools.combinations(range(len(axes)), 2):
        nodes = _coarse(axes[i]), _coarse(axes[j])
        grid = np.array(list(itertools.product(*nodes)))
        samples = response.sample_pair((i, j), grid, rng)
        shaped = samples.reshape(-1, len(nodes[0]), len(nodes[1]))
        strength = float(np.square(shaped.mean(axis=0)).mean() / shaped.var(axis=0).mean())
        if best is None or strength > best[0]:
            best = strength, (i, j), nodes, shaped
    if best is None:
        return None
    _, (i, j), nodes, shaped = best
    (a, b), (c, d) = _corners(shaped.mean(axis=0))
    size = shaped[:, a, c] - shaped[:, b, c] - shaped[:, a, d] + shaped[:, b, d]
    size = size * np.sign(size.mean() or 1.0)
    overall = response.sample(np.full((1, len(axes)), np.nan), rng).mean()
    mains = [response.sample_effect(k, nodes[m], rng).mean(axis=0) for m, k in enumerate((i, j))]
    surface = overall + mains[0][:, None] + mains[1][None, :] + shaped.mean(axis=0)
    one, two = axes[i], axes[j]
    return Pair(
        axes=(one, two),
        is_shown=bool((size > (objective.margin or 0.0)).mean() >= _SURE),
        size=_estimate(size),
        at=(
            (one.level(nodes[0][a]), one.level(nodes[0][b])),
            (two.level(nodes[1][c]), two.level(nodes[1][d])),
        ),
        nodes=nodes,
        surface=surface,
    )


def _coarse(axis: Axis) -> FloatArray:
    return axis.nodes if axis.levels else np.linspace(0.0, 1.0, _COARSE)


def _corners(surface: FloatArray) -> tuple[tuple[int, int], tuple[int, int]]:
    """The two rows and two columns with the largest difference of differences."""
    best, found = -1.0, ((0, 0), (0, 0))
    for a, b in itertools.combinations(range(len(surface)), 2):
        change = surface[a] - surface[b]
        c, d = int(change.argmax()), int(change.argmin())
        if change[c] - change[d] > best:
            best, found = float(change[c] - change[d]), ((a, b), (c, d))
    return found
