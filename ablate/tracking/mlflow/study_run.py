"""The study's own run, and what stands above the table: the answer so far, views, files."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

from mlflow.exceptions import MlflowException

from ablate.records.masking import artifact_path, masked_url
from ablate.tracking.mlflow import runs
from ablate.tracking.mlflow.artifacts import STUDY_FILES, command_of
from ablate.tracking.mlflow.door import Door
from ablate.tracking.mlflow.known import Known, StudyRun
from ablate.tracking.mlflow.notes import study_note
from ablate.tracking.mlflow.rows import begun_first, milliseconds
from ablate.tracking.mlflow.views import tag_of, views_of


def ensure_study(door: Door, known: Known) -> StudyRun:
    """The study's run, which is made where there is none; with the views of its page."""
    if known.study_run.run_id:
        return known.study_run
    study, client, experiment = known.study, door.client, door.experiment
    tags = runs.study_tags(study, known.record)
    start = begun_first(known.record.record(trial_id) for trial_id in known.trials)
    run = door.create(f"study: {study.name}", tags, start=milliseconds(start))
    door.flush()  # what follows is told by calls
    known.study_run = StudyRun(run.info.run_id, "RUNNING", tags=dict(run.data.tags))
    with contextlib.suppress(MlflowException):  # a form that MLflow does not promise to take
        for key, view in views_of(study).items():
            client.set_experiment_tag(experiment, tag_of(key), view)
    client.log_text(run.info.run_id, masked_url(study.source.text), "study.yaml")
    return known.study_run


def sync_study(door: Door, known: Known, *, closing: bool) -> None:
    """Say how far the study is and what it says so far; at the end also the report's files."""
    if not known.trials:
        return
    run = ensure_study(door, known)
    ended, answer = len(known.ended), known.answer
    progress = f"{ended} of {len(known.trials)} trials"
    note = study_note(known.study, answer, experiment=door.experiment, run_id=run.run_id)
    tags = {"progress": progress, "mlflow.note.content": note}
    if answer is not None:
        named = answer.use.cell.name if answer.use.cell is not None else "nothing"
        tags |= {"use": named, "use_why": answer.use.sentence, "answer": answer.sentence}
    if _tag(door, run, tags):
        for key, value in (("progress", progress), ("mlflow.note.content", note)):
            door.client.set_experiment_tag(door.experiment, key, value)
    if not closing:
        door.set_status(run, "RUNNING")
        return
    _mark_use(door, known)
    folder = known.record.folder
    pictures = sorted(f"figures/{path.name}" for path in (folder / "figures").glob("*.pdf"))
    for name in (*STUDY_FILES, *pictures):
        path = artifact_path(folder, name)
        if path is not None:
            door.client.log_artifact(run.run_id, str(path), str(Path(name).parent).strip("."))
    if command := _command(known):
        door.client.log_text(run.run_id, command, "command.txt")
    whole = ended == len(known.trials)
    door.set_status(run, "FINISHED" if whole else "KILLED")


def _command(known: Known) -> str:
    """How the setting to use is trained: by what was exported, else by its trial's own line. The
    page shows no file whose name ends in .sh."""
    script = artifact_path(known.record.folder, "best/train.sh")
    if script is not None:
        return masked_url(script.read_text(encoding="utf-8", errors="replace"))
    use = known.answer.use if known.answer is not None else None
    return command_of(known.trials[use.trial.id]) if use is not None and use.trial else ""


def _tag(door: Door, run: StudyRun, tags: Mapping[str, str]) -> bool:
    """Whether anything has changed."""
    changed = runs.changed_tags(tags, run.tags)
    door.log(run.run_id, tags=changed)
    run.tags.update(changed)
    return bool(changed)


def _mark_use(door: Door, known: Known) -> None:
    """Mark the run of the trial that is handed out, and no other."""
    use = known.answer.use if known.answer is not None else None
    chosen = use.trial.id if use is not None and use.trial is not None else "none"
    before = known.study_run.tags.get("use_trial", "")
    _tag(door, known.study_run, {"use_trial": chosen})
    for key, word in ((before, "no"), (chosen, "yes")):
        if key in known.runs and before != chosen:
            door.log(known.runs[key].run_id, tags={"use": word})
