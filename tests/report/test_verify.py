"""The checker finds what it is there to find: each promise is broken once, by hand."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from scripted_studies import prepare, run

from ablate.records.files import read_json, write_json
from ablate.records.folder import StudyRecord, TrialRecord
from ablate.report.verify import compare_reports, find_remains, verify
from ablate.runner import agenda
from ablate.study import Study


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, StudyRecord]:
    """A study of six trials that nothing befell, but that one trial took two attempts."""
    folder = tmp_path_factory.mktemp("whole")
    rules = [{"match": {"warmup": 1, "seed": 0}, "crashes": 1, "checkpoints": True}]
    study = prepare(folder, rules)
    _, record, _ = run(study, folder)
    return study, record


@pytest.fixture
def copy(whole: tuple[Study, StudyRecord], tmp_path: Path) -> StudyRecord:
    shutil.copytree(whole[1].folder, tmp_path / "scripted")
    return StudyRecord(tmp_path / "scripted")


def rules_broken(study: Study, record: StudyRecord) -> set[tuple[str, str]]:
    trials = agenda.planned(study, record)
    found = verify(record, trials, metric=study.objective.metric) + find_remains(record.folder)
    return {(violation.rule, violation.where) for violation in found}


def test_a_whole_study_keeps_every_promise(
    whole: tuple[Study, StudyRecord], copy: StudyRecord
) -> None:
    """Nothing is found in a study that ended, and its copy has the same report."""
    assert rules_broken(*whole) == set()
    assert compare_reports(whole, (whole[0], copy)) == []


def _edit(name: str, **changes: Any) -> Callable[[TrialRecord], None]:
    """Change fields of a JSON file of the trial; {n} stands for its last attempt."""

    def plant(trial: TrialRecord) -> None:
        path = trial.folder / name.format(n=trial.attempts()[-1])
        write_json(path, {**read_json(path), **changes})

    return plant


def _lose_outcome(trial: TrialRecord) -> None:
    (trial.folder / "outcome.json").unlink()


def _attempt_after_the_end(trial: TrialRecord) -> None:
    (trial.folder / "attempts" / "3").mkdir()


def _two_winners(trial: TrialRecord) -> None:
    end = read_json(trial.attempt_folder(2) / "end.json")
    write_json(trial.attempt_folder(1) / "end.json", end)


def _lose_result(trial: TrialRecord) -> None:
    (trial.attempt_folder(trial.attempts()[-1]) / "result.json").unlink()


def _rows(change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> Any:
    def plant(trial: TrialRecord) -> None:
        path = trial.attempt_folder(trial.attempts()[-1]) / "trace.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(row) + "\n" for row in change(rows)))

    return plant


def _stale_writer(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [*rows, {**rows[-1], "attempt": 1, "step": rows[-1]["step"] + 1}]


def _differing_repeat(trial: TrialRecord) -> None:
    row = json.loads((trial.attempt_folder(1) / "trace.jsonl").read_text())
    with open(trial.attempt_folder(2) / "trace.jsonl", "r+") as file:
        rest = file.read()
        file.seek(0)
        changed = {**row, "attempt": 2, "loss": row["loss"] * (1 + 1e-15)}
        file.write(json.dumps(changed) + "\n" + rest)


def _leave_a_half_written_file(trial: TrialRecord) -> None:
    (trial.folder / "checkpoints" / ".step-000006.abcd1234.tmp").mkdir(parents=True)


PLANTED: dict[str, tuple[str, Callable[[TrialRecord], None]]] = {
    "a trial without an outcome": ("complete", _lose_outcome),
    "an unknown outcome": ("complete", _edit("outcome.json", outcome="finished", value=None)),
    "a score that diverged": ("complete", _edit("outcome.json", outcome="diverged")),
    "an attempt after the outcome": ("one_winner", _attempt_after_the_end),
    "two attempts that ended": ("one_winner", _two_winners),
    "an outcome of another attempt": ("one_winner", _edit("outcome.json", attempt=1)),
    "an outcome that nobody said": ("one_winner", _lose_result),
    "another value than measured": ("one_winner", _edit("outcome.json", value=0.51)),
    "another final than said": ("one_winner", _edit("attempts/{n}/result.json", final={})),
    "rows of a stale writer": ("one_winner", _rows(_stale_writer)),
    "no last step": ("steps", _rows(lambda rows: rows[:-1])),
    "a step that differs when repeated": ("steps", _differing_repeat),
    "a half-written file": ("no_remains", _leave_a_half_written_file),
}


@pytest.mark.parametrize(("rule", "plant"), PLANTED.values(), ids=PLANTED.keys())
def test_a_planted_violation_is_found(
    whole: tuple[Study, StudyRecord],
    copy: StudyRecord,
    rule: str,
    plant: Callable[[TrialRecord], None],
) -> None:
    """The promise that was broken is named, with its trial; no other trial is accused."""
    [trial] = [trial for trial in copy.records() if len(trial.attempts()) == 2]
    plant(trial)
    found = rules_broken(whole[0], copy)
    assert rule in {name for name, _ in found}
    assert all(trial.trial_id in where for _, where in found)


def test_a_gap_in_the_steps_is_found(whole: tuple[Study, StudyRecord], copy: StudyRecord) -> None:
    """A step that no attempt recorded is a gap, though the last step is there."""
    trial = next(trial for trial in copy.records() if len(trial.attempts()) == 1)
    _rows(lambda rows: rows[1:])(trial)
    assert ("steps", trial.trial_id) in rules_broken(whole[0], copy)


def test_another_score_is_another_report(
    whole: tuple[Study, StudyRecord], copy: StudyRecord
) -> None:
    """A value that differs in its last bit makes another report, and the file is named."""
    trial = next(copy.records())
    outcome = read_json(trial.folder / "outcome.json")
    write_json(trial.folder / "outcome.json", {**outcome, "value": outcome["value"] + 1e-15})
    [found] = compare_reports(whole, (whole[0], copy))
    assert found.rule == "same_report" and "trials.csv" in found.message


def test_attempts_and_wall_times_are_no_part_of_the_report(
    whole: tuple[Study, StudyRecord], copy: StudyRecord
) -> None:
    """What a crash costs stands in the cost section alone."""
    for trial in copy.records():
        _edit("outcome.json", wall_s=1e6, time=0.0)(trial)
    assert compare_reports(whole, (whole[0], copy)) == []


def test_a_living_process_is_found(copy: StudyRecord) -> None:
    """A process that holds a file of a trial open is named until it ends."""
    log = next(copy.records()).folder / "attempts" / "1" / "log-0.txt"
    with open(log, "a") as file:
        orphan = subprocess.Popen(
            [sys.executable, "-c", "import time; time.sleep(60)"], stdout=file, stderr=file
        )
    try:
        [found] = find_remains(copy.folder)
        assert str(orphan.pid) in found.message
    finally:
        orphan.kill()
        orphan.wait()
    assert find_remains(copy.folder) == []


def test_the_verb_says_what_is_wrong_and_where(
    whole: tuple[Study, StudyRecord], copy: StudyRecord
) -> None:
    """`ablate verify` ends with 0 and a sentence, or with 1 and a line for each broken promise."""

    def say(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "ablate.cli", "verify", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    fine = say(str(copy.folder), "--same-as", str(whole[1].folder))
    assert (fine.returncode, fine.stdout.count("promises kept")) == (0, 1), fine.stderr
    trial = next(copy.records())
    _lose_outcome(trial)
    broken = say(str(copy.folder))
    assert broken.returncode == 1
    assert f"({trial.trial_id}): has no outcome" in broken.stdout


def test_a_record_of_a_fault_that_was_mended_is_told(
    whole: tuple[Study, StudyRecord], copy: StudyRecord
) -> None:
    """A trial of an earlier version whose numbers may be wrong is named, with what to do; the
    same record of this version is not."""
    study, siglip = whole[0], {"model": "ViT-B-16-SigLIP", "fast_resize": False}
    trials = [
        replace(trial, recipe="openclip", config={**trial.config, **siglip})
        for trial in agenda.planned(study, copy)
    ]
    old, *new = trials
    for trial, facts in ((old, {}), *((trial, {"tokenizer": "12", "reading": 2}) for trial in new)):
        _edit("attempts/{n}/result.json", facts=facts)(copy.record(trial.id))
    [found] = verify(copy, trials, metric=study.objective.metric)
    assert (found.rule, found.where) == ("known_fault", old.id)
    assert "has a Hugging Face tokenizer" in found.message and "Run it again" in found.message
