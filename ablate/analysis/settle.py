"""What an average cannot say: factors that depend on each other, that share their estimate with
pairs of others, and studies in which nothing was learnt."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from ablate.analysis import effects, power, sentences, verdict
from ablate.analysis.answer import Contrast, Interaction, SimpleEffect
from ablate.analysis.contrasts import ALPHA
from ablate.analysis.fit import Fit
from ablate.analysis.results import Cell, FloatArray, Objective, Table
from ablate.analysis.tuning import Tuned, possible_loss


def at_chance(table: Table, objective: Objective) -> str:
    """A reason, when no cell is shown to be beyond chance; empty when one is, or chance unknown.

    Beyond: the mean by more than twice its standard error over seeds.
    """
    if objective.chance is None or np.isnan(table.values).all():
        return ""
    if any(_is_beyond_chance(table, objective)):
        return ""
    return "no setting is shown to be better than chance"


def sides_at_chance(
    table: Table, reference: Cell, contrasts: Sequence[Contrast], objective: Objective
) -> dict[tuple[str, str], str]:
    """(factor, level) -> a reason, where neither of the two cells that are compared is shown to be
    beyond chance, whatever others are."""
    if objective.chance is None:
        return {}
    beyond = _is_beyond_chance(table, objective)
    found = {}
    for c in contrasts:
        if c.estimand != "simple":
            continue
        place = table.factors.index(c.factor)
        cell = (*reference[:place], c.level, *reference[place + 1 :])
        rows = [row for row in (table.index(cell), table.index(reference)) if row is not None]
        if rows and not any(beyond[row] for row in rows):
            found[c.factor, c.level] = "neither is shown to be better than chance"
    return found


def _is_beyond_chance(table: Table, objective: Objective) -> list[bool]:
    assert objective.chance is not None
    seen = [values[~np.isnan(values)] for values in table.values]
    spreads = [float(values.var(ddof=1)) for values in seen if len(values) > 1]
    spread = math.sqrt(float(np.mean(spreads))) if spreads else 0.0
    return [
        len(values) > 0
        and objective.gain(float(values.mean()) - objective.chance)
        > 2 * spread / math.sqrt(len(values))
        for values in seen
    ]


def simple_effects(
    table: Table,
    reference: Cell,
    fitted: Fit,
    interactions: Sequence[Interaction],
    objective: Objective,
) -> tuple[SimpleEffect, ...]:
    """Of every pair that is shown to interact, the effect of each at both levels of the other."""
    found: list[SimpleEffect] = []
    for interaction in interactions:
        if interaction.verdict != verdict.MATTERS:
            continue
        pair = list(zip(interaction.factors, interaction.levels, strict=True))
        for (factor, level), (other, changed) in (pair, pair[::-1]):
            usual = reference[table.factors.index(other)]
            for given in (usual, changed):
                one = _simple(table, reference, fitted, objective, (factor, level), (other, given))
                if one is not None and one not in found:
                    found.append(one)
    return tuple(found)


def _simple(
    table: Table,
    reference: Cell,
    fitted: Fit,
    objective: Objective,
    change: tuple[str, str],
    given: tuple[str, str],
) -> SimpleEffect | None:
    """Averaged over every setting of the remaining factors in which both cells were run."""
    (factor, level), (other, stand) = change, given
    place, where = table.factors.index(factor), table.factors.index(other)
    weights: FloatArray = np.zeros(len(table.cells))
    count = 0
    for cell in table.shared:
        if cell[place] != level or cell[where] != stand:
            continue
        down = (*cell[:place], reference[place], *cell[place + 1 :])
        up_row, down_row = table.index(cell), table.index(down)
        if up_row is None or down_row is None or up_row == down_row:
            continue
        count += 1
        weights[up_row] += 1
        weights[down_row] -= 1
    if not count or not np.any(weights):
        return None
    found = effects.estimate(table.values, weights / count, fitted)
    if found is None or found.df < 1:
        return None
    half = power.t_quantile(ALPHA / 4, found.df) * found.standard_error  # two at a time
    ci = (found.delta - half, found.delta + half)
    word = verdict.judge(
        found.delta,
        different=ci[0] > 0 or ci[1] < 0,
        inside=max(abs(ci[0]), abs(ci[1])) < (objective.margin or 0.0),
        margin=objective.margin,
    )
    return SimpleEffect(factor, level, reference[place], given, found.delta, ci, word)


def settle(
    contrasts: Sequence[Contrast],
    interactions: Sequence[Interaction],
    simple: Sequence[SimpleEffect],
    *,
    aliases: Mapping[str, Sequence[str]],
    partial: Mapping[str, str],
    unlearnt: Mapping[tuple[str, str], str],
    say: sentences.Scale,
    objective: Objective,
    tuned: Mapping[tuple[str, str], Tuned],
    sigma: float,
) -> tuple[Contrast, ...]:
    """The contrasts without claims that their average, alias or level of learning forbids.

    `unlearnt`: (factor, level) -> why its runs tell nothing, where they learnt nothing.
    """
    settled = []
    for c in contrasts:
        mine = [s for s in simple if (s.factor, s.level) == (c.factor, c.level)]
        if c.estimand in ("main", "additive") and _depends(c, interactions, mine):
            c = replace(c, verdict=verdict.DEPENDS, direction=None, needs_seeds=0)
            c = replace(c, sentence=sentences.depends(c, interactions, mine, say))
        elif c.verdict == verdict.MATTERS and (aliases.get(c.factor) or c.factor in partial):
            c = replace(c, verdict=verdict.STANDS_OUT)
            if not aliases.get(c.factor):
                text = f"{c.sentence.rstrip('.')} (or it is {partial[c.factor]})."
                c = replace(c, sentence=text)
        elif c.verdict == verdict.MATTERS and (c.factor, c.level) in tuned:
            c = _beyond_tuning(c, tuned[c.factor, c.level], objective, sigma, say)
        elif c.verdict in (verdict.EQUIVALENT, verdict.NEGLIGIBLE):
            why = unlearnt.get((c.factor, c.level), "")
            if why and c.estimand != "shared":
                c = replace(c, verdict=verdict.INCONCLUSIVE, direction=None, needs_seeds=None)
                c = replace(c, sentence=sentences.unlearnt(c, why, say))
        settled.append(c)
    return tuple(settled)


def _beyond_tuning(
    c: Contrast, tuned: Tuned, objective: Objective, sigma: float, say: sentences.Scale
) -> Contrast:
    """Undecided, if the worse side may owe the difference to how it was tuned."""
    if c.ci_adjusted is None or c.basis != "difference":
        return c
    worse = tuned.reference if c.direction == "better" else tuned.level
    lost = possible_loss(worse, sigma, tuned.seeds)
    if min(abs(bound) for bound in c.ci_adjusted) > lost:
        return c
    c = replace(c, verdict=verdict.INCONCLUSIVE, direction=None, basis="none", needs_seeds=None)
    return replace(c, sentence=sentences.tuned(c, lost, tuned.seeds, objective, say))


def _depends(
    c: Contrast, interactions: Sequence[Interaction], simple: Sequence[SimpleEffect]
) -> bool:
    """The level is in an interaction that matters, and its average is not what it does."""
    if not any(i.verdict == verdict.MATTERS and _takes_part(c, i) for i in interactions):
        return False
    return c.verdict != verdict.MATTERS or len({s.delta > 0 for s in simple}) > 1


def _takes_part(c: Contrast, i: Interaction) -> bool:
    return (c.factor, c.level) in zip(i.factors, i.levels, strict=True)
