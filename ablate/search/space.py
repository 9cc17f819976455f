"""A study in Optuna's terms: its factors as parameters, its objectives, the states of its cells."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import TrialState

from ablate.errors import PlanError
from ablate.search.cells import Ended
from ablate.study import Factor, Study

optuna.logging.set_verbosity(optuna.logging.WARNING)


def space_of(study: Study) -> dict[str, BaseDistribution]:
    """Factor -> what may be chosen: level names, or numbers of a range.

    Raises:
        PlanError: a range of whole numbers that holds none.
    """
    return {factor.name: _distribution(factor) for factor in study.factors}


def params_of(
    space: Mapping[str, BaseDistribution],
    levels: Mapping[str, str],
    *,
    strict: bool = True,
    inactive: Collection[str] = (),
) -> dict[str, Any] | None:
    """Optuna's parameters of these levels; None if they lie outside the space.

    Factors that are `inactive`, their condition not being met, are none of the cell's parameters.

    A baseline may lie outside the range that is searched: not `strict`, it keeps its value.
    """
    params: dict[str, Any] = {}
    for name, distribution in space.items():
        if name in inactive:
            continue
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


def name_level(value: Any) -> str:
    """The name of the level that a parameter stands for."""
    return repr(value) if isinstance(value, (int, float)) else str(value)


def directions_of(study: Study) -> tuple[str, ...]:
    """Of what is optimised: the score, and the cost it is weighed against if there is one."""
    objective = study.objective
    if objective.cost is None:
        return (objective.direction,)
    return (objective.direction, objective.cost_direction)


def state_of(ended: Ended, num_objectives: int) -> tuple[TrialState, list[float] | None]:
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
