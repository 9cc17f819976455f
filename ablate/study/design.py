"""From a study to the trials it wants: pure, deterministic, and the same for plan and launch.

`propose` is asked again after every finished trial. A fixed design always gives the same list; an
ablation path, sequential seeds and what follows a search add trials as results come in. A search's
own cells come from `ablate.search`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import random
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from ablate.analysis.results import Result
from ablate.analysis.sequential import open_levels
from ablate.errors import PlanError
from ablate.study import (
    AblationPath,
    FractionalFactorial,
    FullFactorial,
    LeaveOneOut,
    Observed,
    OneAtATime,
    PlackettBurman,
    Search,
    Study,
    sweep,
)
from ablate.study.confirmation import combinations, seeds_of
from ablate.study.controls import controls, experiment, rules_of, sameness, withheld
from ablate.study.factorial import MixedLevel, TwoLevel, fractional, mixed_levels, plackett_burman
from ablate.trial.identity import Cell, Levels, Outcome, Trial
from ablate.trial.recipe import chance_of, load
from ablate.trial.same import Sameness, simplify

MOST_REPEATS = 12
"""Merged cells that are listed one by one."""


def propose(study: Study, results: Sequence[Result] = ()) -> list[Trial]:
    """Every trial the study wants, given what is known so far, in the order to run them.

    Complete seed blocks come first, so that a study that is cut short is still balanced; within a
    block the order is drawn from the study's name and the seed, so that a drift of the cluster
    does not fall on the same cells in every block. Cells that are provably one experiment are one
    cell (:func:`merged`). With `confirm` the last to be run are the :func:`confirmations`.
    """
    if isinstance(study.design, Observed):
        return []
    own = _trials(study, cells(study, results), results)
    trials = {trial.id: trial for trial in own}
    if study.confirm:
        trials.update({trial.id: trial for trial in confirm_search(study, results)})
        last = confirmations(study, results, own=own)
        blocks = [block for cell in last for block in _confirming(study, cell, results)]
        trials.update({trial.id: trial for trial in _in_order(study, blocks)})
    return list(trials.values())


def _confirming(
    study: Study, cell: Cell, results: Sequence[Result]
) -> Iterable[tuple[int, Sequence[Cell]]]:
    best: Cell | None = cell
    if study.candidates.levels:
        tuning = tune(study, cell, results)
        yield from ((seed, tuning.candidates) for seed in study.candidates.seeds)
        best = tuning.best
    if best is not None:
        yield from ((seed, [best]) for seed in seeds_of(study, settled(study, results)))


def confirmations(
    study: Study, results: Sequence[Result], *, own: Sequence[Trial] | None = None
) -> list[Cell]:
    """Changes that look better alone, put together in cells that the design does not have: what
    is believed now, and what was handed out so when the study had fewer seeds.

    None before every trial of the design has ended, and where there is no such cell: the study is
    run without one then. Runs of these cells on further seeds do not change which they are. `own`:
    the design's trials, if they are known already.
    """
    if isinstance(study.design, (Search, Observed)):
        return []
    own = _trials(study, cells(study, results), results) if own is None else own
    ended = {(result.levels, result.seed) for result in results}
    if any((trial.cell.levels, trial.seed) not in ended for trial in own):
        return []
    if pending(study, results):
        return []
    listed = [cell for cell, _ in _homes(study, _listed(study, results))]
    levels = {cell.levels for cell in listed}
    known = settled(study, results)
    found = combinations(
        study,
        [result for result in known if result.levels in levels],
        [result for result in known if result.levels not in levels],
    )
    new = [cell for cell in found if cell.levels not in levels]
    return [cell for cell, home in _homes(study, [*listed, *new]) if cell is home and cell in new]


def _trials(study: Study, wanted: Sequence[Cell], results: Sequence[Result]) -> list[Trial]:
    """The trials of these cells, as far as they can be listed now."""
    blocks: list[tuple[int, Sequence[Cell]]] = []
    if study.candidates.levels:
        tuned = {cell.levels: tune(study, cell, results) for cell in wanted}
        tried = [cell for tuning in tuned.values() for cell in tuning.candidates]
        blocks += [(seed, tried) for seed in study.candidates.seeds]
        if study.sequential is None or all(tuning.best for tuning in tuned.values()):
            for seed, block in _blocks(study, wanted, settled(study, results)):
                best = [tuned[cell.levels].best for cell in block]
                blocks.append((seed, [cell for cell in best if cell is not None]))
    else:
        blocks += _blocks(study, wanted, results)
    return _in_order(study, blocks)


def _in_order(study: Study, blocks: Iterable[tuple[int, Sequence[Cell]]]) -> list[Trial]:
    """Each trial once, block by block, shuffled within its block."""
    trials: dict[str, Trial] = {}
    for seed, block in blocks:
        shuffled = list(block)
        _generator(study.name, seed).shuffle(shuffled)
        for cell in shuffled:
            trial = study.trial(cell, seed=seed)
            trials.setdefault(trial.id, trial)
    return list(trials.values())


@dataclass(frozen=True, slots=True)
class Tuning:
    """The choice of the nuisance settings inside one cell."""

    cell: Cell
    """With the nuisance settings at the baseline."""
    candidates: tuple[Cell, ...]
    scores: tuple[float | None, ...]
    """Mean of each over the tuning seeds, a diverged run at chance; None until all have ended."""
    best: Cell | None
    """None until every candidate has ended on every tuning seed."""


def tune(study: Study, cell: Cell, results: Sequence[Result]) -> Tuning:
    """What is known about the nuisance settings of a cell, on the tuning seeds alone."""
    candidates = tuple(
        study.cell({**dict(cell.levels), **levels}) for levels in study.candidates.levels
    )
    known = {(r.levels, r.seed): r for r in results if r.seed in study.candidates.seeds}
    scores = []
    for candidate in candidates:
        mine = [known.get((candidate.levels, seed)) for seed in study.candidates.seeds]
        ended = [result for result in mine if result is not None]
        scores.append(_mean_score(study, ended) if len(ended) == len(mine) else None)
    best = None
    if all(score is not None for score in scores):
        sign = study.objective.sign
        best = candidates[max(range(len(scores)), key=lambda i: sign * (scores[i] or 0.0))]
    return Tuning(cell, candidates, tuple(scores), best)


def settled(study: Study, results: Sequence[Result]) -> list[Result]:
    """The results that are compared: of each cell those at its best nuisance settings, on the
    study's own seeds, under the cell's name with the nuisance settings at the baseline.

    Runs of the tuning seeds are never among them: the best of several noisy scores is too good.
    """
    if not study.candidates.levels:
        return list(results)
    cells = dict.fromkeys(study.untuned(result.levels) for result in results)
    known = {(result.levels, result.seed): result for result in results}
    found = []
    for levels in cells:
        best = tune(study, study.cell(dict(levels)), results).best
        for seed in study.seeds if best is not None else ():
            result = known.get((best.levels, seed)) if best is not None else None
            if result is not None:
                found.append(replace(result, levels=levels))
    return found


def pending(study: Study, results: Sequence[Result] = ()) -> list[tuple[Cell, int]]:
    """(cell, seed) of trials that wait for the cell's nuisance settings to be chosen."""
    if not study.candidates.levels:
        return []
    count = len(study.seeds) if study.sequential is None else study.sequential.min
    waiting = [c for c in cells(study, results) if tune(study, c, results).best is None]
    return [(cell, seed) for seed in study.seeds[:count] for cell in waiting]


def grows(study: Study) -> bool:
    """Whether results can bring trials that :func:`propose` did not list before them."""
    design = study.design
    return (
        study.sequential is not None
        or bool(study.candidates.levels)
        or isinstance(design, AblationPath)
        or (isinstance(design, Search) and design.then != "nothing")
    )


def cells(study: Study, results: Sequence[Result] = ()) -> list[Cell]:
    """The distinct cells that the design lists, the baseline first.

    Raises:
        PlanError: the design cannot be made from these factors.
    """
    homes = _homes(study, _listed(study, results))
    return [cell for cell, home in homes if cell is home]


@dataclass(frozen=True, slots=True)
class Merged:
    """A cell of the design that is not run: another one is provably the same experiment."""

    cell: Cell
    home: Cell
    """The cell whose runs stand for it."""
    why: Sameness


def merged(study: Study, results: Sequence[Result] = ()) -> list[Merged]:
    """The cells that the design lists and that share the runs of another one, with the reason.

    A level named under the study's `controls` keeps runs of its own.
    """
    found = []
    for cell, home in _homes(study, _listed(study, results)):
        if cell is not home:
            why = sameness(study, home, cell)
            assert why is not None
            found.append(Merged(cell, home, why))
    return found


def repeats(study: Study) -> list[str]:
    """In sentences: what is not run because it repeats another experiment, and what is anyhow."""
    found = [
        f"{factor.name}={level} is not run: it is the same experiment as {factor.name}={home} "
        f"({'; '.join(why.reasons)}) and shares its runs. To run it as a control, write "
        f"controls: {{{factor.name}: [{level}]}}."
        for factor in study.factors
        for level, (home, why) in factor.twins.items()
    ]
    twins = {(factor.name, level) for factor in study.factors for level in factor.twins}
    cells = [
        f"{_name(study, one.cell)} is not run: it is the same experiment as "
        f"{_name(study, one.home)} ({'; '.join(one.why.reasons)}) and shares its runs."
        for one in merged(study)
        if not twins & set(one.cell.levels)
    ]
    found += cells[:MOST_REPEATS]
    if len(cells) > MOST_REPEATS:
        found.append(f"So do {len(cells) - MOST_REPEATS} more cells.")
    found += [
        f"{name} is a control: it is the same experiment as {home} ({'; '.join(why.reasons)}), so "
        "a difference between them is noise."
        for name, home, why in controls(study)
    ]
    return found


def _name(study: Study, cell: Cell) -> str:
    name = study.change_name(dict(cell.levels))
    return "the baseline" if name == "baseline" else name


def _homes(study: Study, listed: Iterable[Cell]) -> list[tuple[Cell, Cell]]:
    """Each cell once, with the first of the list that is the same experiment: often itself."""
    first: dict[str, Cell] = {}
    homes = []
    for cell in {cell.levels: cell for cell in listed}.values():
        simple, _ = simplify(
            experiment(study, cell), rules=rules_of(study), workers=study.gang.workers
        )
        kept = sorted(set(cell.levels) & study.controls)
        key = json.dumps([simple, kept], sort_keys=True, default=str)
        homes.append((cell, first.setdefault(key, cell)))
    return homes


def _listed(study: Study, results: Sequence[Result]) -> list[Cell]:
    """All cells of the design, each once, the baseline first."""
    design = study.design
    results = settled(study, results)
    baseline = study.baseline_levels()
    if isinstance(design, OneAtATime):
        chosen = _one_at_a_time(study)
    elif isinstance(design, FullFactorial):
        chosen = _combinations(study, [factor.name for factor in study.compared])
    elif isinstance(design, (FractionalFactorial, PlackettBurman)):
        chosen = _fraction(study)
    elif isinstance(design, LeaveOneOut):
        chosen = leave_one_out(baseline, design.target)
    elif isinstance(design, Observed):
        chosen = []
    elif isinstance(design, AblationPath):
        chosen = _ablation_path(study, design.target, results)
    else:
        chosen = _after_search(study, design, results)
    return [study.cell(levels) for levels in [baseline, *chosen]]


def leave_one_out(baseline: Mapping[str, str], target: Mapping[str, str]) -> list[dict[str, str]]:
    """The target, the target with each change reverted, and each change alone.

    Reverting alone cannot see redundancy (of two substitutes, both look unneeded), adding alone
    cannot see synergy; together they show both.
    """
    reverted, added = both_ways(baseline, target)
    return [*reverted, *added[1:]]


def both_ways(
    baseline: Mapping[str, str], target: Mapping[str, str]
) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """The two comparisons: the target and each change reverted; the baseline and each alone."""
    full = {**baseline, **target}
    changed = [name for name in baseline if full[name] != baseline[name]]
    reverted = [full, *({**full, name: baseline[name]} for name in changed)]
    return reverted, [dict(baseline), *({**baseline, name: full[name]} for name in changed)]


def _one_at_a_time(study: Study) -> list[dict[str, str]]:
    return [
        {factor.name: level.name}
        for factor in study.compared
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


@dataclass(frozen=True, slots=True)
class Fraction:
    """The matrix behind a fractional study."""

    factors: tuple[str, ...]
    """The columns: factors with more than one distinct level."""
    array: TwoLevel | MixedLevel

    def aliases(self) -> dict[str, dict[str, float]]:
        """Effect -> the effects in its estimate, with weights; see factorial."""
        return self.array.aliases(self.factors)


def fraction(study: Study) -> Fraction | None:
    """The matrix of a fractional study, with what it confounds; None for other designs.

    Raises:
        PlanError: there is no such fraction of so many factors.
    """
    design = study.design
    if not isinstance(design, (FractionalFactorial, PlackettBurman)):
        return None
    varied = [factor for factor in study.compared if len(factor.distinct()) > 1]
    counts = [len(factor.distinct()) for factor in varied]
    names = tuple(factor.name for factor in varied)
    if not varied:
        raise PlanError(
            f"{study.source.path}: all levels are provably one experiment: nothing to run"
        )
    try:
        if isinstance(design, PlackettBurman):
            return Fraction(names, plackett_burman(len(varied), fold_over=design.fold_over))
        if max(counts) > 2:
            return Fraction(names, mixed_levels(counts))
        return Fraction(names, fractional(len(varied), resolution=design.resolution))
    except ValueError as error:
        raise PlanError(f"{study.source.path}: design: {error}") from error


def _fraction(study: Study) -> list[dict[str, str]]:
    """The rows of the matrix, and each row again with a level's twins in its place."""
    found = fraction(study)
    assert found is not None
    rows = []
    for row in found.array.level_numbers():
        numbers = dict(zip(found.factors, row, strict=True))
        levels = {
            factor.name: factor.distinct()[numbers.get(factor.name, 0)] for factor in study.compared
        }
        rows.append(levels)
        for factor in study.compared:
            rows += [
                {**levels, factor.name: twin}
                for twin, (home, _) in factor.twins.items()
                if home == levels[factor.name]
            ]
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
        best = max(scores, key=lambda name: study.objective.sign * (scores[name] or 0.0))
        current = round_[best]
        del left[best]
    return listed


def _after_search(study: Study, design: Search, results: Sequence[Result]) -> list[dict[str, str]]:
    best = None if design.then == "nothing" else winner(study, results)
    if best is None:
        return []
    if design.then == "ablation_path":
        return _ablation_path(study, best, results)
    return leave_one_out(study.baseline_levels(), best)


def winner(study: Study, results: Sequence[Result]) -> dict[str, str] | None:
    """The best cell of a search that has had all its cells; None before."""
    assert isinstance(study.design, Search)
    wanted = study.design.cells - sweep.num_repeats(study, (r.seed for r in results))
    complete = _num_complete(study, results)
    if complete < wanted and complete < _num_experiments(study, at_most=wanted):
        if not sweep.has_converged(study, results):
            return None
    return best_levels(study, results)


def confirm_search(study: Study, results: Sequence[Result]) -> list[Trial]:
    """The best settings of a search and the baseline on fresh seeds; none before every trial of
    the search, and of what follows it, has ended."""
    if not isinstance(study.design, Search):
        return []
    own = [result for result in results if result.seed not in study.fresh_seeds]
    ended = {(result.levels, result.seed) for result in own}
    listed = _trials(study, cells(study, own), own)
    if winner(study, own) is None or any((t.cell.levels, t.seed) not in ended for t in listed):
        return []
    chosen = sweep.to_confirm(study, own)
    return _in_order(study, [(seed, chosen) for seed in study.fresh_seeds])


def _num_complete(study: Study, results: Sequence[Result]) -> int:
    seeds: dict[Levels, set[int]] = {}
    for result in results:
        seeds.setdefault(result.levels, set()).add(result.seed)
    return sum(set(study.seeds) <= ended for ended in seeds.values())


def _num_experiments(study: Study, *, at_most: int) -> int:
    """Distinct configurations of all combinations, without those that contradict themselves."""
    if any(factor.range is not None for factor in study.factors):
        return at_most
    found: set[str] = set()
    for chosen in itertools.product(*(factor.levels for factor in study.factors)):
        if len(found) == at_most:
            break
        levels = {f.name: level.name for f, level in zip(study.factors, chosen, strict=True)}
        try:
            found.add(study.trial(study.cell(levels), seed=study.seeds[0]).id)
        except ValueError:  # pydantic's ValidationError is one
            continue
    return len(found)


def best_levels(study: Study, results: Sequence[Result]) -> dict[str, str] | None:
    """Levels of the best mean over complete seed blocks, but of no control; None while there is
    no such cell."""
    by_cell: dict[Levels, list[Result]] = {}
    for result in results:
        by_cell.setdefault(result.levels, []).append(result)
    scores = {
        levels: score
        for levels, mine in by_cell.items()
        if (score := mean_score(study, dict(levels), mine)) is not None
    }
    # Of equal means the first is kept: sorted is stable.
    ranked = sorted(scores, key=lambda levels: -study.objective.sign * scores[levels])
    return next((dict(levels) for levels in ranked if not withheld(study, dict(levels))), None)


def mean_score(study: Study, levels: Mapping[str, str], results: Sequence[Result]) -> float | None:
    """Mean objective of a cell over all its seeds; None until every seed has ended.

    A diverged seed counts at chance level; seeds that say nothing about the setting (failed,
    lost, infeasible) are left out. A cell of nothing but those scores worst, and so does one with
    a pruned seed: it was ended for being worse.
    """
    wanted = {**study.baseline_levels(), **levels}
    mine = {result.seed: result for result in results if dict(result.levels) == wanted}
    if not set(study.seeds) <= set(mine):
        return None
    return _mean_score(study, list(mine.values()))


def _mean_score(study: Study, results: Sequence[Result]) -> float:
    """Mean of what the results count with; the worst there is if none of them says anything, or
    one was pruned."""
    scores = [score for result in results if (score := score_of(study, result)) is not None]
    if not scores or any(result.outcome == Outcome.PRUNED for result in results):
        return -math.inf * study.objective.sign
    return fmean(scores)


def score_of(study: Study, result: Result) -> float | None:
    """The number a trial counts with: its value, chance level if it diverged, else None."""
    if result.outcome == Outcome.DIVERGED:
        cell = study.cell(dict(result.levels))
        config = load(study.recipe).Config(**study.config(cell, seed=result.seed))
        root, metric = Path(study.root), study.objective.metric
        return chance_of(study.recipe, config, metric=metric, root=root)
    return result.value if result.outcome == Outcome.COMPLETED else None


def _blocks(
    study: Study, wanted: Sequence[Cell], results: Sequence[Result]
) -> list[tuple[int, Sequence[Cell]]]:
    """(seed, cells to run with it) in order; with sequential seeds, as far as is decided."""
    if study.sequential is None:
        return [(seed, wanted) for seed in study.seeds]
    if not wanted:
        return []
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
        again = _still_open(study, known)
        block = [cell for cell in wanted if cell.levels in again]
        if not block:
            break
        blocks.append((seed, block))
    return blocks


def _still_open(study: Study, known: Sequence[Result]) -> set[Levels]:
    """The cells of comparisons that more seeds could decide, and what they are compared with.

    Asked as the report asks: a target's reverted changes against the target.
    """
    base = study.baseline_levels()
    asked: list[tuple[Mapping[str, str], Collection[Levels] | None, str]]
    if isinstance(study.design, LeaveOneOut):
        both = both_ways(base, study.design.target)
        asked = [(cells[0], {tuple(c.items()) for c in cells}, "simple") for cells in both]
    else:
        asked = [(base, None, "auto" if fraction(study) is None else "additive")]
    found: set[Levels] = set()
    for reference, cells, estimand in asked:
        mine = [result for result in known if cells is None or result.levels in cells]
        opened = open_levels(
            mine,
            baseline=reference,
            objective=study.objective,
            estimand=estimand,
            first_look=study.sequential.min if study.sequential else None,
        )
        if opened:
            found |= {*opened, tuple(reference.items())}
    return found


def _generator(name: str, seed: int) -> random.Random:
    digest = hashlib.sha256(f"{name}/{seed}".encode()).digest()
    return random.Random(int.from_bytes(digest[:8], "big"))
