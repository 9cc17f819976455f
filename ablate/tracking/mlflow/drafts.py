"""Runs that have ended before they are told, written whole, many in one transaction.

Told call by call, a run takes MLflow eight transactions and as many rounds of loading and checking
its objects. Where its store is a database that this process opens itself, such a run is a few rows
of five tables. What stands there afterwards is the same; a server is told call by call.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunData, RunInfo, RunTag
from mlflow.store.tracking.dbmodels import models
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

_AT_ONCE = 20
"""Runs of a transaction: no other writer waits longer than that takes."""


@dataclass(slots=True)
class _Draft:
    """A run that is not told yet."""

    row: dict[str, Any]
    tags: dict[str, str]
    params: dict[str, str] = field(default_factory=dict)
    metrics: list[Metric] = field(default_factory=list)


class Drafts:
    """The runs of one experiment that are collected; see the module's text."""

    def __init__(self, store: SqlAlchemyStore, experiment: str) -> None:
        self._engine = store.engine
        self._experiment = experiment
        self._location = str(store.get_experiment(experiment).artifact_location).rstrip("/")
        self._drafts: dict[str, _Draft] = {}

    def __contains__(self, run_id: str) -> bool:
        return run_id in self._drafts

    @property
    def is_full(self) -> bool:
        return len(self._drafts) >= _AT_ONCE

    def begin(self, name: str, tags: Mapping[str, str], *, start: int) -> Run:
        run_id = uuid.uuid4().hex
        row = {
            "run_uuid": run_id,
            "name": name,
            "source_type": "UNKNOWN",
            "source_name": "",
            "entry_point_name": "",
            "source_version": "",
            "user_id": tags.get("mlflow.user", "unknown"),
            "status": "RUNNING",
            "start_time": start,
            "end_time": None,
            "lifecycle_stage": "active",
            "artifact_uri": f"{self._location}/{run_id}/artifacts",
            "experiment_id": int(self._experiment),
        }
        draft = self._drafts[run_id] = _Draft(row, {**tags, "mlflow.runName": name})
        info = RunInfo(
            run_id, self._experiment, row["user_id"], "RUNNING", start, None, "active",
            artifact_uri=row["artifact_uri"], run_name=name,
        )  # fmt: skip
        return Run(info, RunData(tags=[RunTag(*pair) for pair in draft.tags.items()]))

    def log(
        self,
        run_id: str,
        *,
        metrics: Sequence[Metric],
        params: Sequence[Param],
        tags: Mapping[str, str],
    ) -> None:
        draft = self._drafts[run_id]
        draft.metrics.extend(metrics)
        draft.params.update((param.key, param.value) for param in params)
        draft.tags.update(tags)

    def end(self, run_id: str, status: str, when: int) -> None:
        self._drafts[run_id].row |= {"status": status, "end_time": when}

    def write(self) -> None:
        """Write all that is collected, or nothing of it.

        Raises:
            sqlalchemy.exc.SQLAlchemyError: the database does not take it.
        """
        if not self._drafts:
            return
        rows: dict[Any, list[dict[str, Any]]] = {
            models.SqlRun: [draft.row for draft in self._drafts.values()],
            models.SqlTag: [],
            models.SqlParam: [],
            models.SqlMetric: [],
            models.SqlLatestMetric: [],
        }
        for run_id, draft in self._drafts.items():
            named = {"run_uuid": run_id}
            for table, content in ((models.SqlTag, draft.tags), (models.SqlParam, draft.params)):
                rows[table] += [{**named, "key": k, "value": v} for k, v in content.items()]
            points, latest = _points(draft.metrics, run_id)
            rows[models.SqlMetric] += points
            rows[models.SqlLatestMetric] += latest
        with self._engine.begin() as connection:
            for model, told in rows.items():
                if told:
                    connection.execute(sqlalchemy.insert(model.__table__), told)
        self._drafts.clear()


def drafts_of(client: MlflowClient, experiment: str) -> Drafts | None:
    """Where runs are collected; None where the store is a server."""
    store = client._tracking_client.store
    return Drafts(store, experiment) if isinstance(store, SqlAlchemyStore) else None


def _points(
    metrics: Sequence[Metric], run_id: str
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of the points, each once, and of the latest of every key, by MLflow's order."""
    points: dict[tuple[Any, ...], dict[str, Any]] = {}
    latest: dict[str, tuple[tuple[int, int, float], dict[str, Any]]] = {}
    for metric in metrics:
        is_nan = math.isnan(metric.value)
        value = 0.0 if is_nan else metric.value
        row = {
            "key": metric.key,
            "value": value,
            "timestamp": metric.timestamp,
            "step": metric.step,
            "is_nan": is_nan,
            "run_uuid": run_id,
        }
        points[metric.key, metric.step, metric.timestamp, value, is_nan] = row
        place = (metric.step, metric.timestamp, value)
        if metric.key not in latest or place > latest[metric.key][0]:
            latest[metric.key] = place, row
    return list(points.values()), [row for _, row in latest.values()]
