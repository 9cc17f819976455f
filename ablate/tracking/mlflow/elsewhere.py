"""The runs of an MLflow experiment of somebody else's; nothing is written there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from ablate.errors import AnalysisError
from ablate.markers.foreign.columns import rows_of
from ablate.markers.foreign.finish import finish
from ablate.markers.foreign.run import Evaluated, ForeignError, Record, Source
from ablate.records.masking import masked_url
from ablate.study.elsewhere import ENDED, MOST_RUNS, Made
from ablate.trial.trainers import known_trainers


def read_runs(store: str, *, experiment: str | None = None) -> list[Made]:
    """The ended runs of an experiment in a tracking store: its URI, an SQLite file, or a folder
    ``mlruns``. Child runs count as runs of their own.

    Raises:
        AnalysisError: several experiments have runs and none is named, or it is no such store.
    """
    uri = store
    if "://" not in store:
        path = Path(store).absolute()
        uri = path.as_uri() if path.is_dir() else f"sqlite:///{path}"
    shown = masked_url(uri)
    try:
        client = MlflowClient(uri)
        known = {each.name: each.experiment_id for each in client.search_experiments()}
        if experiment is None:
            known = {n: key for n, key in known.items() if client.search_runs([key], max_results=1)}
        if len(known) != 1 and experiment not in known:
            raise AnalysisError(
                f"{shown} has runs in {len(known)} experiments: {', '.join(sorted(known)[:10])}; "
                "name one: --experiment NAME"
            )
        wanted = known[experiment] if experiment else next(iter(known.values()))
        runs = client.search_runs([wanted], max_results=MOST_RUNS + 1)
        return [_made(client, run, shown) for run in runs if run.info.status.lower() in ENDED]
    except MlflowException as error:
        raise AnalysisError(f"{shown} cannot be read as an MLflow store: {error}") from None


def _made(client: MlflowClient, run: Run, shown: str) -> Made:
    key = run.info.run_id
    steps: dict[int, dict[str, Any]] = {}
    for name in run.data.metrics:
        for point in client.get_metric_history(key, name):
            steps.setdefault(point.step, {"step": point.step})[name] = point.value
    curves = [steps[step] for step in sorted(steps)]
    notes: list[str] = []
    rows, about = _judged([Record(f"{shown}: {key}", row) for row in curves], notes)
    ended = run.info.end_time or run.info.start_time
    return Made(
        name=run.info.run_name or key,
        settings=dict(run.data.params),
        values=dict(run.data.metrics),
        outcome=ENDED[run.info.status.lower()],
        rows=rows,
        curves=curves,
        about=about,
        wall_s=max(ended - run.info.start_time, 0) / 1000,
        notes=notes,
    )


def _judged(
    records: list[Record], notes: list[str]
) -> tuple[list[Mapping[str, Any]], Mapping[str, Any]]:
    known = Evaluated(known_trainers())
    source = Source("the run", records, evaluated=known)
    try:
        found = finish(rows_of(source, {}), source.notes, source.context, known)
    except ForeignError as error:
        notes.append(f"not judged by the markers: {error}")
        return [], {}
    notes += found.notes
    return list(found.rows), asdict(found.context)
