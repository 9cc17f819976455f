"""Which cell comes next: a sampler in memory, which sees what has ended and what is running."""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

from ablate.analysis.threads import one_thread
from ablate.errors import PlanError
from ablate.search.cells import Entry
from ablate.search.space import directions_of, state_of
from ablate.study import Search, Study
from ablate.trial.identity import Levels

_MOST_PROPOSALS = 16
"""Proposals of a sampler that may repeat a known cell before the nearest new one is taken."""

_MOST_FITS = 4
"""The same of a Gaussian process."""

_MOVES = 64
"""So many steps lie between a hundredth of a range and all of it; as many draws are from all."""

_SIGNIFICANT_DIGITS = 4
"""Of values drawn from a range: enough for any setting, and short enough to read."""


def sampler_of(study: Study, space: Mapping[str, BaseDistribution]) -> Sampler:
    """The sampler that the study asks for; a random one where its design lists the cells.

    Raises:
        PlanError: Optuna refuses the sampler's options.
    """
    design = study.design
    name, seed, options = "random", 0, {}
    if isinstance(design, Search):
        name, seed, options = design.sampler, design.sampler_seed, design.options
    sampler = Sampler(name, seed, dict(options), dict(space), directions_of(study))
    if name != "grid":
        sampler.make(seed)  # wrong values of options are refused now, not in the middle of a search
    return sampler


class Sampler:
    """Proposes parameters from what it was shown; lives in memory alone."""

    def __init__(
        self,
        name: str,
        seed: int,
        options: dict[str, Any],
        space: dict[str, BaseDistribution],
        directions: Sequence[str],
    ) -> None:
        self.seed = seed
        self._name = name
        self._options = options
        self._space = space
        self._directions = directions
        self._shown: dict[Levels, tuple[dict[str, Any], Entry]] = {}
        self._learnt: list[tuple[dict[str, Any], Entry]] = []
        self._study: optuna.Study | None = None
        self._numbers: dict[Levels, int] = {}
        self._grid: list[dict[str, Any]] | None = None

    @property
    def takes_all(self) -> bool:
        """Whether cells are shown with the factors too that do not count in them: Optuna's GP
        draws by lot what is not a parameter of every cell."""
        return self._name == "gp"

    def enter(self, levels: Levels, params: dict[str, Any], entry: Entry) -> None:
        """Show a cell: running, or ended."""
        before = self._shown.get(levels)
        self._shown[levels] = (params, entry)
        if self._study is None:
            return
        if before is None:
            self._add(levels, params, entry)
        elif before[1].ended is not None or (
            entry.ended is not None and (entry.course or self._name == "gp")
        ):
            # Neither a finished trial, a rung's score nor another worst score can be told later:
            # begin anew when asked.
            self._study = None
        elif entry.ended is not None:
            state, values = state_of(entry.ended, len(self._directions))
            self._study.tell(self._numbers[levels], values, state)

    def learn(self, params: dict[str, Any], entry: Entry) -> None:
        """Show a result from elsewhere."""
        self._learnt.append((params, entry))
        self._study = None

    def patience(self, *, known: int) -> int | None:
        """How many proposals to look at for a new cell; None for all of them."""
        if self._name == "grid":
            return None
        if self._name == "gp":  # each is a fit of its own, and mostly the same
            return _MOST_FITS
        # A fixed sequence begins anew after a restart, and passes over what is known already.
        return _MOST_PROPOSALS + (4 * known if self._name == "qmc" else 0)

    def proposals(self, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
        """Parameters to try next, the sampler's choice first; they may repeat known ones."""
        if self._name == "grid":
            yield from self._in_grid_order()
            return
        study = self._study or self._restore()
        if self._name == "qmc":  # one sequence for the whole search; known points are passed over
            study.sampler = self.make(self.seed)
        else:
            study.sampler = self.make(int(rng.integers(2**31)))
        while True:
            asked = self._ask(study)
            study.tell(asked, state=TrialState.FAIL)  # only a draft; failed trials teach nothing
            yield {name: _rounded(value, self._space[name]) for name, value in asked.params.items()}

    def _ask(self, study: optuna.Study) -> optuna.Trial:
        with one_thread() if self._name == "gp" else contextlib.nullcontext():
            return study.ask(self._space)

    def around(
        self, params: Mapping[str, Any], rng: np.random.Generator
    ) -> Iterator[dict[str, Any]]:
        """Parameters ever farther from these: values of ranges move, choices stay."""
        ranges = {
            name: distribution
            for name, distribution in self._space.items()
            if isinstance(distribution, (FloatDistribution, IntDistribution)) and name in params
        }
        for reach in (*np.geomspace(0.01, 1, _MOVES), *np.ones(_MOVES)) if ranges else ():
            yield {
                **params,
                **{
                    name: _rounded(_drawn(params[name], distribution, reach, rng), distribution)
                    for name, distribution in ranges.items()
                },
            }

    def make(self, seed: int) -> optuna.samplers.BaseSampler:
        """A sampler of this kind.

        Raises:
            PlanError: Optuna refuses the options.
        """
        kinds: dict[str, Any] = {
            "tpe": optuna.samplers.TPESampler,
            "gp": optuna.samplers.GPSampler,
            "qmc": optuna.samplers.QMCSampler,
            "random": optuna.samplers.RandomSampler,
        }
        options = dict(self._options)
        if self._name == "tpe":
            options.setdefault("constant_liar", True)
        if self._name == "qmc":
            options = {"scramble": True, "warn_independent_sampling": False, **options}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                sampler: optuna.samplers.BaseSampler = kinds[self._name](seed=seed, **options)
        except (TypeError, ValueError) as error:
            raise PlanError(f"sampler {self._name} with {options}: {error}") from error
        return sampler

    def _in_grid_order(self) -> Iterator[dict[str, Any]]:
        if self._grid is None:
            choices = [
                getattr(distribution, "choices", ()) for distribution in self._space.values()
            ]
            self._grid = [
                dict(zip(self._space, values, strict=True))
                for values in itertools.product(*choices)
            ]
            np.random.default_rng(self.seed).shuffle(self._grid)
        yield from (params for params in self._grid)

    def _restore(self) -> optuna.Study:
        self._study = study = optuna.create_study(directions=list(self._directions))
        self._numbers = {}
        worst = self._worst() if self._name == "gp" else []
        for params, entry in self._learnt:
            study.add_trial(self._trial(params, entry, worst))
        for levels, (params, entry) in self._shown.items():
            self._add(levels, params, entry, worst)
        return study

    def _add(
        self, levels: Levels, params: dict[str, Any], entry: Entry, worst: Sequence[float] = ()
    ) -> None:
        assert self._study is not None
        self._numbers[levels] = len(self._study.get_trials(deepcopy=False))
        self._study.add_trial(self._trial(params, entry, worst))

    def _trial(
        self, params: dict[str, Any], entry: Entry, worst: Sequence[float]
    ) -> optuna.trial.FrozenTrial:
        """`worst` is told of a cell that was pruned or does not fit, where there is one."""
        state, values = TrialState.RUNNING, None
        if entry.ended is not None:
            state, values = state_of(entry.ended, len(self._directions))
        if state == TrialState.PRUNED and worst:
            # Optuna's GP is fitted to complete trials alone, so it would ask for what does not fit
            # the memory again and again: 30 of 40 cells, where TPE asks for 13.
            state, values = TrialState.COMPLETE, list(worst)
        return optuna.trial.create_trial(
            state=state,
            params=params,
            distributions={name: self._space[name] for name in params},
            values=values,
            intermediate_values=dict(entry.course) if entry.ended is not None else {},
        )

    def _worst(self) -> list[float]:
        """The worst value of each objective so far; empty without a completed cell."""
        entries = [entry for _, entry in (*self._learnt, *self._shown.values())]
        told = [state_of(each.ended, len(self._directions))[1] for each in entries if each.ended]
        columns = zip(*(values for values in told if values is not None), strict=True)
        return [
            min(column) if direction == "maximize" else max(column)
            for column, direction in zip(columns, self._directions, strict=False)
        ]


def _drawn(
    value: float,
    distribution: FloatDistribution | IntDistribution,
    reach: float,
    rng: np.random.Generator,
) -> float:
    """A value within `reach` of the range's length of this one, uniform on the range's scale."""
    scale: Any = np.log if distribution.log else float
    at, low, high = (float(scale(each)) for each in (value, distribution.low, distribution.high))
    away = reach * (high - low)
    new = rng.uniform(max(low, min(at, high) - away), min(high, max(at, low) + away))
    new = float(np.exp(new)) if distribution.log else new
    return round(new) if isinstance(distribution, IntDistribution) else new


def _rounded(value: Any, distribution: BaseDistribution) -> Any:
    if not isinstance(distribution, FloatDistribution):
        return value
    short = float(f"{value:.{_SIGNIFICANT_DIGITS}g}")
    return min(max(short, distribution.low), distribution.high)
