"""How the score answers to the settings of a sweep: a Gaussian process that is its own ANOVA.

The score is a mean, plus a function of each factor, plus a function of each pair, plus noise. Each
function is a Gaussian process that averages to zero over its factor (Durrande et al. 2013, "ANOVA
kernels and RKHS of zero mean functions"), so that the parts of the posterior are the main effects
and the interactions themselves: nothing has to be averaged out of a black box afterwards.

How strong each part is, how fast it changes and how large the noise is are not fixed at their best
guess, which claims too much in the tens of cells that a sweep here has, but drawn from their
posterior by slice sampling (Neal 2003), with the replicates' own noise taken into account.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.linalg import cho_solve, cholesky, solve_triangular
from scipy.linalg.lapack import dpotrf, dtrtrs

from ablate.analysis.axes import Axis, positions
from ablate.analysis.results import Cell, FloatArray, Table

_BURN, _KEPT, _APART = 30, 25, 3
"""Sweeps of the sampler over all hyperparameters: to forget its start; kept; from one kept to the
next. With 20 in a row, 90 % bands were too narrow by 2 to 4 points of coverage."""
_FEW, _MANY = 8, 400
"""Kept instead beyond so many cells, which make each costly."""
_PART = 150
"""Cells that hyperparameters are drawn from, at most: a random part of them."""
_SAMPLES = 20
"""Functions drawn under each draw of the hyperparameters."""
_MEAN_SD = 2.0
"""Prior of the mean, in standard deviations of the cells' scores."""
_LOWEST, _HIGHEST = math.log(0.003), math.log(8.0)
_SHORTEST, _LONGEST = math.log(0.08), math.log(4.0)


@dataclass(frozen=True, slots=True)
class _Settings:
    """One draw of the hyperparameters, in units of the cells' standard deviation."""

    sds: FloatArray
    """Of each factor's own function."""
    lengths: FloatArray
    """Over which it changes, as a share of the axis; of names it means nothing."""
    pairs: float
    """Variance of a pair's function over the geometric mean of its factors' own."""
    noise: float
    """sd of one run."""
    block: float
    """sd of what all runs of a seed share."""


@dataclass(frozen=True, slots=True)
class _Fitted:
    settings: _Settings
    factor: FloatArray
    """Lower Cholesky factor of the cells' covariance."""
    weights: FloatArray
    """Covariance, inverted, times the centred scores."""


@dataclass(frozen=True, slots=True)
class _Data:
    x: FloatArray
    """[cell, axis]."""
    y: FloatArray
    """Mean of a cell's completed runs, standardised."""
    runs: FloatArray
    """How many these are."""
    shares: FloatArray | None
    """[cell, seed]: part of each seed in a cell's mean; None where all cells have the same."""
    replicate_ss: float
    """Sum of squares within cells and seeds, standardised."""
    replicate_df: int

    def part(self, rows: npt.NDArray[np.int_]) -> _Data:
        shares = None if self.shares is None else self.shares[rows]
        return _Data(
            self.x[rows],
            self.y[rows],
            self.runs[rows],
            shares,
            self.replicate_ss,
            self.replicate_df,
        )


@dataclass(frozen=True, slots=True)
class Response:
    """What is believed of the score everywhere in the space of a sweep."""

    axes: tuple[Axis, ...]
    cells: tuple[Cell, ...]
    """Those that it was fitted to: with a completed run."""
    noise: float
    """sd of one run beyond what its seed shares with others, in the score's unit."""
    centre: float
    unit: float
    data: _Data
    fits: tuple[_Fitted, ...]

    def sample(self, points: FloatArray, rng: np.random.Generator) -> FloatArray:
        """[sample, point]: scores without noise, jointly; `points` are positions [point, axis]."""

        def prior(settings: _Settings, a: FloatArray, b: FloatArray) -> FloatArray:
            return _MEAN_SD**2 + _covariance(self.axes, settings, a, b)

        return self.centre + self.unit * self._sample(prior, points, rng)

    def mean(self, points: FloatArray) -> FloatArray:
        """[point]: scores without noise; `points` are positions [point, axis]."""
        found = [
            (_MEAN_SD**2 + _covariance(self.axes, fit.settings, points, self.data.x)) @ fit.weights
            for fit in self.fits
        ]
        return np.asarray(self.centre + self.unit * np.mean(found, axis=0))

    def sample_effect(self, axis: int, nodes: FloatArray, rng: np.random.Generator) -> FloatArray:
        """[sample, node]: what a factor adds to the mean over all others."""
        points = np.full((len(nodes), len(self.axes)), np.nan)
        points[:, axis] = nodes

        def prior(settings: _Settings, a: FloatArray, b: FloatArray) -> FloatArray:
            gram = _gram(self.axes[axis], a[:, axis], b[:, axis], settings.lengths[axis])
            return np.asarray(settings.sds[axis] ** 2 * gram)

        return self.unit * self._sample(prior, points, rng)

    def sample_pair(
        self, pair: tuple[int, int], points: FloatArray, rng: np.random.Generator
    ) -> FloatArray:
        """[sample, point]: what two factors add beyond their sum; `points` is [point, 2]."""
        wide = np.full((len(points), len(self.axes)), np.nan)
        wide[:, list(pair)] = points

        def prior(settings: _Settings, a: FloatArray, b: FloatArray) -> FloatArray:
            one, two = (
                settings.sds[i] * _gram(self.axes[i], a[:, i], b[:, i], settings.lengths[i])
                for i in pair
            )
            return np.asarray(settings.pairs * one * two)

        return self.unit * self._sample(prior, wide, rng)

    def _sample(
        self,
        prior: Callable[[_Settings, FloatArray, FloatArray], FloatArray],
        points: FloatArray,
        rng: np.random.Generator,
    ) -> FloatArray:
        found = []
        for fit in self.fits:
            cross = prior(fit.settings, points, self.data.x)
            known = solve_triangular(fit.factor, cross.T, lower=True)
            spread = prior(fit.settings, points, points) - known.T @ known
            # A thousandth of the cells' spread, so that rounding leaves the matrix positive.
            root = cholesky(spread + 1e-6 * np.eye(len(points)), lower=True)
            normal = rng.standard_normal((_SAMPLES, len(points)))
            found.append(cross @ fit.weights + normal @ root.T)
        return np.concatenate(found)


def fit(table: Table, axes: Sequence[Axis], *, seed: int = 0) -> Response | None:
    """The response of the cells with a completed run; None below four of them, or if all score
    the same. Diverged and pruned runs take no part: what they score says when they were ended.
    """
    rows = [i for i in range(len(table.cells)) if not np.isnan(table.values[i]).all()]
    x = positions(axes, [table.cells[i] for i in rows])
    values = table.values[rows] if rows else np.empty((0, len(table.seeds)))
    if len(rows) < 4:
        return None
    ran = ~np.isnan(values)
    means = np.nanmean(values, axis=1)
    centre, unit = float(means.mean()), float(means.std(ddof=1))
    if unit <= 1e-12 * max(abs(centre), 1e-300):
        return None
    same = bool((ran == ran[0]).all())
    squares, df = _within(values, ran)
    data = _Data(
        x=x,
        y=(means - centre) / unit,
        runs=ran.sum(axis=1).astype(float),
        shares=None if same else ran / ran.sum(axis=1, keepdims=True),
        replicate_ss=squares / unit**2,
        replicate_df=df,
    )
    rng = np.random.default_rng([seed, len(rows)])
    many = len(rows) > _PART
    part = data.part(rng.choice(len(rows), _PART, replace=False)) if many else data
    drawn = _draw(part, axes, rng, kept=_FEW if len(rows) > _MANY else _KEPT)
    return Response(
        axes=tuple(axes),
        cells=tuple(table.cells[i] for i in rows),
        noise=unit * float(np.mean([settings.noise for settings in drawn])),
        centre=centre,
        unit=unit,
        data=data,
        fits=tuple(_condition(data, axes, settings) for settings in drawn),
    )


def _within(values: FloatArray, ran: FloatArray) -> tuple[float, int]:
    """Sum of squares of runs around cell + seed, and its degrees of freedom; cells with several."""
    several = ran.sum(axis=1) > 1
    rest = np.where(ran, values, 0.0)[several]
    mask = ran[several]
    used = mask.any(axis=0)
    rest, mask = rest[:, used], mask[:, used]
    df = int(mask.sum()) - len(mask) - int(used.sum()) + 1
    if df < 1:
        return 0.0, 0
    for _ in range(60):  # alternating projections: exact at once where no run is missing
        rest = np.where(mask, rest - rest.sum(1, keepdims=True) / mask.sum(1, keepdims=True), 0.0)
        rest = np.where(mask, rest - rest.sum(0) / mask.sum(0), 0.0)
    return float((rest**2).sum()), df


# ------------------------------------------------------------------ covariances


def _kernel(axis: Axis, a: FloatArray, b: FloatArray, length: float) -> FloatArray:
    """Matern 5/2 along an axis; names are alike only to themselves."""
    if not axis.is_smooth:
        return np.asarray((a[:, None] == b[None, :]).astype(float))
    r = np.abs(a[:, None] - b[None, :]) * (math.sqrt(5) / length)
    return np.asarray((1 + r + r * r / 3) * np.exp(-r))


def _gram(axis: Axis, a: FloatArray, b: FloatArray, length: float) -> FloatArray:
    """Covariance of a function that averages to zero over the axis and varies by 1 there."""
    nodes = axis.nodes
    here, there = np.isnan(a), np.isnan(b)
    rows = np.concatenate([np.where(here, 0.0, a), nodes])
    columns = np.concatenate([np.where(there, 0.0, b), nodes])
    full = _kernel(axis, rows, columns, length)
    mine, its = full[:, len(b) :].sum(axis=1) / len(nodes), full[len(a) :].sum(axis=0) / len(nodes)
    own = float(mine[len(a) :].sum()) / len(nodes)
    centred = full[: len(a), : len(b)] - mine[: len(a), None] - its[None, : len(b)] + own
    centred /= max(1.0 - own, 1e-9)
    centred[here], centred[:, there] = 0.0, 0.0
    return np.asarray(centred)


def _combine(settings: _Settings, grams: FloatArray) -> FloatArray:
    """Main effects, and all pairs: the second elementary symmetric polynomial of the factors.

    `grams` is [axis, a, b].
    """
    flat = grams.reshape(len(grams), -1)
    variances = settings.sds**2
    total = settings.sds @ flat
    pairs = total * total - variances @ (flat * flat)
    return np.asarray(variances @ flat + settings.pairs / 2 * pairs).reshape(grams.shape[1:])


def _covariance(
    axes: Sequence[Axis], settings: _Settings, a: FloatArray, b: FloatArray
) -> FloatArray:
    grams = [_gram(axis, a[:, i], b[:, i], settings.lengths[i]) for i, axis in enumerate(axes)]
    return _combine(settings, np.array(grams))


def _noisy(data: _Data, settings: _Settings, signal: FloatArray) -> FloatArray:
    """Covariance of the cells' means: what is believed of them, their seeds, their noise."""
    total = signal + _MEAN_SD**2
    total.flat[:: len(total) + 1] += settings.noise**2 / data.runs + 1e-9
    if data.shares is not None:
        total = total + settings.block**2 * (data.shares @ data.shares.T)
    return np.asarray(total)


def _condition(data: _Data, axes: Sequence[Axis], settings: _Settings) -> _Fitted:
    total = _noisy(data, settings, _covariance(axes, settings, data.x, data.x))
    factor = cholesky(total, lower=True)
    return _Fitted(settings, factor, cho_solve((factor, True), data.y))


# ------------------------------------------------------------------ hyperparameters


def _settings(theta: FloatArray, num_axes: int) -> _Settings:
    values = np.exp(theta)
    pairs, noise, block = values[2 * num_axes :].tolist()
    return _Settings(values[:num_axes], values[num_axes : 2 * num_axes], pairs**2, noise, block)


def _log_prior(theta: FloatArray, num_axes: int) -> float:
    """Strengths decay exponentially, so that a factor may do nothing, but slowly: a sampler that
    stays near the best sees little of what a rate does farther out, and the cells' own spread is
    then a small unit. Lengths are about the axis. In the logarithms that are drawn.
    """
    sds, lengths = theta[:num_axes], theta[num_axes : 2 * num_axes]
    pairs, noise, block = theta[2 * num_axes :].tolist()
    found = float((sds - np.exp(sds)).sum())
    found -= 0.5 / 0.7**2 * float(lengths @ lengths)
    found += float(pairs - math.exp(pairs) / 0.3)
    found -= 0.5 * (noise - math.log(0.3)) ** 2
    return float(found + block - 2.0 * math.exp(block))


def _draw(
    data: _Data, axes: Sequence[Axis], rng: np.random.Generator, *, kept: int
) -> list[_Settings]:
    """Draws of the hyperparameters from their posterior by slice sampling."""
    n = len(axes)
    grams = np.empty((n, len(data.y), len(data.y)))
    made_for = np.full(n, np.nan)

    def log_posterior(theta: FloatArray) -> float:
        settings = _settings(theta, n)
        for i in np.flatnonzero(made_for != settings.lengths):
            grams[i] = _gram(axes[i], data.x[:, i], data.x[:, i], settings.lengths[i])
            made_for[i] = settings.lengths[i]
        factor, failed = dpotrf(_noisy(data, settings, _combine(settings, grams)), lower=True)
        if failed:
            return -math.inf
        rest, _ = dtrtrs(factor, data.y, lower=True)
        found = -0.5 * float(rest @ rest) - float(np.log(np.diag(factor)).sum())
        found -= data.replicate_df * math.log(settings.noise)
        found -= 0.5 * data.replicate_ss / settings.noise**2
        return found + _log_prior(theta, n)

    low = np.r_[np.full(n, _LOWEST), np.full(n, _SHORTEST), math.log(0.01), _LOWEST, _LOWEST]
    high = np.r_[np.full(n, _HIGHEST), np.full(n, _LONGEST), math.log(3.0), _HIGHEST, _HIGHEST]
    free = [i for i in range(n)]
    free += [n + i for i, axis in enumerate(axes) if axis.is_smooth]
    free += [2 * n] if n > 1 else []
    free += [2 * n + 1]
    free += [2 * n + 2] if data.shares is not None else []
    theta = np.r_[np.full(n, math.log(0.4)), np.zeros(n), np.log([0.2, 0.3, 0.3])]
    at = log_posterior(theta)
    found = []
    for sweep in range(_BURN + _APART * kept):
        for i in free:
            theta, at = _slice(log_posterior, theta, at, i, (low[i], high[i]), rng)
        if sweep >= _BURN and (sweep - _BURN) % _APART == _APART - 1:
            found.append(_settings(theta, n))
    return found


def _slice(
    log_density: Callable[[FloatArray], float],
    theta: FloatArray,
    at: float,
    i: int,
    bounds: tuple[float, float],
    rng: np.random.Generator,
    width: float = 1.2,
) -> tuple[FloatArray, float]:
    """One step along coordinate `i` that leaves the density as it is (Neal 2003, figures 3, 5)."""
    level = at + math.log(max(rng.random(), 1e-300))

    def moved(value: float) -> FloatArray:
        other = theta.copy()
        other[i] = value
        return other

    left = max(theta[i] - width * rng.random(), bounds[0])
    right = min(left + width, bounds[1])
    while left > bounds[0] and log_density(moved(left)) > level:
        left = max(left - width, bounds[0])
    while right < bounds[1] and log_density(moved(right)) > level:
        right = min(right + width, bounds[1])
    while True:
        candidate = moved(left + (right - left) * rng.random())
        density = log_density(candidate)
        if density > level or right - left < 1e-6:
            return candidate, density
        if candidate[i] < theta[i]:
            left = candidate[i]
        else:
            right = candidate[i]
