"""How much each factor mattered in a search, by Optuna's evaluators: exploratory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import optuna

from ablate.analysis.results import Result, Score
from ablate.errors import AnalysisError
from ablate.search.cells import end_of
from ablate.search.space import params_of, space_of
from ablate.study import Study
from ablate.trial import Levels


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
    space = space_of(study)
    by_cell: dict[Levels, list[Result]] = {}
    for result in results:
        by_cell.setdefault(result.levels, []).append(result)
    cells = {levels: end_of(mine, score) for levels, mine in by_cell.items()}
    scored = [
        (params, ended.value)
        for levels, ended in cells.items()
        if ended.value is not None and (params := params_of(space, dict(levels))) is not None
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
