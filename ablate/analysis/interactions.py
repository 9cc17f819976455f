"""Does the effect of one factor depend on another? Differences of differences."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np

from ablate.analysis import effects, power, sentences, verdict
from ablate.analysis.answer import Interaction
from ablate.analysis.contrasts import ALPHA, anytime_half, around, p_of
from ablate.analysis.effects import Estimate
from ablate.analysis.fit import Fit
from ablate.analysis.multiplicity import benjamini_hochberg
from ablate.analysis.results import Cell, Objective, Table


def find_interactions(
    table: Table,
    reference: Cell,
    fitted: Fit,
    objective: Objective,
    say: sentences.Scale,
    *,
    estimand: str,
    is_sequential: bool,
) -> tuple[Interaction, ...]:
    """All two-factor interactions whose four corners were run, or that a fraction separates."""
    model = effects.CellModel(table, order=2) if estimand == "additive" else None
    together = None if model else _changed_together(table, reference)
    found: list[tuple[tuple[str, str], tuple[str, str], Estimate]] = []
    for (i, f), (j, g) in combinations(enumerate(table.factors), 2):
        if together is not None and (i, j) not in together:
            continue
        for level_f in table.levels(f):
            for level_g in table.levels(g):
                if level_f == reference[i] or level_g == reference[j]:
                    continue
                if model is None:
                    weights = effects.cross(table, reference, (f, level_f), (g, level_g))
                else:
                    weights = effects.cross_by_model(
                        model, (i, level_f, reference[i]), (j, level_g, reference[j])
                    )
                if weights is None or not np.any(weights):
                    continue
                estimate = effects.estimate(table.values, weights, fitted)
                if estimate is not None:
                    found.append(((f, g), (level_f, level_g), estimate))
    tested = [e for *_, e in found if e.df >= 1]
    adjusted = iter(benjamini_hochberg([p_of(e, is_sequential) for e in tested]))
    interactions = []
    for names, levels, e in found:
        ci, p, p_adjusted, inside = None, None, None, False
        if e.df >= 1:
            p, p_adjusted = p_of(e, is_sequential), next(adjusted)
            if is_sequential:
                half, narrow = anytime_half(e, ALPHA), anytime_half(e, 2 * ALPHA)
            else:
                half = power.t_quantile(ALPHA / 2, e.df) * e.standard_error
                narrow = power.t_quantile(ALPHA, e.df) * e.standard_error
            ci = around(e.delta, half)
            inside = bool(objective.margin) and abs(e.delta) + narrow < (objective.margin or 0.0)
        different = p_adjusted is not None and p_adjusted <= ALPHA
        word = verdict.judge(e.delta, different=different, inside=inside, margin=objective.margin)
        interaction = Interaction(names, levels, e.delta, ci, p, p_adjusted, word, "")
        interactions.append(replace(interaction, sentence=sentences.interaction(interaction, say)))
    return tuple(interactions)


def _changed_together(table: Table, reference: Cell) -> set[tuple[int, int]]:
    """Pairs of factors that some cell changes both: the others have no interaction to judge."""
    pairs: set[tuple[int, int]] = set()
    for cell in table.shared:
        changed = [i for i, level in enumerate(cell) if level != reference[i]]
        pairs.update(combinations(changed, 2))
    return pairs
