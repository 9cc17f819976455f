"""The only user of optuna: asks it for the cells of a search, and shows it every cell of a study.

A `CellBook` holds the cells of one study: those that are being run and those that have ended. What
it knows comes from the study folder (the controller tells it everything again at each launch), so
nothing is ever read back from Optuna's storage as truth. Two Optuna studies live inside it:

- one in memory, from which the sampler proposes; it sees ended cells by their mean, running cells
  as running (so that parallel proposals keep apart), and no proposal that was turned down;
- one in the storage, an SQLite file or a URL, with one Optuna trial per cell of every design, for
  optuna-dashboard and other readers. Its outage stops nothing and loses nothing.

"Trial" means a cell with one seed everywhere in this project; Optuna's trial is our cell, and the
word with that meaning stays inside this file.
"""

from __future__ import annotations

import itertools
import math
import sqlite3
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

import numpy as np
import optuna
import sqlalchemy
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import TrialState

from ablate.analysis.results import Result
from ablate.errors import AnalysisError, PlanError, TrackingError
from ablate.masking import masked_url
from ablate.study import Factor, Search, Study
from ablate.trial import Cell, Levels, Outcome

optuna.logging.set_verbosity(optuna.logging.WARNING)

Score = Callable[[Result], float | None]

_MOST_PROPOSALS = 16
"""Proposals of a sampler that may repeat a known cell before the nearest new one is taken."""

_MOST_ASKS = 2
"""How often a cell is asked in one launch whose trials all failed or were lost."""

_SIGNIFICANT_DIGITS = 4
"""Of values drawn from a range: enough for any setting, and short enough to read."""

_BUSY_S = 1.0
"""How long one write waits for a locked database, and so holds up the study, at most."""

_LONGEST_PAUSE_S = 60.0
"""Most time between two tries of a storage that is out of order."""


class CellBook:
    """The cells of one study: asked for, running, ended.

    `score` gives the number a trial counts with: its value, chance level if it diverged, None if
    it says nothing about its setting (``design.score_of``). `storage` is a path of an SQLite file
    or a database URL that SQLAlchemy knows. With `fresh` what stands there is written anew.

    Raises:
        PlanError: Optuna refuses the sampler's options.
        TrackingError: the storage's URL can never work (a typo, a missing driver).
    """

    def __init__(
        self,
        study: Study,
        *,
        storage: Path | str,
        score: Score,
        fresh: bool = False,
    ) -> None:
        self._study = study
        self._score = score
        self._space = _space(study)
        self._cells: dict[Levels, _Entry] = {}
        self._courses: dict[Levels, dict[int, float]] = {}
        """Mean score of a cell's seeds so far at each rung, by percent of the schedule."""
        self._experiments: dict[str, Levels] = {}
        """Resolved configuration -> the first cell that has it."""
        self._refused: set[Levels] = set()
        """Combinations that are no experiment of their own: contradictory, or equal to another."""
        self._asks: dict[Levels, int] = {}
        self._sampler = _sampler(study, self._space)
        self._mirror = _Mirror(study, self._space, storage, fresh=fresh)

    @property
    def trouble(self) -> str | None:
        """One line on why the storage is behind, or None; nothing is lost meanwhile."""
        return self._mirror.trouble

    def begin(self, cell: Cell) -> None:
        """Count a cell as running: listed by a design, or asked by an earlier launch.

        Known cells are left as they are.
        """
        if cell.levels in self._cells and not self._cells[cell.levels].failed:
            return
        self._enter(cell.levels, _Entry())
        self._experiments.setdefault(self._experiment(cell.levels) or "", cell.levels)

    def ask(self) -> Cell | None:
        """The next cell of a search, begun; the baseline first. None when all cells are known.

        The sampler decides, seeing all that was told. A cell that is running or has ended is
        never given again, nor one that resolves to the same configuration; a cell whose trials
        all failed or were lost may be, once more. What comes next depends on the cells begun so
        far and their results alone, so a search that was interrupted goes on as if it had not been.
        """
        baseline = self._study.cell({}).levels
        levels = baseline if baseline not in self._cells else self._propose()
        if levels is None:
            return None
        self._asks[levels] = self._asks.get(levels, 0) + 1
        cell = self._study.cell(dict(levels))
        self.begin(cell)
        return cell

    def tell(self, cell: Cell, results: Sequence[Result]) -> None:
        """All seeds of a cell have ended with `results`; telling the same twice changes nothing.

        The cell counts with the mean of its seeds' scores, a diverged seed at chance level. Seeds
        that failed or were lost are left out. A cell with a pruned seed has no mean that could be
        compared, and one whose every seed failed has none at all.
        """
        course = self._courses.get(cell.levels, {})
        entry = _Entry(_ended(results, self._score), course=dict(course))
        if self._cells.get(cell.levels) == entry:
            return
        self.begin(cell)
        self._enter(cell.levels, entry)

    def report(self, cell: Cell, rung: float, score: float) -> None:
        """A running cell scores this at `rung`, a fraction of its schedule, over its seeds so far.

        Samplers rank pruned cells by it, and the storage shows it as an intermediate value.
        """
        if not math.isfinite(score):
            return
        course = self._courses.setdefault(cell.levels, {})
        course[round(100 * rung)] = score
        entry = self._cells.get(cell.levels)
        if entry is not None and entry.ended is None:
            self._enter(cell.levels, _Entry(course=dict(course)))

    def add_earlier(
        self, source: str, cells: Iterable[tuple[Mapping[str, str], Sequence[float]]]
    ) -> int:
        """Teach the sampler cells of an earlier study; how many fitted.

        A cell is its levels and its mean score, followed by its mean cost if the study weighs one.
        They only inform: they are other experiments (another baseline, other data), so none of
        them stands for a cell of this study. A cell fits that names every factor with a level, or
        a value within the range, that this study has.
        """
        count = 0
        for levels, values in cells:
            params = _params(self._space, levels)
            if params is None or not all(map(math.isfinite, values)):
                continue
            if len(values) != len(_directions(self._study)):
                continue
            score, cost = values[0], values[1] if len(values) > 1 else None
            entry = _Entry(Ended("completed", score, cost, {}), source=source)
            self._sampler.learn(params, entry)
            self._mirror.put((("earlier study", source), *sorted(levels.items())), entry, params)
            count += 1
        return count

    def close(self) -> None:
        """Bring the storage up to date if it can be; cells still running stand there as waiting."""
        self._mirror.close()

    # ------------------------------------------------------------------ the cells

    def _enter(self, levels: Levels, entry: _Entry) -> None:
        self._cells[levels] = entry
        params = _params(self._space, dict(levels))
        if params is not None:
            self._sampler.enter(levels, params, entry)
        self._mirror.put(levels, entry, _params(self._space, dict(levels), strict=False))

    def _experiment(self, levels: Levels) -> str | None:
        """What identifies the configuration of these levels; None if they contradict each other."""
        cell = self._study.cell(dict(levels))
        try:
            return self._study.trial(cell, seed=self._study.seeds[0]).id
        except ValueError:  # pydantic's ValidationError is one
            return None

    # ------------------------------------------------------------------ asking

    def _propose(self) -> Levels | None:
        rng = np.random.default_rng([self._sampler.seed, len(self._cells)])
        last: Levels | None = None
        patience = self._sampler.patience(known=len(self._cells))
        for params in itertools.islice(self._sampler.proposals(rng), patience):
            last = self._name(params)
            if self._is_new(last):
                return last
        return self._nearest_new(last, rng)

    def _name(self, params: Mapping[str, Any]) -> Levels:
        return tuple((f.name, _level_name(params[f.name])) for f in self._study.factors)

    def _is_new(self, levels: Levels) -> bool:
        known = self._cells.get(levels)
        if known is not None:
            return known.failed and self._asks.get(levels, 0) < _MOST_ASKS
        if levels in self._refused:
            return False
        experiment = self._experiment(levels)
        if experiment is None or experiment in self._experiments:
            self._refused.add(levels)
            return False
        return True

    def _nearest_new(self, near: Levels | None, rng: np.random.Generator) -> Levels | None:
        """A new cell that differs from `near` in as few factors as possible; ties by lot.

        The sampler keeps coming back to `near`, so its neighbours are the promising ones.
        """
        origin = dict(near or self._study.cell({}).levels)
        finite = [factor for factor in self._study.factors if factor.range is None]
        for distance in range(len(finite) + 1):
            layer = list(itertools.combinations(finite, distance))
            rng.shuffle(layer)
            for chosen in layer:
                for names in _shuffled_product([_others(f, origin[f.name]) for f in chosen], rng):
                    levels = {**origin, **dict(zip((f.name for f in chosen), names, strict=True))}
                    candidate = self._study.cell(levels).levels
                    if self._is_new(candidate):
                        return candidate
        return None


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


@dataclass(frozen=True, slots=True)
class Importances:
    """How much each factor mattered among the cells that a search happened to visit."""

    evaluator: str
    shares: Mapping[str, float]
    """Factor -> share; they sum to 1, largest first."""
    num_cells: int
    """Cells with a score: those the evaluator saw."""
    num_pruned: int
    """Cells that were ended early, which no evaluator sees."""
    pruned_off_baseline: Mapping[str, int]
    """Factor -> how many of those stood off its baseline level."""


def importances(
    study: Study,
    results: Iterable[Result],
    *,
    score: Score,
    evaluator: Literal["fanova", "ped_anova"] = "fanova",
) -> Importances:
    """Share of each factor in the score (fANOVA) or in reaching the best tenth (PED-ANOVA).

    fANOVA is the default: with the tens of cells that a search here can pay for, it finds the
    planted factor, while PED-ANOVA, with five or six cells in its best tenth, mostly does not.
    Exploratory: a search looks where it expects good scores, so the sample is biased, and no
    interval says how sure this is. Effects from a design answer the same question honestly.

    Raises:
        AnalysisError: fewer than four cells have ended with a score.
    """
    space = _space(study)
    by_cell: dict[Levels, list[Result]] = {}
    for result in results:
        by_cell.setdefault(result.levels, []).append(result)
    cells = {levels: _ended(mine, score) for levels, mine in by_cell.items()}
    scored = [
        (params, ended.value)
        for levels, ended in cells.items()
        if ended.value is not None and (params := _params(space, dict(levels))) is not None
    ]
    if len(scored) < 4:
        raise AnalysisError(
            f"{len(scored)} cells of {study.name} have a score; importances need four. "
            "Let the search go on, or list the cells with design: one_at_a_time."
        )
    pruned = {factor: 0 for factor in space}
    baseline = study.baseline_levels()
    num_pruned = 0
    for levels, ended in cells.items():
        if ended.state == "pruned":
            num_pruned += 1
            for factor, level in levels:
                pruned[factor] += level != baseline[factor]
    memory = optuna.create_study(direction=study.objective.direction)
    for params, value in scored:
        memory.add_trial(optuna.trial.create_trial(params=params, distributions=space, value=value))
    method: Any
    if evaluator == "fanova":
        method = optuna.importance.FanovaImportanceEvaluator(seed=0)
    else:
        # The top tenth, but five cells at least where there are ten, as Optuna advises.
        method = optuna.importance.PedAnovaImportanceEvaluator(
            target_quantile=min(max(0.1, 5 / len(scored)), 0.5)
        )
    # No explicit target: PED-ANOVA takes lower for better as soon as one is given, whatever
    # the study's direction is (its docstring says so); without one it follows the direction.
    shares = optuna.importance.get_param_importances(memory, evaluator=method)
    return Importances(
        evaluator=evaluator,
        shares={name: float(share) for name, share in shares.items()},
        num_cells=len(scored),
        num_pruned=num_pruned,
        pruned_off_baseline=pruned,
    )


@dataclass(frozen=True, slots=True)
class _Entry:
    ended: Ended | None = None
    """None while the cell is running."""
    source: str | None = None
    """The earlier study that a cell was taken over from."""
    course: Mapping[int, float] = field(default_factory=dict)
    """Score at each rung passed, by percent of the schedule."""

    @property
    def failed(self) -> bool:
        return self.ended is not None and self.ended.state == "failed"


def _ended(results: Sequence[Result], score: Score) -> Ended:
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


# --------------------------------------------------------------------------- the space


def _space(study: Study) -> dict[str, BaseDistribution]:
    return {factor.name: _distribution(factor) for factor in study.factors}


def _params(
    space: Mapping[str, BaseDistribution], levels: Mapping[str, str], *, strict: bool = True
) -> dict[str, Any] | None:
    """Optuna's parameters of these levels; None if they lie outside the space.

    A baseline may lie outside the range that is searched: not `strict`, it keeps its value.
    """
    params: dict[str, Any] = {}
    for name, distribution in space.items():
        if name not in levels:
            return None
        value: Any = levels[name]
        if not isinstance(distribution, CategoricalDistribution):
            value = _number(value)
            if value is None:
                return None
            if isinstance(distribution, FloatDistribution):
                value = float(value)
            if strict and not distribution.low <= value <= distribution.high:
                return None
        elif value not in distribution.choices:
            return None
        params[name] = value
    return params


def _distribution(factor: Factor) -> BaseDistribution:
    span = factor.range
    if span is None:
        return CategoricalDistribution([level.name for level in factor.levels])
    if isinstance(_number(factor.baseline), int):
        low, high = math.ceil(span.low), math.floor(span.high)
        if low > high:
            raise PlanError(
                f"factor {factor.name}: no whole number lies from {span.low} to {span.high}"
            )
        return IntDistribution(low, high, log=span.log)
    return FloatDistribution(span.low, span.high, log=span.log)


def _number(name: str) -> int | float | None:
    """The value that a level name of a range factor stands for; None if it is no finite number."""
    try:
        return int(name)
    except ValueError:
        pass
    try:
        value = float(name)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _level_name(value: Any) -> str:
    return repr(value) if isinstance(value, (int, float)) else str(value)


def _others(factor: Factor, level: str) -> list[str]:
    return [item.name for item in factor.levels if item.name != level]


def _shuffled_product(
    choices: Sequence[list[str]], rng: np.random.Generator
) -> Iterator[tuple[str, ...]]:
    for names in choices:
        rng.shuffle(names)
    return itertools.product(*choices)


# --------------------------------------------------------------------------- the sampler


def _sampler(study: Study, space: Mapping[str, BaseDistribution]) -> _Sampler:
    design = study.design
    name, seed, options = "random", 0, {}
    if isinstance(design, Search):
        name, seed, options = design.sampler, design.sampler_seed, design.options
    sampler = _Sampler(name, seed, dict(options), dict(space), _directions(study))
    if name != "grid":
        sampler.make(seed)  # wrong values of options are refused now, not in the middle of a search
    return sampler


class _Sampler:
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
        self._shown: dict[Levels, tuple[dict[str, Any], _Entry]] = {}
        self._learnt: list[tuple[dict[str, Any], _Entry]] = []
        self._study: optuna.Study | None = None
        self._numbers: dict[Levels, int] = {}
        self._grid: list[dict[str, Any]] | None = None

    def enter(self, levels: Levels, params: dict[str, Any], entry: _Entry) -> None:
        """Show a cell: running, or ended."""
        before = self._shown.get(levels)
        self._shown[levels] = (params, entry)
        if self._study is None:
            return
        if before is None:
            self._add(levels, params, entry)
        elif before[1].ended is not None or (entry.ended is not None and entry.course):
            # Neither a finished trial nor a rung's score can be told later: begin anew when asked.
            self._study = None
        elif entry.ended is not None:
            state, values = _state(entry.ended, len(self._directions))
            self._study.tell(self._numbers[levels], values, state)

    def learn(self, params: dict[str, Any], entry: _Entry) -> None:
        """Show a result from elsewhere."""
        self._learnt.append((params, entry))
        self._study = None

    def patience(self, *, known: int) -> int | None:
        """How many proposals to look at for a new cell; None for all of them."""
        if self._name == "grid":
            return None
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
            asked = study.ask(self._space)
            study.tell(asked, state=TrialState.FAIL)  # only a draft; failed trials teach nothing
            yield {name: _rounded(value, self._space[name]) for name, value in asked.params.items()}

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
        for params, entry in self._learnt:
            study.add_trial(self._trial(params, entry))
        for levels, (params, entry) in self._shown.items():
            self._add(levels, params, entry)
        return study

    def _add(self, levels: Levels, params: dict[str, Any], entry: _Entry) -> None:
        assert self._study is not None
        self._numbers[levels] = len(self._study.get_trials(deepcopy=False))
        self._study.add_trial(self._trial(params, entry))

    def _trial(self, params: dict[str, Any], entry: _Entry) -> optuna.trial.FrozenTrial:
        state, values = TrialState.RUNNING, None
        if entry.ended is not None:
            state, values = _state(entry.ended, len(self._directions))
        return optuna.trial.create_trial(
            state=state,
            params=params,
            distributions=self._space,
            values=values,
            intermediate_values=dict(entry.course) if entry.ended is not None else {},
        )


def _directions(study: Study) -> tuple[str, ...]:
    """Of what is optimised: the score, and the cost it is weighed against if there is one."""
    objective = study.objective
    if objective.cost is None:
        return (objective.direction,)
    return (objective.direction, objective.cost_direction)


def _state(ended: Ended, num_objectives: int) -> tuple[TrialState, list[float] | None]:
    """How a sampler sees an ended cell.

    An infeasible cell counts as pruned: samplers rank those below every completed one, while a
    failed one would teach them nothing, and the region would be proposed again and again. So does
    a cell all of whose seeds diverged where a cost is weighed: what stopped early is not cheap.
    """
    if ended.state == "completed":
        assert ended.value is not None
        if num_objectives == 1:
            return TrialState.COMPLETE, [ended.value]
        if ended.cost is not None:
            return TrialState.COMPLETE, [ended.value, ended.cost]
    return (TrialState.FAIL if ended.state == "failed" else TrialState.PRUNED), None


def _rounded(value: Any, distribution: BaseDistribution) -> Any:
    if not isinstance(distribution, FloatDistribution):
        return value
    short = float(f"{value:.{_SIGNIFICANT_DIGITS}g}")
    return min(max(short, distribution.low), distribution.high)


# --------------------------------------------------------------------------- the storage


class _Mirror:
    """Keeps the Optuna study in the storage up to date; what cannot be written now waits."""

    def __init__(
        self,
        study: Study,
        space: Mapping[str, BaseDistribution],
        storage: Path | str,
        *,
        fresh: bool,
    ) -> None:
        self.trouble: str | None = None
        self._study = study
        self._space = dict(space)
        self._url, self._file = _url(storage)
        self._fresh = fresh
        self._engine: optuna.storages.RDBStorage | None = None
        self._study_id = -1
        self._wanted: dict[Levels, tuple[_Entry, dict[str, Any] | None]] = {}
        self._behind: dict[Levels, None] = {}
        self._stored: dict[str, _Stored] = {}
        """What the storage holds, by the cell's name there."""
        self._outdated = False
        """A finished trial differs from what is wanted now, and has been followed by a new one."""
        self._pause_s = 0.0
        self._not_before = 0.0
        self._flush()

    def put(self, levels: Levels, entry: _Entry, params: dict[str, Any] | None) -> None:
        if params is None:
            return
        self._wanted[levels] = (entry, params)
        self._behind[levels] = None
        self._flush()

    def close(self) -> None:
        self._not_before = 0.0
        if self._outdated:
            self._forget()
        self._flush()
        if self._engine is None:
            return
        try:
            for stored in self._stored.values():
                if stored.state == TrialState.RUNNING:
                    self._engine.set_trial_state_values(stored.trial_id, TrialState.WAITING)
            self._engine.engine.dispose()
        except _OUT_OF_ORDER as error:
            self._report(error)

    def _flush(self) -> None:
        if time.monotonic() < self._not_before:
            return
        try:
            if self._engine is None:
                self._open()
            for levels in list(self._behind):
                entry, params = self._wanted[levels]
                assert params is not None
                self._write(levels, entry, params)
                del self._behind[levels]
        except _OUT_OF_ORDER as error:
            self._report(error)
        else:
            self.trouble, self._pause_s = None, 0.0

    def _report(self, error: Exception) -> None:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        self.trouble = f"the Optuna storage {masked_url(self._url)} is behind: {reason}"
        self._pause_s = min(max(2 * self._pause_s, 2.0), _LONGEST_PAUSE_S)
        self._not_before = time.monotonic() + self._pause_s
        self._forget()

    def _forget(self) -> None:
        """Believe nothing of what was written; the next flush looks, and writes what differs."""
        if self._engine is not None:
            self._engine.engine.dispose()
        self._engine = None
        self._stored = {}
        self._behind = dict.fromkeys(self._wanted)

    def _open(self) -> None:
        """Connect, and find what the storage holds of this study.

        A study with another space or objective, or with outdated trials, is written anew: Optuna
        can change neither the choices of a parameter nor a finished trial.
        """
        if self._file is not None:
            _prepare_sqlite(self._file)
        seconds: dict[str, float] = {}
        if self._file is not None:
            seconds = {"timeout": _BUSY_S}
        elif self._url.startswith("postgresql"):
            seconds = {"connect_timeout": 2}  # the least that libpq takes
        try:
            engine = optuna.storages.RDBStorage(self._url, engine_kwargs={"connect_args": seconds})
        except (ImportError, sqlalchemy.exc.ArgumentError, sqlalchemy.exc.NoSuchModuleError) as e:
            advice = (
                "Give a path, or a URL such as sqlite:////abs/optuna.db or "
                "postgresql://user@host/optuna with its driver installed."
            )
            if isinstance(e, ImportError) and self._url.startswith("postgresql"):
                e = ImportError("its driver is not installed")
                advice = "Install it: pip install 'ablate-runner[postgres]'."
            raise TrackingError(
                f"{masked_url(self._url)} cannot be used as Optuna storage: {e}. {advice}"
            ) from e
        space = {
            name: optuna.distributions.distribution_to_json(distribution)
            for name, distribution in self._space.items()
        }
        objective = self._study.objective
        facts = {
            "space": space,
            "metric": objective.metric,
            "directions": list(_directions(self._study)),
            "cost": objective.cost,
            "seeds": list(self._study.seeds),
        }
        name = self._study.name
        known = {item.study_name: item for item in optuna.get_all_study_summaries(engine)}
        if name in known:
            same = all(
                known[name].user_attrs.get(key) == facts[key]
                for key in ("space", "metric", "cost", "directions")
            )
            if self._fresh or self._outdated or not same:
                optuna.delete_study(study_name=name, storage=engine)
                del known[name]
        study = optuna.create_study(
            storage=engine,
            study_name=name,
            directions=list(_directions(self._study)),
            load_if_exists=True,
        )
        if name not in known:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                study.set_metric_names(
                    [name for name in (objective.metric, objective.cost) if name]
                )
        for key, value in facts.items():
            if name not in known or known[name].user_attrs.get(key) != value:
                study.set_user_attr(key, value)
        self._study_id = engine.get_study_id_from_name(name)
        self._stored = {}
        for trial in engine.get_all_trials(self._study_id, deepcopy=False):
            if trial.state == TrialState.FAIL and trial.user_attrs.get("cell") in self._stored:
                continue
            if trial.state == TrialState.RUNNING:  # left by a controller that was killed
                engine.set_trial_state_values(trial._trial_id, TrialState.WAITING)
            self._stored[str(trial.user_attrs.get("cell"))] = _Stored(
                trial._trial_id,
                TrialState.WAITING if trial.state == TrialState.RUNNING else trial.state,
                trial.user_attrs.get("seeds"),
            )
        self._engine, self._fresh, self._outdated = engine, False, False

    def _write(self, levels: Levels, entry: _Entry, params: dict[str, Any]) -> None:
        engine = self._engine
        assert engine is not None
        name = ", ".join(f"{factor}={level}" for factor, level in levels) or "baseline"
        stored = self._stored.get(name)
        ended = entry.ended
        if stored is not None and stored.state.is_finished():
            if ended is not None and stored.seeds == _plain(ended.seeds):
                return
            self._outdated = self._outdated or stored.state != TrialState.FAIL
            stored = None
        if stored is None:
            attributes = (
                {"cell": name}
                if entry.source is None
                else {"cell": name, "earlier_study": entry.source}
            )
            template = optuna.trial.create_trial(
                state=TrialState.RUNNING,
                params=params,
                distributions=_holding(self._space, params),
                user_attrs=attributes,
            )
            stored = _Stored(
                engine.create_new_trial(self._study_id, template), TrialState.RUNNING, None
            )
            self._stored[name] = stored
        elif stored.state == TrialState.WAITING:
            engine.set_trial_state_values(stored.trial_id, TrialState.RUNNING)
            stored.state = TrialState.RUNNING
        for step, score in entry.course.items():
            engine.set_trial_intermediate_value(stored.trial_id, step, score)
        if ended is None:
            return
        for key, value in {
            "outcomes": ended.outcomes,
            "std": ended.std,
            "infeasible": ended.state == "infeasible" or None,
            "seeds": _plain(ended.seeds),
        }.items():
            if value is not None and value != "":
                engine.set_trial_user_attr(stored.trial_id, key, value)
        state, values = _state(ended, len(_directions(self._study)))
        engine.set_trial_state_values(stored.trial_id, state, values)
        stored.state, stored.seeds = state, _plain(ended.seeds)


@dataclass(slots=True)
class _Stored:
    trial_id: int
    state: TrialState
    seeds: Any


_OUT_OF_ORDER = (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.OptunaError, OSError, KeyError)
"""What a storage raises that is locked, full, gone, or was deleted under our hands."""


def _plain(seeds: Mapping[int, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    return {str(seed): dict(facts) for seed, facts in seeds.items()}


def _holding(
    space: Mapping[str, BaseDistribution], params: Mapping[str, Any]
) -> dict[str, BaseDistribution]:
    """The space, widened where a baseline lies outside the range that is searched."""
    widened = dict(space)
    for name, distribution in space.items():
        if isinstance(distribution, (FloatDistribution, IntDistribution)):
            value = params[name]
            low, high = min(distribution.low, value), max(distribution.high, value)
            if (low, high) != (distribution.low, distribution.high):
                kind = type(distribution)
                widened[name] = kind(low, high, log=distribution.log and low > 0)
    return widened


def _url(storage: Path | str) -> tuple[str, Path | None]:
    """The URL of a storage, and its file if it is an SQLite one."""
    if isinstance(storage, str) and "://" in storage:
        file = storage.removeprefix("sqlite:///") if storage.startswith("sqlite:///") else ""
        return storage, Path(file) if file else None
    path = Path(storage).absolute()
    return f"sqlite:///{path}", path


def _prepare_sqlite(path: Path) -> None:
    """Let readers (the dashboard) and the one writer work at the same time: write-ahead log."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        connection = sqlite3.connect(path, timeout=_BUSY_S)
        try:
            connection.execute("PRAGMA journal_mode=WAL")
        finally:
            connection.close()
    except sqlite3.Error as error:
        raise OSError(f"{path}: {error}") from error
