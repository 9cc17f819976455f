"""The trial folder: what is written is read back, whole or not at all."""

from __future__ import annotations

import errno
import json
import math
import resource
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ablate.errors import RecordError
from ablate.records.attempt import AttemptWriter
from ablate.records.files import (
    dumps,
    loads,
    read_json,
    read_rows_from,
    wait_for_room,
    write_json,
)
from ablate.records.folder import StudyRecord, TrialRecord, find_study
from ablate.runner.hold import write_controller

numbers = st.floats(allow_nan=True, allow_infinity=True)
texts = st.text().filter(lambda text: text not in ("NaN", "Infinity", "-Infinity"))
values = st.recursive(
    st.none() | st.booleans() | st.integers() | numbers | texts,
    lambda inner: st.lists(inner) | st.dictionaries(texts, inner),
    max_leaves=20,
)


def same(left: object, right: object) -> bool:
    return json.dumps(left, sort_keys=True) == json.dumps(right, sort_keys=True)


@given(values)
def test_every_value_survives_as_strict_json(value: object) -> None:
    """Any nesting of JSON values, with non-finite numbers, comes back equal from strict JSON."""
    text = dumps(value)
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert same(loads(text), value)


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    """When writing fails, the file that stood there is whole and no other file is left."""
    path = tmp_path / "outcome.json"
    write_json(path, {"value": 1})
    with pytest.raises(TypeError):
        write_json(path, {"value": object()})
    assert read_json(path) == {"value": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["outcome.json"]


def test_a_damaged_file_is_named_with_what_to_do(tmp_path: Path) -> None:
    """A file that is not JSON raises RecordError with its path and the next action."""
    path = tmp_path / "trial.json"
    path.write_text('{"id": "ab')
    with pytest.raises(RecordError, match=r"trial\.json is damaged.*launch again"):
        read_json(path)


def test_a_torn_line_is_not_read_until_it_is_whole(tmp_path: Path) -> None:
    """Reading on from an offset gives each whole row once, however the log was torn."""
    path = tmp_path / "trace.jsonl"
    path.write_bytes(b'{"step": 1}\n{"st')
    rows, offset = read_rows_from(path, 0)
    assert rows == [{"step": 1}]
    with open(path, "ab") as file:
        file.write(b'ep": 2}\n')
    rows, offset = read_rows_from(path, offset)
    assert rows == [{"step": 2}]
    assert read_rows_from(path, offset) == ([], offset)


def test_the_highest_attempt_counts_for_a_replayed_step(tmp_path: Path) -> None:
    """From a resumed attempt's first step on, rows of earlier attempts are void."""
    for attempt, steps in ((1, range(1, 12)), (2, range(4, 9))):
        writer = AttemptWriter(tmp_path, attempt)
        writer.step({"step": step, "attempt": attempt, "loss": math.nan} for step in steps)
        writer.close()
    trace = TrialRecord(tmp_path).trace()
    assert [row["step"] for row in trace] == list(range(1, 9))
    assert [row["attempt"] for row in trace] == [1, 1, 1, 2, 2, 2, 2, 2]
    assert all(math.isnan(row["loss"]) for row in trace)
    assert TrialRecord(tmp_path).last_step(1) == 11


def test_the_log_with_the_traceback_is_shown(tmp_path: Path) -> None:
    """Of all ranks' logs the tail is taken from the one that holds a traceback."""
    folder = tmp_path / "attempts" / "1"
    folder.mkdir(parents=True)
    (folder / "log-0.txt").write_text("Connection closed by peer\n")
    (folder / "log-1.txt").write_text("Traceback (most recent call last):\n  boom\n")
    tail = TrialRecord(tmp_path).log_tail(1)
    assert "log-1.txt" in tail and "boom" in tail


def test_a_trial_is_written_once_and_attempts_count_up(tmp_path: Path) -> None:
    """Asking twice finds the same folder unchanged; each attempt gets a folder of its own."""
    study = StudyRecord(tmp_path / "s")
    record = study.write_trial({"id": "abc", "seed": 1})
    study.write_trial({"id": "abc", "seed": 2})
    assert record.trial()["seed"] == 1
    assert [study.new_attempt(record), study.new_attempt(record)] == [1, 2]
    assert [r.trial_id for r in study.records()] == ["abc"]


def test_a_wrong_folder_names_the_studies_nearby(tmp_path: Path) -> None:
    """Pointing at a folder without a study lists those that are there."""
    StudyRecord(tmp_path / "quickstart").write_study({"name": "quickstart"})
    with pytest.raises(RecordError, match="Found: .*quickstart"):
        find_study(tmp_path / "quikstart")


def test_how_long_an_attempt_was_seen_is_what_its_last_heartbeat_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seconds since the attempt's start, whatever the time of day did; nothing for an attempt that
    gave no sign."""
    folder = TrialRecord(tmp_path)
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    writer = AttemptWriter(tmp_path, 1)
    assert folder.seen_s(1) == 0.0
    for now[0], moment in ((1030.0, 7_000_000.0), (1040.0, 5.0)):
        writer.step([{"step": 1, "time": moment}])
        writer.heartbeat({"time": moment})
    writer.close()
    assert folder.seen_s(1) == 40.0


FULL = OSError(errno.ENOSPC, "No space left on device")


class OnAFullDisk(StudyRecord):
    """A study's folder with no room for anything."""

    def write(self, path: Path, content: Any, *, durable: bool = True) -> None:
        raise FULL


def test_a_full_disk_is_waited_for_by_what_matters_alone(tmp_path: Path) -> None:
    """A file is there once another has given its room back; a sign of life is left out, and a disk
    that stays full is an error, as any other trouble is at once."""
    refusals, written = [FULL, FULL], []

    def write() -> None:
        if refusals:
            raise refusals.pop()
        written.append(1)

    wait_for_room(write, room_s=10.0)
    assert written == [1]
    for trouble, room_s in ((FULL, 0.0), (FULL, 0.2), (OSError(errno.EIO, "broken"), 10.0)):
        refusals.extend([trouble] * 99)
        with pytest.raises(OSError, match=trouble.strerror):
            wait_for_room(write, room_s=room_s)
    assert written == [1]
    write_controller(OnAFullDisk(tmp_path), state="running", active={}, notes=())
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    """The file that was there stays as it was, and no part of the new one is left."""
    write_json(tmp_path / "a.json", {"a": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_json(tmp_path / "a.json", {"a": "b" * 1000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert read_json(tmp_path / "a.json") == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_folder_of_another_layout_is_named_as_such(tmp_path: Path) -> None:
    """It is neither damaged nor read as if it were ours: the version that wrote it is said."""
    record = StudyRecord(tmp_path / "runs" / "s")
    record.write_study({"format": 99, "version": "9.9.9"})
    with pytest.raises(RecordError, match=r"study\.json has layout 99, that of ablate 9\.9\.9"):
        record.study()
    trial = record.record("0123456789ab")
    trial.folder.mkdir(parents=True)
    (trial.folder / "trial.json").write_text('{"format": 99}')
    with pytest.raises(RecordError, match=r"trial\.json has layout 99, and this version"):
        trial.trial()
