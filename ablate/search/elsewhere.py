"""An Optuna storage of somebody else's as runs; it is read, and nothing is written there."""

from __future__ import annotations

from pathlib import Path

import optuna
import sqlalchemy.exc
from optuna.trial import FrozenTrial, TrialState

from ablate.errors import AnalysisError
from ablate.records.masking import masked_url
from ablate.study.elsewhere import Made, flat

_OUTCOMES = {
    TrialState.COMPLETE: "completed",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
}


def read_runs(storage: str, *, study: str | None = None) -> list[Made]:
    """The ended trials of a study in a storage's URL, or the path of an SQLite file.

    Raises:
        AnalysisError: several studies and none named, or no storage of Optuna's.
    """
    url = storage if "://" in storage else f"sqlite:///{Path(storage).absolute()}"
    shown = masked_url(url)
    try:
        names = optuna.get_all_study_names(url)
        if study is None and len(names) != 1:
            raise AnalysisError(
                f"{shown} holds {len(names)} studies: {', '.join(names[:10])}; name one: "
                "--experiment NAME"
            )
        found = optuna.load_study(study_name=study or names[0], storage=url)
    except (sqlalchemy.exc.SQLAlchemyError, KeyError, RuntimeError) as error:
        raise AnalysisError(f"{shown} cannot be read as an Optuna storage: {error}") from None
    measured = found.metric_names or [
        "value" if len(found.directions) == 1 else f"value_{k}"
        for k in range(len(found.directions))
    ]
    return [_made(trial, measured) for trial in found.trials if trial.state in _OUTCOMES]


def _made(trial: FrozenTrial, measured: list[str]) -> Made:
    values = dict(zip(measured, trial.values or (), strict=False))
    told = trial.intermediate_values
    if not values and told:  # pruned: the last it reported
        values = {measured[0]: told[max(told)]}
    return Made(
        name=f"trial {trial.number}",
        settings=flat(trial.params),
        values=values,
        outcome=_OUTCOMES[trial.state],
        curves=[{"step": step, measured[0]: told[step]} for step in sorted(told)],
        wall_s=trial.duration.total_seconds() if trial.duration else 0.0,
    )
