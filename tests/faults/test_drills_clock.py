"""A time of day that leaps under a whole launch: the controller, the keeper and the ranks."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from drills import STEPS, Run, Stage, allowed_s
from hosts import ranks
from test_drills_controller import (
    RELAUNCHED_S,
    TEXT,
    furthest,
    launching,
    lay_out,
    summary,
    wait_for,
)

from ablate.records.folder import StudyRecord

pytestmark = [pytest.mark.slow, pytest.mark.drill]
HOUR_S = 3600.0
LIBRARY = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)


@dataclass(frozen=True, slots=True)
class Clock:
    """The time of day of all processes that have its environment."""

    file: Path

    def leap(self, offset_s: float) -> None:
        """From now on the clock is so many seconds ahead of the true time."""
        aside = self.file.with_suffix(".new")
        aside.write_text(f"{offset_s:+.0f}\n")
        os.replace(aside, self.file)

    @property
    def environment(self) -> Mapping[str, str]:
        """Clocks that only go forward stay as they are: no correction of the time moves them.

        So do the files' times, as on a file server that keeps its own.
        """
        return {
            "LD_PRELOAD": str(LIBRARY),
            "FAKETIME_TIMESTAMP_FILE": str(self.file),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "NO_FAKE_STAT": "1",
        }


@contextmanager
def leaping_clock(folder: Path) -> Iterator[Clock]:
    """A clock that shows the true time at first."""
    clock = Clock(folder / "clock")
    clock.leap(0.0)
    before = set(_shared())
    try:
        yield clock
    finally:  # of processes that were killed
        for path in set(_shared()) - before:
            path.unlink(missing_ok=True)


def _shared() -> list[Path]:
    return [path for path in Path("/dev/shm").glob("*faketime_*")]


@pytest.mark.skipif(LIBRARY is None, reason="needs libfaketime (Debian's package faketime)")
@pytest.mark.parametrize("seed", [1])
def test_a_leaping_clock_changes_nothing_but_the_times_that_are_shown(
    stage: Stage, tmp_path: Path, seed: int
) -> None:
    """An hour behind, an hour ahead, and right again; a rank is killed under the first, the
    controller under the second."""
    drill_clock(stage, tmp_path, seed)


def drill_clock(stage: Stage, folder: Path, seed: int) -> list[float]:
    """Seconds until training again after the death of a rank, and of the controller."""
    chance = random.Random(seed)
    whole = stage.undisturbed(TEXT)
    lay_out(stage, folder)
    record = StudyRecord(folder / "runs" / "drill")
    began = time.monotonic()
    again_s = []
    with leaping_clock(folder) as clock:
        with launching(folder, clock.environment) as first:
            step = chance.randrange(1, STEPS - 6)
            wait_for(lambda: furthest(record) >= step, first)
            clock.leap(-HOUR_S)
            wait_for(lambda: furthest(record) > step, first)
            tree = psutil.Process(first.pid).children(recursive=True)
            ranks(tree)[0].kill()
            moment = time.monotonic()
            wait_for(lambda: any(trial.first_row(2) for trial in record.records()), first)
            again_s.append(time.monotonic() - moment)
            clock.leap(HOUR_S)
            time.sleep(chance.random())
            tree = psutil.Process(first.pid).children(recursive=True)
            first.kill()
        psutil.wait_procs(tree, timeout=30)
        known = {(t.trial_id, n) for t in record.records() for n in t.attempts()}
        moment = time.monotonic()
        with launching(folder, clock.environment) as second:
            wait_for(lambda: bool(training(record) - known), second)
            again_s.append(time.monotonic() - moment)
            print("training again after", [round(each, 1) for each in again_s])
            clock.leap(0.0)
            assert second.wait(120) == 0, (folder / "launch.log").read_text()[-3000:]
    took_s = time.monotonic() - began
    run = summary(folder, record)
    stage.check(run, same_as=whole)
    assert_told_in_order(run, took_s)
    assert again_s[0] < allowed_s(5.0) and again_s[1] < allowed_s(RELAUNCHED_S)
    return again_s


def training(record: StudyRecord) -> set[tuple[str, int]]:
    """Attempts that have taken a step."""
    return {(t.trial_id, n) for t in record.records() for n in t.attempts() if t.first_row(n)}


def assert_told_in_order(run: Run, took_s: float) -> None:
    """The leaps are in the records, and in no duration."""
    rows = [row for trial in run.trials for row in trial.trace()]
    ends = [end for trial in run.trials for end in trial.ends()]
    for told in (rows, ends):  # by the ranks, and by the controller
        times = [row["time"] for row in told]
        assert max(times) - min(times) > HOUR_S / 2, "the clock did not leap"
    outcomes = [trial.outcome() or {} for trial in run.trials]
    for wall_s in [end["wall_s"] for end in ends] + [outcome["wall_s"] for outcome in outcomes]:
        assert 0.0 <= wall_s <= took_s
    assert all(
        0.0 <= row[name] <= took_s for row in rows for name in ("step_time_s", "data_time_s")
    )
    assert 0.0 < run.status.worker_hours <= 2 * took_s / 3600
