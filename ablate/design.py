"""From a study to the trials it wants: pure, deterministic, and the same for plan and launch.

`propose` is asked again after every finished trial. A fixed design always gives the same list; an
ablation path, sequential seeds and what follows a search add trials as results come in. A search's
own cells come from `ablate.search`.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean

from ablate import recipes
from ablate.analysis.results import Result
from ablate.analysis.sequential import open_levels
from ablate.errors import PlanError
from ablate.factorial import TwoLevel, fractional, plackett_burman
from ablate.study import (
    AblationPath,
    FractionalFactorial,
    FullFactorial,
    LeaveOneOut,
    OneAtATime,
    PlackettBurman,
    Search,
    Study,
)
from ablate.trial import Cell, Outcome, Trial


def propose(study: Study, results: Sequence[Result] = ()) -> list[Trial]:
    """Every trial the study wants, given what is known so far, in the order to run them.

    Complete seed blocks come first, so that a study that is cut short is still balanced; within a
    block the order is drawn from the study's name and the seed, so that a drift of the cluster
    does not fall on the same cells in every block. Cells with equal configurations are one cell.
    """
    wanted = cells(study, results)
    trials: dict[str, Trial] = {}
    for seed, block in _blocks(study, wanted, results):
        shuffled = list(block)
        _generator(study.name, seed).shuffle(shuffled)
        for cell in shuffled:
            trial = study.trial(cell, seed=seed)
            trials.setdefault(trial.id, trial)
    return list(trials.values())


def grows(study: Study) -> bool:
    """Whether results can bring trials that :func:`propose` did not list before them."""
    design = study.design
    return (
        study.sequential is not None
        or isinstance(design, AblationPath)
        or (isinstance(design, Search) and design.then != "nothing")
    )


def cells(study: Study, results: Sequence[Result] = ()) -> list[Cell]:
    """The distinct cells that the design lists, the baseline first.

    Raises:
        PlanError: the design cannot be made from these factors.
    """
    design = study.design
    baseline = study.baseline_levels()
    if isinstance(design, OneAtATime):
        chosen = _one_at_a_time(study)
    elif isinstance(design, FullFactorial):
        chosen = _combinations(study, [factor.name for factor in study.factors])
    elif isinstance(design, (FractionalFactorial, PlackettBurman)):
        chosen = _fraction(study)
    elif isinstance(design, LeaveOneOut):
        chosen = leave_one_out(baseline, design.target)
    elif isinstance(design, AblationPath):
        chosen = _ablation_path(study, design.target, results)
    else:
        chosen = _after_search(study, design, results)
    ordered = [study.cell(levels) for levels in [baseline, *chosen]]
    return _unique(study, ordered)


def leave_one_out(baseline: Mapping[str, str], target: Mapping[str, str]) -> list[dict[str, str]]:
    """The target, the target with each change reverted, and each change alone.

    Reverting alone cannot see redundancy (of two substitutes, both look unneeded), adding alone
    cannot see synergy; together they show both.
    """
    changed = {name: level for name, level in target.items() if baseline[name] != level}
    full = {**baseline, **changed}
    reverted = [{**full, name: baseline[name]} for name in changed]
    added = [{**baseline, name: level} for name, level in changed.items()]
    return [full, *reverted, *added]


def _one_at_a_time(study: Study) -> list[dict[str, str]]:
    return [
        {factor.name: level.name}
        for factor in study.factors
        for level in factor.levels
        if level.name != factor.baseline
    ]


def _combinations(study: Study, names: Iterable[str]) -> list[dict[str, str]]:
    factors = [study.factor(name) for name in names]
    choices = [[level.name for level in factor.levels] for factor in factors]
    return [
        dict(zip((f.name for f in factors), combination, strict=True))
        for combination in itertools.product(*choices)
    ]


def fraction(study: Study) -> TwoLevel | None:
    """The two-level design of a fractional study, with what it confounds; None for other designs.

    Raises:
        ValueError: there is no such fraction of so many factors.
    """
    count = len(study.factors)
    if isinstance(study.design, FractionalFactorial):
        return fractional(count, resolution=study.design.resolution)
    if isinstance(study.design, PlackettBurman):
        return plackett_burman(count, fold_over=study.design.fold_over)
    return None


def _fraction(study: Study) -> list[dict[str, str]]:
    try:
        two_level = fraction(study)
    except ValueError as error:
        raise PlanError(f"{study.path}: design: {error}") from error
    assert two_level is not None
    rows = []
    for row in two_level.matrix:
        levels = {}
        for factor, sign in zip(study.factors, row, strict=True):
            other = next(item.name for item in factor.levels if item.name != factor.baseline)
            levels[factor.name] = other if sign > 0 else factor.baseline
        rows.append(levels)
    return rows


def _ablation_path(
    study: Study, target: Mapping[str, str], results: Sequence[Result]
) -> list[dict[str, str]]:
    """The cells of every round that can be listed so far (Fawcett & Hoos 2016, executed).

    In each round every change that is left is tried on top of those already made; the best mean
    over seeds is kept. The next round is listed once all cells of this one have all their seeds.
    """
    current = study.baseline_levels()
    left = {name: level for name, level in target.items() if current[name] != level}
    listed: list[dict[str, str]] = []
    while left:
        round_ = {name: {**current, name: level} for name, level in left.items()}
        listed.extend(round_.values())
        scores = {name: mean_score(study, levels, results) for name, levels in round_.items()}
        if any(score is None for score in scores.values()):
            return listed
        sign = 1.0 if study.objective.direction == "maximize" else -1.0
        best = max(scores, key=lambda name: sign * (scores[name] or 0.0))
        current = round_[best]
        del left[best]
    return listed


def _after_search(study: Study, design: Search, results: Sequence[Result]) -> list[dict[str, str]]:
    if design.then != "leave_one_out":
        return []
    space = math.prod(len(f.levels) if f.range is None else design.cells for f in study.factors)
    best = best_levels(study, results, at_least=min(design.cells, space))
    return [] if best is None else leave_one_out(study.baseline_levels(), best)


def best_levels(
    study: Study, results: Sequence[Result], *, at_least: int = 1
) -> dict[str, str] | None:
    """Levels of the best mean over complete seed blocks; None below `at_least` complete cells."""
    sign = 1.0 if study.objective.direction == "maximize" else -1.0
    scores = {
        levels: mean_score(study, dict(levels), results)
        for levels in dict.fromkeys(result.levels for result in results)
    }
    known = {levels: score for levels, score in scores.items() if score is not None}
    if len(known) < at_least:
        return None
    best = max(known.items(), key=lambda item: sign * item[1])
    return dict(best[0])


def mean_score(study: Study, levels: Mapping[str, str], results: Sequence[Result]) -> float | None:
    """Mean objective of a cell over all its seeds; None until every seed has ended.

    A diverged seed counts at chance level; seeds that say nothing about the setting (failed,
    lost, infeasible) are left out, and a cell of nothing but those scores worst.
    """
    wanted = {**study.baseline_levels(), **levels}
    mine = {result.seed: result for result in results if dict(result.levels) == wanted}
    if not set(study.seeds) <= set(mine):
        return None
    scores = [score for result in mine.values() if (score := score_of(study, result)) is not None]
    if not scores:
        return -math.inf if study.objective.direction == "maximize" else math.inf
    return fmean(scores)


def score_of(study: Study, result: Result) -> float | None:
    """The number a trial counts with: its value, chance level if it diverged, else None."""
    if result.outcome == Outcome.DIVERGED:
        recipe = recipes.load(study.recipe)
        cell = study.cell(dict(result.levels))
        config = recipe.Config(**study.config(cell, seed=result.seed))
        return recipe.chance(config, root=Path(study.root), metric=study.objective.metric)
    return result.value if result.outcome == Outcome.COMPLETED else None


def _blocks(
    study: Study, wanted: Sequence[Cell], results: Sequence[Result]
) -> list[tuple[int, Sequence[Cell]]]:
    """(seed, cells to run with it) in order; with sequential seeds, as far as is decided."""
    if study.sequential is None:
        return [(seed, wanted) for seed in study.seeds]
    blocks: list[tuple[int, Sequence[Cell]]] = []
    for index, seed in enumerate(study.seeds):
        if index < study.sequential.min:
            blocks.append((seed, wanted))
            continue
        before = study.seeds[:index]
        known = [result for result in results if result.seed in before]
        asked = {(cell.levels, seed) for seed, block in blocks for cell in block}
        if not asked <= {(result.levels, result.seed) for result in known}:
            break  # the block before is still running
        undecided = open_levels(
            known,
            baseline=study.baseline_levels(),
            objective=study.objective,
            estimand="auto" if fraction(study) is None else "additive",
            first_look=study.sequential.min,
        )
        again = [cell for cell in wanted if cell.levels in undecided]
        if not again:
            break
        blocks.append((seed, [wanted[0], *(cell for cell in again if cell != wanted[0])]))
    return blocks


def _unique(study: Study, ordered: Sequence[Cell]) -> list[Cell]:
    """Cells without those whose resolved configuration stands earlier in the list."""
    seed = study.seeds[0]
    return list({study.trial(cell, seed=seed).id: cell for cell in reversed(ordered)}.values())[
        ::-1
    ]


def _generator(name: str, seed: int) -> random.Random:
    digest = hashlib.sha256(f"{name}/{seed}".encode()).digest()
    return random.Random(int.from_bytes(digest[:8], "big"))
