"""One trial alone: no study around it, no Ray, nothing but its folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ablate.cluster.contract import Attempt
from ablate.cluster.local import LocalCluster
from ablate.errors import ClusterError, RecordError
from ablate.records.files import find_json, write_json
from ablate.records.folder import TrialRecord
from ablate.records.provenance import fingerprint
from ablate.study import Study
from ablate.trial.identity import Trial

GRACE_S = 120.0
"""From the request to stop until a rank is killed; it writes a checkpoint in between."""


@dataclass(frozen=True, slots=True)
class Trained:
    """How a run ended."""

    folder: Path
    status: str
    """completed, diverged, infeasible, failed; or stopped: run again to go on."""
    reason: str
    step: int
    final: Mapping[str, Any]
    """Measurements of the last evaluation."""

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "folder": str(self.folder)}


def train(
    study: Study,
    *,
    seed: int,
    folder: Path | None = None,
    stop: Callable[[TrialRecord], bool] = lambda trial: False,
    tell: Callable[[str], None] = lambda line: None,
) -> Trained:
    """Train the study's baseline with one seed in `folder` (runs/trained/ID), on this machine.

    The same processes, threads and numbers as when a study runs it. A run that was stopped goes on
    from its last checkpoint. `stop` is asked about once a second, `tell` gets what goes on.

    Raises:
        RecordError: another trial is in the folder.
        ClusterError: this machine cannot hold the gang, or a rank crashed.
    """
    trial = study.trial(study.cell({}), seed=seed)
    record = _prepare(trial, folder or Path("runs") / "trained" / trial.id)
    shape = study.gang.shape()
    number = max(record.attempts(), default=0) + 1
    record.attempt_folder(number).mkdir(parents=True)
    attempt = Attempt(trial_id=trial.id, number=number, folder=record.folder, shape=shape)
    cpus = max(os.cpu_count() or 1, shape.workers * shape.cpus_per_worker)
    said = ""
    with LocalCluster(num_cpus=cpus, num_gpus=shape.workers * shape.gpus_per_worker) as cluster:
        cluster.start(attempt)
        while True:
            event = next((e for e in cluster.wait(1.0) if e.kind != "placed"), None)
            if event is not None:
                break
            line = _progress(record.heartbeat(number))
            if line and line != said:
                tell(line)
                said = line
            if stop(record):
                cluster.stop(trial.id, grace_s=GRACE_S)
    result = record.result(number)
    if result is None and event.stopped:
        result = {"status": "stopped", "reason": event.detail, "step": record.last_step(number)}
    if result is None:
        raise ClusterError(f"{event.detail}\n{record.log_tail(number)}".rstrip())
    return Trained(
        folder=record.folder,
        status=result["status"],
        reason=result["reason"],
        step=int(result.get("step") or 0),
        final=result.get("final") or {},
    )


def _prepare(trial: Trial, folder: Path) -> TrialRecord:
    """The trial's folder with its trial.json."""
    record = TrialRecord(folder.resolve())
    known = find_json(folder / "trial.json")
    if known is None:
        if folder.is_dir() and any(folder.iterdir()):
            raise RecordError(f"{folder} holds other files. Give an empty folder, or a new one")
        folder.mkdir(parents=True, exist_ok=True)
        content = {**trial.to_json(), "fingerprint": fingerprint()}
        write_json(folder / "trial.json", content)
    elif known["id"] != trial.id:
        raise RecordError(
            f"{folder} holds trial {known['id']}, and this is {trial.id}, another setting or seed. "
            "Give another folder"
        )
    return record


def _progress(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    return ", ".join(
        f"{name} {row[name]:.4g}" if isinstance(row[name], float) else f"{name} {row[name]}"
        for name in ("step", "loss", "samples_per_s")
        if row.get(name) is not None
    )
