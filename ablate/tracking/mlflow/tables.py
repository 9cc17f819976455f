"""What is told of runs, written straight into MLflow's tables, many runs in one transaction.

Told call by call, a run takes MLflow eight transactions and as many rounds of loading and checking
its objects. Where its store is a database that this process opens itself, all that is new of it is
a few rows of five tables. What stands there afterwards is the same; a server is told call by call.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunData, RunInfo, RunTag
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST
from mlflow.store.tracking.dbmodels import models
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

_RUNS_AT_ONCE, _POINTS_AT_ONCE = 20, 5000
"""Of a transaction: no other writer waits longer than that takes."""

_Rows = list[dict[str, Any]]


@dataclass(slots=True)
class _News:
    """What is not written yet of a run."""

    row: dict[str, Any] = field(default_factory=dict)
    """What changes of its own row."""
    is_new: bool = False
    tags: dict[str, str] = field(default_factory=dict)
    params: dict[str, str] = field(default_factory=dict)
    metrics: list[Metric] = field(default_factory=list)


class Tables:
    """The runs of one experiment, with what is not written of them; see the module's text."""

    def __init__(self, store: SqlAlchemyStore, experiment: str) -> None:
        self._engine = store.engine
        self._experiment = experiment
        self._location = str(store.get_experiment(experiment).artifact_location).rstrip("/")
        self._news: dict[str, _News] = {}
        self._points = 0

    @property
    def has_many_runs(self) -> bool:
        """Whether it is time to write, before another run begins."""
        return len(self._news) >= _RUNS_AT_ONCE

    @property
    def has_many_points(self) -> bool:
        """Whether it is time to write, also in the middle of a run."""
        return self._points >= _POINTS_AT_ONCE

    def create(self, name: str, tags: Mapping[str, str], *, start: int) -> Run:
        run_id = uuid.uuid4().hex
        row = {
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
        told = {**tags, "mlflow.runName": name}
        self._news[run_id] = _News(row, is_new=True, tags=told)
        info = RunInfo(
            run_id, self._experiment, row["user_id"], "RUNNING", start, None, "active",
            artifact_uri=row["artifact_uri"], run_name=name,
        )  # fmt: skip
        return Run(info, RunData(tags=[RunTag(*pair) for pair in told.items()]))

    def log(
        self,
        run_id: str,
        *,
        metrics: Sequence[Metric],
        params: Sequence[Param],
        tags: Mapping[str, str],
    ) -> None:
        news = self._news.setdefault(run_id, _News())
        news.metrics.extend(metrics)
        news.params.update((param.key, param.value) for param in params)
        news.tags.update(tags)
        self._points += len(metrics)

    def set_status(self, run_id: str, status: str, when: int | None) -> None:
        """`when` it ended (unix ms); None while it runs."""
        news = self._news.setdefault(run_id, _News())
        news.row |= {"status": status, "end_time": when}

    def write(self) -> None:
        """Write all that is new, or nothing of it.

        Raises:
            MlflowException: a run is no longer there.
            sqlalchemy.exc.SQLAlchemyError: the database does not take it.
        """
        if not self._news:
            return
        old = [run_id for run_id, news in self._news.items() if not news.is_new]
        with self._engine.begin() as connection:
            _check_active(connection, old)
            latest = _latest_of(connection, [i for i in old if self._news[i].metrics])
            made: dict[type[Any], _Rows] = {model: [] for model in _KEYS}
            for run_id, news in self._news.items():
                named = {"run_uuid": run_id}
                if news.is_new:
                    made[models.SqlRun].append({**named, **news.row})
                elif news.row:
                    table = models.SqlRun.__table__
                    change = sqlalchemy.update(table).where(table.c.run_uuid == run_id)
                    connection.execute(change.values(**news.row))
                for model, told in ((models.SqlTag, news.tags), (models.SqlParam, news.params)):
                    made[model] += [{**named, "key": k, "value": v} for k, v in told.items()]
                points, last = _points(news.metrics, run_id, latest.get(run_id, {}))
                made[models.SqlMetric] += points
                made[models.SqlLatestMetric] += last
            for model, rows in made.items():
                _put(connection, model, rows, anew=frozenset(old))
        self._news.clear()
        self._points = 0


def tables_of(client: MlflowClient, experiment: str) -> Tables | None:
    """Where what is new is collected; None where the store is a server."""
    store = client._tracking_client.store
    return Tables(store, experiment) if isinstance(store, SqlAlchemyStore) else None


_KEYS: dict[type[Any], tuple[str, ...]] = {
    models.SqlRun: ("run_uuid",),
    models.SqlTag: ("run_uuid", "key"),
    models.SqlParam: ("run_uuid", "key"),
    models.SqlMetric: ("run_uuid", "key", "timestamp", "step", "value", "is_nan"),
    models.SqlLatestMetric: ("run_uuid", "key"),
}
"""What a row is known by, in each table."""


def _put(
    connection: sqlalchemy.Connection, model: type[Any], rows: _Rows, *, anew: frozenset[str]
) -> None:
    """Insert rows; those of the runs `anew` may stand there already, and are replaced."""
    table, keys = model.__table__, _KEYS[model]
    gone = [{f"old_{key}": row[key] for key in keys} for row in rows if row["run_uuid"] in anew]
    if gone:
        alike = [table.c[key] == sqlalchemy.bindparam(f"old_{key}") for key in keys]
        connection.execute(sqlalchemy.delete(table).where(*alike), gone)
    if rows:
        connection.execute(sqlalchemy.insert(table), rows)


def _check_active(connection: sqlalchemy.Connection, run_ids: Sequence[str]) -> None:
    runs = models.SqlRun.__table__
    asked = sqlalchemy.select(runs.c.run_uuid).where(
        runs.c.run_uuid.in_(run_ids), runs.c.lifecycle_stage == "active"
    )
    gone = set(run_ids) - set(connection.scalars(asked))
    if gone:
        raise MlflowException(
            f"run {min(gone)} was deleted there", error_code=RESOURCE_DOES_NOT_EXIST
        )


_Place = tuple[int, int, float]
"""Step, time and value of a point: the largest is a key's latest, by MLflow's order."""


def _latest_of(
    connection: sqlalchemy.Connection, run_ids: Sequence[str]
) -> dict[str, dict[str, _Place]]:
    """Run -> key -> what stands there as its latest."""
    found: dict[str, dict[str, _Place]] = {}
    table = models.SqlLatestMetric.__table__
    columns = (table.c[name] for name in ("run_uuid", "key", "step", "timestamp", "value"))
    asked = sqlalchemy.select(*columns).where(table.c.run_uuid.in_(run_ids))
    for run_id, key, step, timestamp, value in connection.execute(asked) if run_ids else ():
        found.setdefault(run_id, {})[key] = (step, timestamp, value)
    return found


def _points(
    metrics: Iterable[Metric], run_id: str, known: Mapping[str, _Place]
) -> tuple[_Rows, _Rows]:
    """Rows of the points, each once, and of the latest of every key where it is later than what is
    known of it."""
    points: dict[tuple[Any, ...], dict[str, Any]] = {}
    latest: dict[str, dict[str, Any]] = {}
    places = dict(known)
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
        if metric.key not in places or place > places[metric.key]:
            places[metric.key], latest[metric.key] = place, row
    return list(points.values()), list(latest.values())
