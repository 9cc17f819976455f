"""A cause that is everywhere costs a pause and no trial."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from scripted_studies import STUDY, Recorder, prepare
from simulated_cluster import Course, SimulatedCluster, complete

from ablate.cluster.contract import Attempt
from ablate.records.files import read_json
from ablate.records.folder import StudyRecord
from ablate.runner import controller, hold
from ablate.runner.breaker import Breaker, BreakerRules
from ablate.runner.status import StudyStatus

RULES = BreakerRules(alike=4, to_lose=3, pause_s=10.0, longest_pause_s=40.0, outage_s=1000.0)


def end(kind: str = "crashed", *, step: int = 0, said: str = "no data") -> dict[str, Any]:
    return {"kind": kind, "step": step, "detail": said}


def fail(breaker: Breaker, trial: str, now: float, **what: Any) -> bool:
    return breaker.note(trial, end(**what), now=now, left=9, free_gib=1.0)


def test_the_row_must_be_long_alike_and_of_several_trials() -> None:
    """Numbers and paths do not make a difference, other words and a step taken do."""
    breaker = Breaker(RULES)
    for _ in range(9):
        assert fail(breaker, "a", 0.0), "one trial says nothing about the others"
    assert not breaker.cause
    for n, trial in enumerate("abc"):
        assert fail(breaker, trial, 0.0, said=f"no file /x/{n}.tar, errno {n}")
    assert fail(breaker, "d", 0.0, step=3) and not breaker.cause
    for trial in "abc":
        assert fail(breaker, trial, 0.0)
    assert not fail(breaker, "d", 0.0)
    assert breaker.cause == "alike" and "4 attempts of 4 trials" in breaker.describe()
    few = Breaker(RULES)
    for trial in "abcd":
        assert few.note(trial, end(), now=0.0, left=2, free_gib=1.0), "too few are left to lose"


def test_one_canary_at_a_time_tries_with_longer_and_longer_pauses() -> None:
    """Its first step lets all go on; an outage that stays counts against trials again."""
    breaker = Breaker(RULES)
    for trial in "abcd":
        fail(breaker, trial, 0.0)
    now, waits = 0.0, []
    while len(waits) < 5:
        began = now
        while not breaker.seats(now=now, free_gib=1.0):
            now += 1.0
        waits.append(now - began)
        breaker.canary = "e"
        assert breaker.seats(now=now + 99, free_gib=1.0) == 0, "one at a time"
        assert not fail(breaker, "e", now)
    assert waits == [10.0, 20.0, 40.0, 40.0, 40.0]
    breaker.canary = "e"
    breaker.release("e", step=0)
    assert breaker.cause
    breaker.release("e", step=1)
    assert breaker.seats(now=now, free_gib=1.0) is None and not breaker.describe()
    for trial in "abcd":
        fail(breaker, trial, now)
    assert fail(breaker, "a", now + 1001.0)
    assert breaker.seats(now=now + 1001.0, free_gib=1.0) is None


def test_a_full_disk_is_looked_at_and_tried_seldom() -> None:
    """Nothing starts while it is as full as it was, but for a canary; room lets all go on."""
    breaker = Breaker(RULES)
    assert not breaker.note("a", end("no_space", step=7), now=0.0, left=1, free_gib=0.5)
    assert breaker.seats(now=14.0, free_gib=0.5) == 0
    assert breaker.seats(now=15.0, free_gib=0.7) == 1
    assert "the disk is full" in breaker.describe()
    breaker.canary = "a"
    assert not breaker.note("a", end("no_space", step=7), now=20.0, left=1, free_gib=0.5)
    assert breaker.seats(now=49.0, free_gib=0.5) == 0
    assert breaker.seats(now=49.0, free_gib=0.9) is None


class Fleet(SimulatedCluster):
    """Attempts fail as `fails` says, which is asked with the time and the trial's settings."""

    def __init__(self, gangs: int, fails: Callable[[float, Mapping[str, Any]], bool]) -> None:
        super().__init__(gangs, self.attempt)
        self.fails = fails
        self.failed = 0

    def attempt(self, attempt: Attempt) -> Course:
        config = read_json(attempt.folder / "trial.json")["config"]
        if not self.fails(self.now, config):
            return complete(attempt)
        self.failed += 1
        return Course(45.0, (1,))


def launch(folder: Path, cluster: Fleet, *, seeds: int) -> tuple[StudyStatus, set[str]]:
    study = prepare(folder, [], STUDY.replace("[0, 1]", str(list(range(seeds)))))
    record, told = StudyRecord(folder / "runs" / study.name), Recorder()
    notes: set[str] = set()
    with hold.controlling(record):
        status = controller.launch(
            study,
            record,
            cluster=cluster,
            book=told,
            mirror=told,
            clock=cluster.clock,
            watch=lambda status: notes.update(status.notes),
            looking_share=1.0,
        )
    return status, notes


@pytest.mark.drill
@pytest.mark.parametrize("gangs", [1, 4])
def test_an_outage_of_an_hour_costs_no_trial(tmp_path: Path, gangs: int) -> None:
    """Every attempt fails in the same words for an hour after some have completed: few are tried,
    the status says so, and all trials complete."""
    cluster = Fleet(gangs, lambda now, config: 300.0 < now < 3900.0)
    status, notes = launch(tmp_path, cluster, seeds=20)
    assert status.outcomes.get("failed", 0) <= int(gangs == 1), "one before it could be known"
    assert sum(status.outcomes.values()) == 60 and status.notes == ()
    assert cluster.failed < 25 and any("paused" in note for note in notes)


def test_a_level_that_fails_everywhere_does_not_stop_the_others(tmp_path: Path) -> None:
    """Its trials are given up, and those of the other levels complete."""
    cluster = Fleet(2, lambda now, config: config["warmup"] == 1)
    status, _ = launch(tmp_path, cluster, seeds=6)
    assert status.outcomes == {"completed": 12, "failed": 6}
