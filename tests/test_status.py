"""The picture of a study that is read from its folder alone."""

from __future__ import annotations

from pathlib import Path

from synthetic import QUICK, study_of, write_study

from ablate.records import AttemptWriter
from ablate.runner import planned
from ablate.status import summarise


def test_completed_trials_that_did_not_learn_are_told(tmp_path: Path) -> None:
    """By name, with the first flag or reason and the command that shows more; learners are not."""
    study = study_of(tmp_path, QUICK)
    record = write_study(tmp_path, study)
    usual = tuple(study.baseline_levels().items())
    trials = [t for t in planned(study, record) if t.cell.levels == usual][:2]
    writer = [AttemptWriter(record.record(trial.id).folder, 1) for trial in trials]
    writer[0].learning({"verdict": "learning", "flags": [], "reasons": ["neighbours rise"]})
    stuck = {"verdict": "not learning", "flags": ["no change"], "reasons": ["nothing moved"]}
    writer[1].learning(stuck)
    (note,) = summarise(study, record, planned(study, record)).notes
    folder = record.record(trials[1].id).folder
    assert note == f"baseline · seed 1: not learning (no change); ablate inspect {folder}"
