"""What a trial costs, measured before it is paid for: a few real steps of each distinct shape.

A shape is all that changes the pace: model, precision, batch, augmentation, loader, gang. Each is
run once as a trial of a few steps with one evaluation, by the cluster and the worker that run the
study, in ``probes/`` of the study folder, and its pace is kept there:

    RUNS/<study>/probes/<shape>.json

Training costs steps times the time of a step, evaluations as measured, and whatever else the probe
took (starting up, a checkpoint, leaving) once.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ablate.cluster.contract import Attempt, Cluster
from ablate.errors import PlanError
from ablate.records.files import read_json, write_json
from ablate.records.folder import StudyRecord, TrialRecord
from ablate.study import Study
from ablate.trial.identity import Trial, identify
from ablate.trial.recipe import Role, ability, fields_of, load

STEPS = 40
"""Optimizer steps of a probe."""
DROPPED = 10
"""The first of them, which warm up caches and kernels, are not counted."""


@dataclass(frozen=True, slots=True)
class Pace:
    """What a shape was measured to take."""

    shape: str
    trial: str
    """What differs from the baseline in the trial that was measured."""
    step_s_p50: float
    step_s_p90: float
    evaluation_s: float
    """All evaluations of one epoch."""
    other_s: float
    """Starting up, a checkpoint and leaving."""
    steps: int
    """Steps that were measured."""
    nodes: tuple[str, ...]
    time: float
    """Unix seconds."""

    def trial_s(self, *, steps: int, evaluations: int) -> tuple[float, float]:
        """Seconds of a whole trial: median, and with every step as slow as the slowest tenth."""
        rest = evaluations * self.evaluation_s + self.other_s
        return steps * self.step_s_p50 + rest, steps * self.step_s_p90 + rest


def shape_of(study: Study, trial: Trial) -> str:
    """12 hexadecimal digits; equal for trials that take the same time per step."""
    recipe = load(study.recipe)
    return identify(
        study.recipe,
        {**trial.config, "gang": dict(trial.gang)},
        workers=study.gang.workers,
        not_identity=(*fields_of(recipe.Config, Role.SAME_PACE), "seed"),
    )


def paces(record: StudyRecord) -> dict[str, Pace]:
    """What has been measured in this study folder, by shape."""
    found = {}
    for path in sorted((record.folder / "probes").glob("*.json")):
        content = read_json(path)
        found[path.stem] = Pace(**{**content, "nodes": tuple(content["nodes"])})
    return found


def measure(
    study: Study,
    record: StudyRecord,
    trials: Iterable[Trial],
    cluster: Cluster,
    *,
    entry: str,
    steps: int = STEPS,
    tell: Callable[[str], None] = lambda line: None,
) -> dict[str, Pace]:
    """Run a probe of each shape among `trials` that has none yet; all paces by shape.

    One at a time, as a gang of its own: probes beside each other would measure each other.

    Raises:
        AbilityError: the recipe cannot shorten a run.
        PlanError: a probe did not end as it should; the message holds the tail of its log.
        PlacementError: no gang of this study fits the cluster.
    """
    ability(study.recipe, "shorten")  # or nothing is begun
    known = paces(record)
    usual = study.baseline_levels()
    missing: dict[str, Trial] = {}
    # The plainest trial of a shape stands for it: people know the baseline by name.
    for trial in sorted(trials, key=lambda t: sum(usual[f] != x for f, x in t.cell.levels)):
        shape = shape_of(study, trial)
        if shape not in known:
            missing.setdefault(shape, trial)
    for number, (shape, trial) in enumerate(missing.items(), start=1):
        name = study.change_name(dict(trial.cell.levels))
        tell(f"probe {number} of {len(missing)}: {name}, {steps} steps ...")
        pace = _run(study, record, trial, cluster, shape=shape, entry=entry, steps=steps)
        known[shape] = pace
        tell(
            f"  {pace.step_s_p50:.3g} s a step (p90 {pace.step_s_p90:.3g}), "
            f"{pace.evaluation_s:.3g} s an evaluation, {pace.other_s:.3g} s to start and end"
        )
    return known


def _run(
    study: Study,
    record: StudyRecord,
    trial: Trial,
    cluster: Cluster,
    *,
    shape: str,
    entry: str,
    steps: int,
) -> Pace:
    recipe = load(study.recipe)
    workers = study.gang.workers
    shorten = ability(study.recipe, "shorten")
    config = shorten(recipe.Config(**trial.config), steps=steps, workers=workers)
    content = {**trial.to_json(), "id": shape, "config": config.model_dump(mode="json")}
    home = StudyRecord(record.folder / "probes")
    shutil.rmtree(home.record(shape).folder, ignore_errors=True)
    folder = home.write_trial(content)
    number = home.new_attempt(folder)
    began = time.monotonic()
    cluster.start(Attempt(shape, number, folder.folder.absolute(), study.gang.shape(), entry))
    while True:
        ended = None
        for event in cluster.wait(1.0):
            if event.trial_id != shape:
                continue
            if event.kind == "placed":
                began = time.monotonic()
            else:
                ended = event
        if ended is not None:
            break
    wall_s = time.monotonic() - began
    result = folder.result(number)
    if result is None or result["status"] != "completed":
        why = (result or {}).get("reason") or ended.detail
        raise PlanError(
            f"the probe of {study.change_name(dict(trial.cell.levels))} did not complete: {why}\n"
            f"{folder.log_tail(number)}".rstrip()
        )
    pace = _pace(study, trial, folder, shape=shape, wall_s=wall_s, nodes=ended.nodes)
    write_json(record.folder / "probes" / f"{shape}.json", asdict(pace))
    shutil.rmtree(folder.folder)
    return pace


def _pace(
    study: Study, trial: Trial, folder: TrialRecord, *, shape: str, wall_s: float, nodes: Any
) -> Pace:
    times = [float(row["time"]) for row in folder.trace()]
    steps_s = np.diff(times)
    evaluated = [float(row["time"]) for row in folder.evaluations()]
    evaluation_s = max(evaluated[-1] - times[-1], 0.0) if evaluated else 0.0
    counted = steps_s[min(DROPPED, len(steps_s) // 2) :]
    return Pace(
        shape=shape,
        trial=study.change_name(dict(trial.cell.levels)),
        step_s_p50=float(np.median(counted)),
        step_s_p90=float(np.quantile(counted, 0.9)),
        evaluation_s=evaluation_s,
        other_s=max(wall_s - float(times[-1] - times[0]) - evaluation_s, 0.0),
        steps=len(counted),
        nodes=tuple(nodes),
        time=time.time(),
    )
