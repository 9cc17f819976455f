"""What came of a trial, as the analysis reads it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ablate.analysis.course import At, values_of
from ablate.analysis.results import Result, is_score
from ablate.records.folder import TrialRecord
from ablate.trial import metrics
from ablate.trial.identity import Outcome, Trial


def judged(
    objective: Mapping[str, Any], folder: TrialRecord, outcome: Mapping[str, Any]
) -> Mapping[str, Any]:
    """An outcome.json with the value that the study's objective asks for today.

    What was written when the trial ended is its last evaluation of what was asked then; the rest is
    in its records. A trial that did not measure what is asked has failed, by this objective.
    """
    if outcome["outcome"] != Outcome.COMPLETED:
        return outcome
    if objective.get("at", "last") == "last":
        return _by_last(objective["metric"], folder, outcome)
    values = told_values(objective, folder.evaluations())
    if objective["at"] in values:
        return {**outcome, "value": values[objective["at"]]}
    asked = (
        f"the mean of the last {objective['k']} evaluations of {objective['metric']}"
        if objective["at"] == "mean_last_k"
        else f"an evaluation of both {objective['metric']} and {objective['heldout']}"
    )
    why = f"it did not measure {asked}; evaluate more often, or set objective.at: last"
    return {**outcome, "outcome": str(Outcome.FAILED), "value": None, "reason": why}


def _by_last(metric: str, folder: TrialRecord, outcome: Mapping[str, Any]) -> Mapping[str, Any]:
    final = outcome.get("final") or {}
    value = final.get(metric)
    if outcome["value"] == value or folder.trial()["objective"]["metric"] == metric:
        return outcome
    if isinstance(value, (int, float)):
        if is_score(value):
            return {**outcome, "value": float(value)}
        why = f"{metric} is {value} at step {outcome.get('step', 0)}"
        return {**outcome, "outcome": str(Outcome.DIVERGED), "value": None, "reason": why}
    why = f"it ended without {metric}; it measured: {', '.join(sorted(final)) or 'nothing'}"
    return {**outcome, "outcome": str(Outcome.FAILED), "value": None, "reason": why}


def told_values(
    objective: Mapping[str, Any], evaluations: Sequence[Mapping[str, Any]]
) -> dict[At, float]:
    """The number of a run under each choice of ``objective.at`` that its evaluations allow."""
    return values_of(
        evaluations,
        metric=objective["metric"],
        k=objective["k"],
        heldout=objective["heldout"],
        sign=1.0 if objective["direction"] == "maximize" else -1.0,
    )


def result_of(trial: Trial, folder: TrialRecord, outcome: Mapping[str, Any]) -> Result:
    """A trial with its outcome.json, as the analysis reads it."""
    outcome = judged(trial.objective, folder, outcome)
    return Result(
        levels=trial.cell.levels,
        seed=trial.seed,
        outcome=outcome["outcome"],
        value=outcome["value"],
        trial_id=trial.id,
        verdict=outcome.get("verdict") or "",
        flags=tuple(outcome.get("flags") or ()),
        cost=cost_of(trial.objective.get("cost"), outcome, workers=trial.gang["workers"]),
    )


def cost_of(name: str | None, outcome: Mapping[str, Any], *, workers: int) -> float | None:
    """The cost called `name` (``metrics.COSTS``, or a measurement) of a completed trial, from its
    outcome.json.

    None for other trials (one that diverged early is not cheap), and where it was not measured.
    """
    if name is None or outcome["outcome"] != "completed":
        return None
    value: Any
    if name == "gpu_hours":
        # Said where an attempt had fewer workers.
        value = outcome.get("worker_s", outcome["wall_s"] * workers) / 3600
    elif name == "mean_step_time_s":
        steps = outcome.get("step")
        value = outcome["train_s"] / steps if steps and outcome.get("train_s") else None
    elif name in metrics.COSTS:
        value = outcome.get(name)
    else:
        value = (outcome.get("final") or {}).get(name)
    return float(value) if value is not None and math.isfinite(value) else None
