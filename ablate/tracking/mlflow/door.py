"""The one experiment of a study in one MLflow: connecting, runs, and numbers in few requests."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import mlflow.entities as entities
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from ablate.records.files import read_json, write_json
from ablate.records.folder import StudyRecord
from ablate.records.masking import flat
from ablate.tracking.mlflow.patience import Patience
from ablate.tracking.mlflow.rows import milliseconds, plain_key
from ablate.tracking.mlflow.runs import clean_tags
from ablate.tracking.mlflow.store import artifacts_of, default_uri, one_at_a_time
from ablate.tracking.mlflow.tables import tables_of

_REQUEST_S = "10"
"""Timeout of one request to a server, and one retry: its own defaults are 120 s and 7."""

_NUMBERS_AT_ONCE = 500
"""Metrics, parameters and tags of one request. MLflow takes 1,000, but at half as much
again for each: so many objects at once set off Python's collection of garbage."""

_NAMES_AT_ONCE = 100
"""Parameters of one request, MLflow's limit."""
_OWNER = "mlflow.ablate.folder"
"""Tag of an experiment: the number that its study folder keeps in mlflow.json."""

_REBUILDING = "mlflow.ablate.rebuilding"
"""Tag of an experiment that is told anew and not yet whole; what stands there is not deleted
again."""


class Shown(Protocol):
    """What is known of a run that is shown."""

    run_id: str
    status: str


class Door:
    """What is asked of MLflow; every method may raise whatever MLflow raises, and Abandoned.

    What is told of runs may stand there only after :meth:`flush`. With `by_call` each thing is told
    by a call of its own, also where MLflow's tables are at hand.
    """

    def __init__(
        self, name: str, record: StudyRecord, uri: str, patience: Patience, *, by_call: bool
    ) -> None:
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", _REQUEST_S)
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        self.uri = uri
        self.patience = patience
        with one_at_a_time(uri):
            self.client = MlflowClient(tracking_uri=uri, registry_uri=uri)
            self.experiment = self._open(name, record)
        self._tables = None if by_call else tables_of(self.client, self.experiment)
        self._inputs: list[tuple[str, Sequence[entities.DatasetInput]]] = []
        """Of runs that are not written yet."""

    def _open(self, name: str, record: StudyRecord) -> str:
        """The study's experiment. Where another folder's study has its name, it gets another one.

        Who is who is told by a number that the folder keeps: folders move, and hosts share them.
        """
        client, mine = self.client, _number_of(record)
        found = client.get_experiment_by_name(name)
        if found is not None and found.tags.get(_OWNER, mine) != mine:
            name = f"{name}-{mine}"
            found = client.get_experiment_by_name(name)
        if found is not None and found.lifecycle_stage == "deleted":
            client.restore_experiment(found.experiment_id)
        runs = record.folder.parent
        location = artifacts_of(name, uri=self.uri, runs=runs)
        ours = self.uri == default_uri(runs)
        if found is not None and ours and found.artifact_location != location:
            # The folder has moved, and an experiment's artifacts cannot move with it.
            client.rename_experiment(found.experiment_id, f"{name} before {time.time():.0f}")
            client.delete_experiment(found.experiment_id)
            found = None
        if found is None:
            tags = {_OWNER: mine}
            try:
                return str(client.create_experiment(name, artifact_location=location, tags=tags))
            except MlflowException as error:
                # A slow server made it after all, and the answer was lost.
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                found = client.get_experiment_by_name(name)
                if found is None:
                    raise
        client.set_experiment_tag(found.experiment_id, _OWNER, mine)
        return str(found.experiment_id)

    @property
    def is_rebuilding(self) -> bool:
        """Whether a rebuild was begun and never ended."""
        return bool(self.client.get_experiment(self.experiment).tags.get(_REBUILDING))

    def begin_rebuilding(self) -> None:
        self.client.set_experiment_tag(self.experiment, _REBUILDING, "yes")

    def end_rebuilding(self) -> None:
        if self.is_rebuilding:
            self.client.delete_experiment_tag(self.experiment, _REBUILDING)

    def runs(self) -> Iterator[entities.Run]:
        """Every run that is not deleted, oldest first, some in memory at a time."""
        self.flush()
        token: str | None = None
        while True:
            page = self.client.search_runs(
                [self.experiment],
                max_results=200,
                order_by=["attributes.start_time ASC"],
                page_token=token,
            )
            self.patience.arrived()
            yield from page
            token = page.token
            if not token:
                return

    def create(self, name: str, tags: Mapping[str, str], *, start: int) -> entities.Run:
        """A new run."""
        if self._tables is not None:
            if self._tables.has_many_runs:
                self.flush()
            return self._tables.create(name, clean_tags(tags), start=start)
        run = self.client.create_run(
            self.experiment, start_time=start, tags=clean_tags(tags), run_name=name
        )
        self.patience.arrived()
        return run

    def flush(self) -> None:
        """Write what was told of runs."""
        if self._tables is not None:
            self._tables.write()
            self.patience.arrived()
        while self._inputs:
            run_id, datasets = self._inputs.pop()
            self.client.log_inputs(run_id, datasets=datasets)
            self.patience.arrived()

    def log_inputs(self, run_id: str, datasets: Sequence[entities.DatasetInput]) -> None:
        """Say what data a run was made from."""
        self._inputs.append((run_id, datasets))
        if self._tables is None:
            self.flush()

    def delete(self, run_id: str) -> None:
        """Delete a run, which is written first where it is not yet."""
        self.flush()
        self.client.delete_run(run_id)
        self.patience.arrived()

    def is_deleted(self, run_id: str) -> bool:
        """Whether someone has deleted a run, so that MLflow takes nothing for it."""
        return bool(self.client.get_run(run_id).info.lifecycle_stage == "deleted")

    def log(
        self,
        run_id: str,
        *,
        metrics: Sequence[entities.Metric] = (),
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """Log to a run in as few requests as there can be; the tags arrive after all the rest."""
        if not (metrics or params or tags):
            return
        client = self.client
        named = [
            entities.Param(plain_key(key), value[:6000])
            for key, value in flat(params or {}).items()
        ]
        if self._tables is not None:
            if self._tables.has_many_points:
                self.flush()
            self._tables.log(run_id, metrics=metrics, params=named, tags=tags or {})
            return
        labels = [entities.RunTag(key, value) for key, value in (tags or {}).items()]
        while named[_NAMES_AT_ONCE:]:
            client.log_batch(run_id, params=named[:_NAMES_AT_ONCE])
            named = named[_NAMES_AT_ONCE:]
        at = 0
        while len(metrics) - at + len(named) + len(labels) > _NUMBERS_AT_ONCE:
            self.patience.look_on()
            client.log_batch(run_id, metrics=metrics[at : at + _NUMBERS_AT_ONCE])
            self.patience.arrived()
            at += _NUMBERS_AT_ONCE
        client.log_batch(run_id, metrics=metrics[at:], params=named, tags=labels)
        self.patience.arrived()

    def set_status(self, run: Shown, status: str, *, when: float | None = None) -> None:
        """Show how a run stands; `when` it ended (unix s)."""
        if run.status == status:
            return
        if self._tables is not None:
            ended = None if status == "RUNNING" else milliseconds(when or time.time())
            self._tables.set_status(run.run_id, status, ended)
        elif status == "RUNNING":
            self.client.update_run(run.run_id, status=status)
        else:
            ended = None if when is None else milliseconds(when)
            self.client.set_terminated(run.run_id, status, ended)
        run.status = status


def _number_of(record: StudyRecord) -> str:
    """Six hexadecimal digits that are this study folder's own, drawn at its first mirroring."""
    path = record.folder / "mlflow.json"
    try:
        return str(read_json(path)["folder"])
    except FileNotFoundError:
        number = secrets.token_hex(3)
        write_json(path, {"folder": number})
        return number
