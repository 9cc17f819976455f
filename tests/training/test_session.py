"""What a rank says is written down, whatever its disk does meanwhile."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest
from sessions import alone

from ablate.records.files import loads, read_json
from ablate.records.folder import TrialRecord


def test_a_disk_that_hangs_holds_no_step_up(tmp_path: Path) -> None:
    """A trace that cannot be opened for a while, as on a mount that hangs: all steps go on, and
    then all rows are there, in their order, and the sign of life."""
    rows: list[bytes] = []
    with alone(tmp_path) as session:
        trace = tmp_path / "attempts" / "1" / "trace.jsonl"
        os.mkfifo(trace)  # opening it waits for a reader
        for step in range(1, 301):
            session.step({"step": step, "loss": 1.0})
        reader = threading.Thread(target=lambda: rows.extend(trace.read_bytes().splitlines()))
        reader.start()
    reader.join()
    assert [loads(row)["step"] for row in rows] == list(range(1, 301))
    assert read_json(trace.with_name("heartbeat.json"))["step"] >= 1


def test_a_row_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    """A full disk ends the rank, at the latest before a checkpoint that later rows go on from."""
    os.makedirs(tmp_path / "attempts" / "1")
    os.symlink("/dev/full", tmp_path / "attempts" / "1" / "trace.jsonl")
    with pytest.raises(OSError) as error, alone(tmp_path) as session:
        session.step({"step": 1, "loss": 1.0})
        session.sync()
    assert error.value.errno == errno.ENOSPC


def test_the_sign_of_life_says_how_much_of_the_time_waited_for_data(tmp_path: Path) -> None:
    """Of the steps so far, without the first, in which everything starts."""
    with alone(tmp_path) as session:
        for step, wait in enumerate([9.0, 0.5, 0.1], start=1):
            session.step({"step": step, "loss": 1.0, "data_time_s": wait, "step_time_s": 1.0})
        session.phase("saving")
    beat = read_json(tmp_path / "attempts" / "1" / "heartbeat.json")
    assert beat["data_wait"] == pytest.approx(0.3)


def test_all_is_on_the_disk_when_it_is_asked_for(tmp_path: Path) -> None:
    """Every row and event so far, before a checkpoint and with the result."""
    with alone(tmp_path) as session:
        for step in range(1, 51):
            session.step({"step": step, "loss": float("nan") if step == 30 else 1.0})
        session.sync()
        assert [row["step"] for row in TrialRecord(tmp_path).trace()] == list(range(1, 51))
        assert "non_finite" in {event["marker"] for event in TrialRecord(tmp_path).events()}
