"""Which setting to hand out: combine and confirm.

Of each factor the level that is believed to be better (at least one posterior standard deviation
above the baseline, :mod:`posterior`) goes into one combined cell. That cell is run on the study's
seeds, and handed out only if its mean beats both the baseline's and the best other cell's; else
that cell, if it is believed to be better than the baseline; else the baseline. The best mean by
itself is never a reason: of several noisy means it is too good, and effects need not add up.

How good the policy is against others is measured in tests/calibration/test_recommendation.py.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import scipy

from ablate.analysis.divergence import to_blame
from ablate.analysis.fit import fit
from ablate.analysis.posterior import Belief, Change, Posterior, posterior
from ablate.analysis.results import Cell, Objective, Table

COMBINATION = "combination"
CELL = "cell"
BASELINE = "baseline"
NOTHING = "nothing"


@dataclass(frozen=True, slots=True)
class Evidence:
    """What the recommended cell did."""

    mean: float
    """Over `seeds`."""
    seeds: tuple[int, ...]
    gain: float
    """Of the means over the baseline's on the same seeds; positive is better."""
    believed: Belief | None
    """The gain without the luck of having been chosen; None for the baseline and where the noise
    is not known."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A decision and its reason, as data; :mod:`ablate.report.best` puts it into words."""

    kind: str
    """COMBINATION, confirmed by its own runs | CELL of the design | BASELINE | NOTHING."""
    cell: Cell | None
    """None for NOTHING."""
    evidence: Evidence | None
    combination: Cell | None
    """Of the :func:`combinations` the best that has run on all seeds, else the first to be run;
    None where there is none."""
    combined: Evidence | None
    """What the combination did; None as long as none has run on all seeds."""
    single: Cell | None
    """The best other cell by its posterior mean, if it is believed to be better."""
    compared: tuple[Cell, ...]
    """Cells with a value for every seed and nothing known against them."""


def choose(
    table: Table,
    reference: Cell,
    objective: Objective,
    *,
    seeds: Sequence[int],
    barred: Collection[Cell] = (),
    added: Collection[Cell] = (),
) -> Choice:
    """The cell to hand out, of those that completed on all `seeds`, which stand in the study's
    order.

    `barred`: cells that are never handed out, controls above all. `added`: cells that were run to
    confirm a combination, which take no part in the beliefs that chose it.
    """
    tried = combinations(table, reference, objective, seeds=seeds, barred=barred, added=added)
    return _choose(table, reference, objective, tried, seeds=seeds, barred=barred, added=added)


def _choose(
    table: Table,
    reference: Cell,
    objective: Objective,
    tried: Sequence[Cell],
    *,
    seeds: Sequence[int],
    barred: Collection[Cell],
    added: Collection[Cell],
) -> Choice:
    """The same where the combinations in question are known."""
    sound = [c for c in table.cells if c not in barred and _is_complete(table, c, seeds)]
    own = [cell for cell in sound if cell not in added]
    if not own:
        return Choice(NOTHING, None, None, None, None, None, ())
    beliefs = _beliefs(table, reference, objective, barred=barred, added=added)
    single = _best_single(own, beliefs)

    def evidence(cell: Cell) -> Evidence:
        mean = _mean(table, cell, seeds)
        usual = _mean(table, reference, seeds) if reference in table.cells else math.nan
        believed = beliefs.cells.get(cell) if beliefs is not None else None
        return Evidence(mean, tuple(sorted(seeds)), objective.gain(mean - usual), believed)

    if reference not in own:
        # Nothing to be better than: the mean alone decides.
        first = max(own, key=lambda cell: objective.gain(_mean(table, cell, seeds)))
        single = first if first != reference else None
    ran = [cell for cell in tried if cell in sound]
    best = max(ran, key=lambda cell: objective.gain(_mean(table, cell, seeds)), default=None)
    combination = best or next(iter(tried), None)
    combined = evidence(best) if best is not None else None
    bar = [_mean(table, cell, seeds) for cell in (reference, single) if cell in own and cell]
    if best is not None and all(objective.gain(evidence(best).mean - mean) > 0 for mean in bar):
        kind, cell = COMBINATION, best
    elif single is not None:
        kind, cell = CELL, single
    else:
        kind, cell = BASELINE, reference
    return Choice(kind, cell, evidence(cell), combination, combined, single, tuple(sound))


def combinations(
    table: Table,
    reference: Cell,
    objective: Objective,
    *,
    seeds: Sequence[int],
    barred: Collection[Cell] = (),
    added: Collection[Cell] = (),
) -> tuple[Cell, ...]:
    """The cells that are to be run on all `seeds`: what :func:`combine` gives, and what was handed
    out so when the study had only the first of its seeds.

    Runs of a cell on further seeds do not change whether it is among them.
    """
    found = {combine(table, reference, objective, barred=barred, added=added): None}
    ran = [seed for seed in seeds if seed in table.seeds]
    for count in range(1, len(ran)):
        part = table.of_seeds(ran[:count])
        found[_handed_out(part, reference, objective, barred=barred, added=added)] = None
    return tuple(cell for cell in found if cell is not None)


def _handed_out(
    table: Table,
    reference: Cell,
    objective: Objective,
    *,
    barred: Collection[Cell],
    added: Collection[Cell],
) -> Cell | None:
    """The combination, if it had run on all seeds of the table and was the best."""
    if not any(_is_complete(table, cell, table.seeds) for cell in added if cell in table.cells):
        return None
    found = combine(table, reference, objective, barred=barred, added=added)
    if found is None:
        return None
    choice = _choose(
        table, reference, objective, [found], seeds=table.seeds, barred=barred, added=added
    )
    return choice.cell if choice.kind == COMBINATION else None


def combine(
    table: Table,
    reference: Cell,
    objective: Objective,
    *,
    barred: Collection[Cell] = (),
    added: Collection[Cell] = (),
) -> Cell | None:
    """Of each factor the level believed to be best, all together; None without two changes.

    A level that alone makes a barred cell, and one to which divergence is put down, takes no part.
    """
    beliefs = _beliefs(table, reference, objective, barred=barred, added=added)
    if beliefs is None:
        return None
    out = to_blame(_without(table, added), reference) | _alone(barred, reference)
    best: dict[int, tuple[float, str]] = {}
    for (place, level), belief in beliefs.changes.items():
        if belief.is_up and (place, level) not in out:
            best[place] = max(best.get(place, (0.0, "")), (belief.gain, level))
    if len(best) < 2:
        return None
    return tuple(best[i][1] if i in best else level for i, level in enumerate(reference))


def _beliefs(
    table: Table,
    reference: Cell,
    objective: Objective,
    *,
    barred: Collection[Cell],
    added: Collection[Cell],
) -> Posterior | None:
    return posterior(table, reference, objective, barred={*barred, *added})


def _alone(cells: Collection[Cell], reference: Cell) -> set[Change]:
    """The changes that make a cell by themselves."""
    found = set()
    for cell in cells:
        changed = [(i, level) for i, level in enumerate(cell) if level != reference[i]]
        if len(changed) == 1:
            found.add(changed[0])
    return found


def _best_single(cells: Sequence[Cell], beliefs: Posterior | None) -> Cell | None:
    known: Mapping[Cell, Belief] = beliefs.cells if beliefs is not None else {}
    up = [cell for cell in cells if cell in known and known[cell].is_up]
    return max(up, key=lambda cell: known[cell].gain, default=None)


def _is_complete(table: Table, cell: Cell, seeds: Collection[int]) -> bool:
    """Every seed has a value, and no other run ended otherwise."""
    row = table.cells.index(cell)
    places = [table.seeds.index(seed) for seed in seeds if seed in table.seeds]
    if len(places) < len(seeds) or np.isnan(table.values[row, places]).any():
        return False
    return set(table.outcomes[row]) <= {"completed", ""}


def _without(table: Table, cells: Collection[Cell]) -> Table:
    keep = [row for row, cell in enumerate(table.cells) if cell not in cells]
    homes = {table.cells[row] for row in keep}
    return replace(
        table,
        cells=tuple(table.cells[row] for row in keep),
        values=table.values[keep],
        outcomes=table.outcomes[keep],
        shared={cell: home for cell, home in table.shared.items() if home in homes},
    )


def _mean(table: Table, cell: Cell, seeds: Collection[int]) -> float:
    """NaN where no run completed, else of those that did."""
    places = [table.seeds.index(seed) for seed in seeds if seed in table.seeds]
    values = table.values[table.cells.index(cell), places]
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else math.nan


def told_apart(table: Table, cells: Sequence[Cell], best: Cell) -> tuple[Cell, ...]:
    """The cells shown to differ from `best`, which was chosen among them: Tukey's all pairs, 5 %.

    (A Dunnett test against the largest mean would take its luck for a lead.)
    """
    rows = [table.cells.index(cell) for cell in cells]
    if len(rows) < 2 or best not in cells:
        return ()
    fitted = fit(table.values, tuple(rows))
    if fitted.df < 1:
        return ()
    found = []
    for cell in cells:
        weights = np.zeros(len(table.cells))
        weights[table.cells.index(best)] += 1
        weights[table.cells.index(cell)] -= 1
        spread = fitted.spread(weights, weights)
        if cell == best or not fitted.usable(weights) or spread <= 0:
            continue
        error = math.sqrt(fitted.mse * spread)
        if error == 0:
            continue
        q = abs(fitted.estimate(weights)) / error * math.sqrt(2)
        if scipy.stats.studentized_range.sf(q, len(cells), fitted.df) <= 0.05:
            found.append(cell)
    return tuple(found)
