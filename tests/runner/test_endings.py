"""What an end means and what follows it, rule by rule."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ablate.cluster.contract import GangEvent
from ablate.runner.endings import GiveUp, Retry, RetryRules, decide, kind_of, outcome_of
from ablate.trial.identity import Outcome

RULES = RetryRules(attempts=3, lost=6, alike=4)


def end(kind: str, step: int = 0, detail: str = "", node: str = "a") -> dict[str, Any]:
    return {"kind": kind, "step": step, "detail": detail, "nodes": [node], "failed_rank": 0}


def raised(text: str, step: int = 0, node: str = "a") -> dict[str, Any]:
    said = {"text": f"ValueError: {text}", "place": "open_clip/model.py:94 in build"}
    return {**end("crashed", step, "exit code 1", node), "error": said}


def crashes(*steps: int) -> list[dict[str, Any]]:
    return [end("crashed", step, str(n)) for n, step in enumerate(steps)]


def event(*codes: int | None, kind: Any = "exited", stopped: bool = False) -> GangEvent:
    return GangEvent("t", 1, kind, "", 0.0, exit_codes=codes, stopped=stopped)


@pytest.mark.parametrize(
    ("seen", "last_word", "kind"),
    [
        (event(0, 0), {"status": "completed"}, "ended"),
        (event(None, kind="lost"), {"status": "completed"}, "ended"),
        (event(-9, stopped=True), {"status": "diverged"}, "ended"),
        (event(75, stopped=True), {"status": "stopped"}, "stopped"),
        (event(-9, stopped=True), None, "stopped"),
        (event(75, 75), {"status": "stopped"}, "preempted"),
        (event(75, 0), None, "preempted"),
        (event(75, -9), None, "crashed"),
        (event(-9, 74), None, "no_space"),
        (event(0, 0), None, "crashed"),
        (event(1, -9), None, "crashed"),
        (event(None, None, kind="lost"), {"status": "stopped"}, "lost"),
    ],
)
def test_how_an_attempt_ended(seen: GangEvent, last_word: dict[str, Any] | None, kind: str) -> None:
    """A last word that is no stop decides; then who asked; then the exit codes."""
    assert kind_of(seen, last_word) == kind


@pytest.mark.parametrize(
    ("ends", "machines", "follows"),
    [
        ([end("stopped")], 1, Retry()),
        ([*crashes(0, 0), end("preempted", 4)], 1, Retry()),
        ([end("preempted", 4)] * 9, 1, Retry()),
        ([end("preempted")], 1, Retry(2.0)),  # before a step: whoever did it will do it again
        ([end("preempted", 4), *[end("preempted")] * 3], 1, Retry(8.0)),
        ([end("preempted")] * 9, 1, Retry(60.0)),
        ([end("no_space", 9)] * 9, 1, Retry()),
        (crashes(5), 1, Retry(0.0)),
        (crashes(5, 5), 1, Retry(1.0)),
        (crashes(5, 5, 5), 1, Outcome.FAILED),
        (crashes(5, 6, 7, 8), 1, Retry(0.0)),  # each got further
        (crashes(5, 9, 9, 9), 1, Outcome.FAILED),
        (crashes(0, 0, 0), 1, Outcome.FAILED),
        ([end("lost", 5, str(n)) for n in range(5)], 1, Retry(15.0)),
        ([end("lost", 5, str(n)) for n in range(6)], 1, Outcome.LOST),
        ([end("lost", 0, "no torch")] * 4, 1, Outcome.LOST),  # a cause that stays
        ([end("lost", 0, "no torch")] * 3, 1, Retry(3.0)),
        ([end("lost", 5, "gone")] * 4, 1, Retry(7.0)),  # had taken steps
        ([*[end("lost", 0, str(n)) for n in range(2)], end("crashed")], 1, Outcome.FAILED),
        (crashes(0, 0, 0), 2, Retry(3.0)),  # one machine's word, and there are others
        ([end("crashed", node=n) for n in "aba"], 2, Outcome.FAILED),
        (crashes(0, 0, 0, 0, 0, 0), 2, Outcome.FAILED),
    ],
)
def test_what_follows_an_end(
    ends: list[dict[str, Any]], machines: int, follows: Retry | Outcome
) -> None:
    """Each rule of retrying, at the attempt before its limit and at it."""
    found = decide(ends, rules=RULES, num_machines=machines)
    if isinstance(follows, Retry):
        assert found == follows
    else:
        assert isinstance(found, GiveUp) and found.outcome == follows
        assert "attempts without progress" in found.reason


@pytest.mark.parametrize(
    ("ends", "machines", "given_up"),
    [
        ([raised("x")], 1, False),
        ([raised("x"), raised("x")], 1, True),
        ([raised("x"), raised("y")], 1, False),
        ([raised("x", 4), raised("x", 5)], 1, False),  # the second got further
        ([raised("x", 5), raised("x", 5)], 1, True),
        ([raised("x"), end("lost"), raised("x")], 1, False),
        ([raised("x"), raised("x")], 2, False),  # one machine's word, and there are others
        ([raised("x"), raised("x", node="b")], 2, True),
    ],
)
def test_the_same_error_at_the_same_place_is_not_tried_again(
    ends: list[dict[str, Any]], machines: int, given_up: bool
) -> None:
    """Two attempts that raise it at one step say that a third would; other errors do not."""
    found = decide(ends, rules=RetryRules(attempts=5), num_machines=machines)
    assert isinstance(found, GiveUp) == given_up
    if isinstance(found, GiveUp):
        assert "another try would end alike: ValueError: x (open_clip/model.py" in found.reason


def test_a_trial_that_never_took_a_step_is_called_broken() -> None:
    """The reason says so, and what the last attempt said."""
    found = decide(crashes(0, 0, 0), rules=RULES, num_machines=1)
    assert isinstance(found, GiveUp)
    assert found.reason == (
        "broken: no attempt finished a step. 3 attempts without progress; the last: 2"
    )


@given(st.lists(st.sampled_from(["crashed", "lost"]), min_size=1, max_size=30))
def test_a_trial_that_gets_further_each_time_is_never_given_up(kinds: list[str]) -> None:
    """Whatever its attempts die of."""
    ends = [end(kind, step=n + 1) for n, kind in enumerate(kinds)]
    assert isinstance(decide(ends, rules=RULES, num_machines=1), Retry)


def test_a_completed_trial_without_the_objective_failed() -> None:
    """It says what was measured instead; with it, the value is the outcome's."""
    word = {"status": "completed", "step": 9, "final": {"b": 0.5, "a": 0.25}, "secret": 1}
    assert outcome_of(word, "a") == {
        "outcome": Outcome.COMPLETED,
        "value": 0.25,
        "final": word["final"],
        "step": 9,
    }
    found = outcome_of(word, "c")
    assert (found["outcome"], found["value"]) == (Outcome.FAILED, None)
    assert found["reason"] == "the trial ended without c; it measured: a, b"
