"""Judging a recorded trial again, possibly by other thresholds than it ran with."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ablate.errors import RecordError
from ablate.markers.causes import CAUSES
from ablate.markers.clue import Cause
from ablate.markers.diagnosis import diagnose
from ablate.markers.event import Context, Event, number
from ablate.markers.judge import Judgement, Measured, judge
from ablate.markers.thresholds import ThresholdError, Thresholds
from ablate.records.folder import TrialRecord
from ablate.report.pictures.timeline import MARKERS, draw_trial
from ablate.trial.recipe import find_ability, judged, load


def replay(trial: str | os.PathLike[str], thresholds: Thresholds | None = None) -> dict[str, Any]:
    """The verdict on a trial folder by `thresholds`, JSON-able.

    Without thresholds those the trial ran with are taken; the rows and rules being the same,
    so is then the verdict.
    """
    return judge_trial(trial, thresholds).to_dict()


def judge_trial(trial: str | os.PathLike[str], thresholds: Thresholds | None = None) -> Judgement:
    """Like :func:`replay`, with the events as objects."""
    record = TrialRecord(Path(trial))
    rows, evaluations = record.trace(), record.evaluations()
    if thresholds is None:
        thresholds = Thresholds(record.trial().get("markers") or {})
    return judge(rows, evaluations, thresholds=thresholds, context=trial_context(record, rows))


def trial_context(record: TrialRecord, rows: list[Measured] | list[dict[str, Any]]) -> Context:
    """What the worker knew of the run: as it recorded it, else as far as it can be derived."""
    attempts = record.attempts()
    told: Mapping[str, Any] = {}
    if attempts:
        told = record.result(attempts[-1]) or record.heartbeat(attempts[-1]) or {}
    trial, known = record.trial(), {item.name for item in fields(Context)}
    recorded = told.get("context")
    if not isinstance(recorded, Mapping):
        return _derived(trial, rows)
    context = Context(**{key: value for key, value in recorded.items() if key in known})
    return context if "accuracy" in recorded else replace(context, accuracy=_accuracy(trial))


def _accuracy(trial: Mapping[str, Any]) -> str | None:
    """The accuracy that the trial's recipe has judged; None where it is not installed here."""
    try:
        recipe = load(trial.get("recipe", ""))
        return judged(recipe.metrics(recipe.Config(**trial["config"])))
    except ValueError:
        return None


def _derived(trial: Mapping[str, Any], rows: list[Measured] | list[dict[str, Any]]) -> Context:
    config, gang = trial.get("config", {}), trial.get("gang", {})
    batch = number(config.get("batch_size"))
    accumulated = number(config.get("accum_freq")) or 1.0
    workers = number(gang.get("workers")) or 1.0
    epochs = number(config.get("epochs"))
    steps_total = None
    if rows and epochs and (epoch := number(rows[-1].get("epoch"))):
        steps_total = round(rows[-1]["step"] / epoch * epochs)
    return Context(
        accuracy=_accuracy(trial),
        global_batch=int(batch * workers * accumulated) if batch else None,
        warmup=int(number(config.get("warmup")) or 0),
        steps_total=steps_total,
    )


def replay_run(run: str | os.PathLike[str], changes: Iterable[str] = ()) -> dict[str, Any]:
    """Trial id -> verdict, for every trial of a study folder or for one trial's folder.

    `changes` are thresholds that differ from the recorded ones: ``MARKER.THRESHOLD=VALUE``.
    ``recorded`` is what the trial was called when it ended, with the version of the rules.

    Raises:
        RecordError: the folder holds no trial. ThresholdError: a change that is none.
    """
    overrides = _parse_changes(changes)
    found = {}
    for trial in _trials(run):
        recorded = TrialRecord(trial).trial().get("markers") or {}
        names = {**recorded, **overrides}
        merged = {name: {**recorded.get(name, {}), **overrides.get(name, {})} for name in names}
        found[trial.name] = replay(trial, Thresholds(merged)) | {"recorded": _recorded(trial)}
    return found


def _recorded(trial: Path) -> dict[str, Any] | None:
    """What the trial was called when it ended, and by which version of the rules."""
    record = TrialRecord(trial)
    attempts = record.attempts()
    result = record.result(attempts[-1]) if attempts else None
    if not result or "verdict" not in result:
        return None
    told = result.get("markers")
    version = told.get("version") if isinstance(told, Mapping) else None
    return {"verdict": result["verdict"], "version": version}


def num_unjudged(run: str | os.PathLike[str]) -> int:
    """How many of the trials told nothing that the markers could judge."""
    said = (_recorded(trial) for trial in _trials(run))
    return sum(found is not None and not found["verdict"] for found in said)


def diagnose_run(
    run: str | os.PathLike[str], *, asked: Iterable[str] = ()
) -> dict[str, list[dict[str, Any]]]:
    """Trial id -> likely causes of its events, most likely first; trials without any left out.

    A trial that its events do not name has none, unless it has a flag that is `asked` about.

    Raises:
        RecordError: the folder holds no trial.
    """
    found = {}
    for trial in _trials(run):
        judgement, recorded = judge_trial(trial), TrialRecord(trial).trial()
        suspects = diagnose(
            judgement.events,
            config=recorded["config"],
            silent=judgement.verdict.silent,
            causes=(*CAUSES, *_own_causes(recorded.get("recipe", ""))),
            asked=asked,
        )
        if suspects:
            found[trial.name] = [suspect.to_dict() for suspect in suspects]
    return found


def _own_causes(recipe: str) -> Iterable[Cause]:
    """What only a model of this recipe can suffer from."""
    try:
        own = find_ability(recipe, "causes")
    except ValueError:  # a recipe that is not installed here
        return ()
    return own() if own else ()


def draw_record(path: Path, record: TrialRecord, *, title: str, verdict: str) -> None:
    """Draw one recorded trial with the events that it recorded; PNG or SVG, as `path` ends."""
    rows = record.trace()
    events = [Event.from_dict(row) for row in record.events() if row["marker"] in MARKERS]
    draw_trial(
        path,
        rows,
        record.evaluations(),
        events,
        title=title,
        verdict=verdict,
        stop_step=min((item.detected_at for item in events if item.stop), default=None),
        context=trial_context(record, rows),
    )


def _trials(run: str | os.PathLike[str]) -> list[Path]:
    folder = Path(run)
    if (folder / "trial.json").exists():
        return [folder]
    trials = sorted(path.parent for path in folder.glob("trials/*/trial.json"))
    if not trials:
        what = "holds no trial" if folder.is_dir() else "is no folder"
        raise RecordError(
            f"{folder} {what}; give a study folder (runs/NAME) or one trial's "
            "(runs/NAME/trials/ID). A run made elsewhere: ablate markers import FILE"
        )
    return trials


def _parse_changes(changes: Iterable[str]) -> dict[str, dict[str, Any]]:
    parsed: dict[str, dict[str, Any]] = {}
    for change in changes:
        place, equals, text = change.partition("=")
        marker, dot, name = place.partition(".")
        if not (equals and dot):
            raise ThresholdError(
                f"{change!r}: write MARKER.THRESHOLD=VALUE, e.g. loss_spike.sigma=4"
            )
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        parsed.setdefault(marker, {})[name] = value
    return parsed
