"""Who works on a study folder, where locks tell and where they do not."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ablate.errors import RecordError
from ablate.records.files import find_json, read_json, write_json
from ablate.records.folder import StudyRecord
from ablate.runner import hold

BEAT = "controller.beat"


def beat(folder: Path, **changes: Any) -> None:
    """A sign of life as another host's launch leaves it."""
    usual = {
        "every_s": 0.5,
        "pid": 1,
        "host": "elsewhere",
        "name": "x",
        "time": time.time(),
        "ended": False,
    }
    write_json(folder / BEAT, {**usual, **changes})


def test_a_launch_that_is_only_starting_can_be_stopped(tmp_path: Path) -> None:
    """It is seen from the moment it holds the folder, and what is asked from then on is kept; what
    was asked of an earlier launch is forgotten."""
    record = StudyRecord(tmp_path)
    hold.request_stop(record, now=True)
    with hold.controlling(record):
        assert hold.stop_asked(record) == 0
        note = hold.read_controller(record)
        assert note is not None and (note["state"], note["pid"]) == ("starting", os.getpid())
        hold.request_stop(record, now=False)
        assert hold.stop_asked(record) == 1
        with pytest.raises(RecordError, match=f"another launch.*process {os.getpid()}"):
            with hold.controlling(record):
                pass
    assert hold.read_controller(record) is None
    assert (find_json(tmp_path / BEAT) or {})["ended"]


def test_another_host_s_launch_is_seen_by_its_beat(tmp_path: Path) -> None:
    """Whatever its clock says: a beat that moves is alive, one that stands is not waited for
    longer than two; one that ended or is days old is not waited for at all."""
    record = StudyRecord(tmp_path)
    for clock_s in (0.0, -120.0):
        driver = subprocess.Popen([sys.executable, "-c", BEATS, str(tmp_path), str(clock_s)])
        try:
            until = time.monotonic() + 30
            while not (tmp_path / BEAT).exists():
                assert time.monotonic() < until
            assert hold.read_controller(record) is not None
            with pytest.raises(RecordError, match="process 1 on elsewhere"):
                with hold.controlling(record):
                    pass
        finally:
            driver.kill()
            driver.wait()
    began = time.monotonic()
    with hold.controlling(record):  # it stands still
        assert time.monotonic() - began < 60
    for past in ({"ended": True}, {"time": time.time() - 1e6}):
        beat(tmp_path, **past, every_s=60.0)
        began = time.monotonic()
        with hold.controlling(record):
            assert time.monotonic() - began < 60.0


BEATS = f"""
import sys, time
sys.path[:0] = {[path for path in sys.path if path]!r}
from ablate.records.files import write_json
from pathlib import Path
while True:
    beat = {{"pid": 1, "host": "elsewhere", "name": "x", "ended": False, "every_s": 1}}
    beat["time"] = time.time() + float(sys.argv[2])
    write_json(Path(sys.argv[1]) / "controller.beat", beat)
    time.sleep(0.3)
"""


def test_a_launch_whose_folder_was_taken_stops(tmp_path: Path) -> None:
    """Where a lock is seen by one host alone, the one that came first sees the other's name."""
    record = StudyRecord(tmp_path)
    with hold.controlling(record, beat_s=0.2):
        hold.check_hold(record)
        beat(tmp_path)
        until = time.monotonic() + 10
        with pytest.raises(RecordError, match="process 1 on elsewhere"):
            while time.monotonic() < until:
                hold.check_hold(record)
                time.sleep(0.05)
    assert read_json(tmp_path / BEAT)["host"] == "elsewhere", "it is left to its owner"
