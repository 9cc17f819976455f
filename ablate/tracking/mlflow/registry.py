"""An exported model in MLflow: a logged model of its run, and a version with the alias ``best``."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow
from mlflow.entities import LoggedModelOutput, Metric, Run
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from ablate.errors import TrackingError
from ablate.records.files import find_json
from ablate.records.masking import masked_url, reason_of
from ablate.tracking.mlflow.inputs import inputs_of
from ablate.tracking.mlflow.store import checked, default_uri, load_tables, one_at_a_time

ALIAS = "best"
_VARIABLE = "MLFLOW_TRACKING_URI"
_EXPORT = "ablate.checkpoint"
"""Tag of a version: checksum of the weights that it stands for."""


def register(folder: Path, *, runs: Path, uri: str | None = None) -> str:
    """Log the model of the export in `folder` and give it the alias ``best``; its ``name@version``.

    `runs` is the folder of all study folders, whose store is meant without `uri`. The same weights
    are registered once.

    Raises:
        TrackingError: the store cannot be used, or does not hold the trial.
    """
    known = find_json(folder / "provenance.json")
    if known is None or known.get("checkpoint") is None:
        raise TrackingError(f"{folder} holds no exported model, so there is none to register")
    uri = checked(uri) if uri is not None else default_uri(runs)
    if not uri.startswith("http"):
        load_tables()
    try:
        with one_at_a_time(uri), _default_store(uri):
            client = MlflowClient(tracking_uri=uri, registry_uri=uri)
            version = _known_version(client, known) or _log_model(client, known, folder)
            client.set_registered_model_alias(known["study"], ALIAS, version)
    except MlflowException as error:
        raise TrackingError(
            f"the model is not registered in MLflow at {masked_url(uri)}: {reason_of(error)}"
        ) from error
    return f"{known['study']}@{version}"


@contextmanager
def _default_store(uri: str) -> Iterator[None]:
    """`uri` for what MLflow looks up by itself: a version's logged model, whatever the client."""
    before, told = mlflow.get_tracking_uri(), os.environ.get(_VARIABLE)
    mlflow.set_tracking_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(before)
        # It writes the variable too, in which the user's own store would be looked for next.
        os.environ.pop(_VARIABLE, None)
        if told is not None:
            os.environ[_VARIABLE] = told


def _known_version(client: MlflowClient, known: Mapping[str, Any]) -> str | None:
    try:
        client.get_registered_model(known["study"])
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        client.create_registered_model(known["study"], description=known["why"])
        return None
    found = client.search_model_versions(f"name = '{known['study']}'")
    same = [v for v in found if v.tags.get(_EXPORT) == known["checkpoint"]["sha256"]]
    return str(same[0].version) if same else None


def _log_model(client: MlflowClient, known: Mapping[str, Any], folder: Path) -> str:
    """Make the logged model and a version of it; the version."""
    run = _find_run(client, known)
    step = int(known["checkpoint"]["step"])
    name = f"{known['cell']['name']} seed {known['seed']}"
    inputs = inputs_of(known["recipe"], known["config"])
    client.log_inputs(run.info.run_id, datasets=list(inputs.values()))
    judged = [item.dataset for field, item in inputs.items() if "train" not in field]
    data = judged[0] if judged else None
    model = client.create_logged_model(
        run.info.experiment_id,
        name=re.sub(r"[/:.%\"']", "_", name),
        source_run_id=run.info.run_id,
        params={factor: str(level) for factor, level in known["levels"].items()},
        tags={"mlflow.model.isExternal": "true", "folder": str(folder.absolute())},
        model_type=known["recipe"],
    )
    measured = [
        Metric(
            metric, value, run.info.end_time or run.info.start_time, step,
            model_id=model.model_id, run_id=run.info.run_id,
            dataset_name=data.name if data else None,
            dataset_digest=data.digest if data else None,
        )
        for metric, value in known["final"].items()
        if isinstance(value, int | float)
    ]  # fmt: skip
    client.log_batch(run.info.run_id, metrics=measured)
    client.finalize_logged_model(model.model_id, "READY")
    client.log_outputs(run.info.run_id, [LoggedModelOutput(model.model_id, step)])
    version = client.create_model_version(
        known["study"],
        source=f"models:/{model.model_id}",
        run_id=run.info.run_id,
        model_id=model.model_id,
        tags={_EXPORT: known["checkpoint"]["sha256"], "trial_id": known["trial"]},
        description=known["why"],
    )
    versions = [{"name": known["study"], "version": str(version.version)}]
    client.set_logged_model_tags(model.model_id, {"mlflow.modelVersions": json.dumps(versions)})
    return str(version.version)


def _find_run(client: MlflowClient, known: Mapping[str, Any]) -> Run:
    study = known["study"]
    experiments = [
        found.experiment_id
        for found in client.search_experiments()
        if found.name == study or found.name.startswith(f"{study}-")
    ]
    trial = known["trial"]
    asked = f"tags.trial_id = '{trial}' and tags.kind = 'trial'"
    found = client.search_runs(experiments, asked, max_results=1) if experiments else []
    if not found:
        raise TrackingError(
            f"MLflow does not know trial {trial} of study {study}, so its model has no run to "
            "belong to. Mirror it first: ablate rebuild RUN"
        )
    run: Run = found[0]
    return run
