"""The cells of one study: those asked for, running, ended."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ablate.analysis.results import Result, Score
from ablate.search.cells import Ended, Entry, end_of
from ablate.search.sampler import sampler_of
from ablate.search.space import directions_of, name_level, params_of, space_of
from ablate.search.storage import Storage
from ablate.study import Factor, Study
from ablate.trial.identity import Cell, Levels

_MOST_ASKS = 2
"""How often a cell is asked in one launch whose trials all failed or were lost."""


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
        self._space = space_of(study)
        self._cells: dict[Levels, Entry] = {}
        self._courses: dict[Levels, dict[int, float]] = {}
        """Mean score of a cell's seeds so far at each rung, by percent of the schedule."""
        self._experiments: dict[str, Levels] = {}
        """Resolved configuration -> the first cell that has it."""
        self._refused: set[Levels] = set()
        """Combinations that are no experiment of their own: contradictory, or equal to another."""
        self._asks: dict[Levels, int] = {}
        self._sampler = sampler_of(study, self._space)
        self._storage = Storage(study, self._space, storage, fresh=fresh)

    @property
    def trouble(self) -> str | None:
        """One line on why the storage is behind, or None; nothing is lost meanwhile."""
        return self._storage.trouble

    def begin(self, cell: Cell) -> None:
        """Count a cell as running: listed by a design, or asked by an earlier launch.

        Known cells are left as they are.
        """
        if cell.levels in self._cells and not self._cells[cell.levels].failed:
            return
        self._enter(cell.levels, Entry())
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
        entry = Entry(end_of(results, self._score), course=dict(course))
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
            self._enter(cell.levels, Entry(course=dict(course)))

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
            params = params_of(self._space, levels)
            if params is None or not all(map(math.isfinite, values)):
                continue
            if len(values) != len(directions_of(self._study)):
                continue
            score, cost = values[0], values[1] if len(values) > 1 else None
            entry = Entry(Ended("completed", score, cost, {}), source=source)
            self._sampler.learn(params, entry)
            self._storage.put((("earlier study", source), *sorted(levels.items())), entry, params)
            count += 1
        return count

    def close(self) -> None:
        """Bring the storage up to date if it can be; cells still running stand there as waiting."""
        self._storage.close()

    # ------------------------------------------------------------------ the cells

    def _enter(self, levels: Levels, entry: Entry) -> None:
        self._cells[levels] = entry
        named = dict(levels)
        off = [f.name for f in self._study.factors if not self._study.counts(f, named)]
        params = params_of(self._space, named, inactive=() if self._sampler.takes_all else off)
        if params is not None:
            self._sampler.enter(levels, params, entry)
        wide = params_of(self._space, named, strict=False, inactive=off)
        self._storage.put(levels, entry, wide)

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
        params: dict[str, Any] = {}
        patience = self._sampler.patience(known=len(self._cells))
        for params in itertools.islice(self._sampler.proposals(rng), patience):
            last = self._name(params)
            if self._is_new(last):
                return last
        if (near := self._nearest_new(last, rng)) is not None:
            return near
        # A sampler at the end of a range comes back to it, where every choice is known.
        moved = map(self._name, self._sampler.around(params, rng))
        return next(filter(self._is_new, moved), None)

    def _name(self, params: Mapping[str, Any]) -> Levels:
        levels = {f.name: name_level(params[f.name]) for f in self._study.factors}
        return self._study.cell(levels).levels

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


def _others(factor: Factor, level: str) -> list[str]:
    return [item.name for item in factor.levels if item.name != level]


def _shuffled_product(
    choices: Sequence[list[str]], rng: np.random.Generator
) -> Iterator[tuple[str, ...]]:
    for names in choices:
        rng.shuffle(names)
    return itertools.product(*choices)
