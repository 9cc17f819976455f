"""The backlog: trials start in the study's order, and no trial is lost or doubled in it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ablate.runner.backlog import Backlog
from ablate.trial.identity import Cell, Trial


def trial(number: int) -> Trial:
    return Trial(f"{number:012x}", "s", Cell((), ()), number % 3, "openclip", {}, {}, {}, {}, "/")


def test_trials_leave_in_the_order_in_which_they_were_first_added() -> None:
    """One that comes back takes its old place, and one that crashed waits until its time."""
    backlog = Backlog()
    for number in range(4):
        backlog.add(trial(number))
    assert backlog.take(0.0) == trial(0)
    assert backlog.take(0.0) == trial(1)
    backlog.add(trial(1))
    backlog.add(trial(0), not_before=5.0)
    assert [backlog.take(1.0) for _ in range(3)] == [trial(1), trial(2), trial(3)]
    assert len(backlog) == 1 and backlog.first(4.9) is None
    assert backlog.take(5.0) == trial(0)
    assert len(backlog) == 0


@given(st.lists(st.tuples(st.integers(0, 20), st.none() | st.floats(0, 100))))
def test_what_goes_in_comes_out_once(added: list[tuple[int, float | None]]) -> None:
    """Whatever is added with whatever delay comes out once, by time and then by order."""
    backlog = Backlog()
    expected = {}
    for number, not_before in added:
        if number not in expected:
            expected[number] = not_before
            backlog.add(trial(number), not_before=not_before)
    for seed in range(3):
        assert backlog.num_of_seed(seed) == sum(number % 3 == seed for number in expected)
    order = {number: place for place, number in enumerate(expected)}
    ready = [backlog.take(50.0) for _ in range(sum((t or 0.0) <= 50.0 for t in expected.values()))]
    assert ready == sorted(ready, key=lambda item: order[int(item.id, 16)])
    assert all((expected[int(item.id, 16)] or 0.0) <= 50.0 for item in ready)
    later = [backlog.take(100.0) for _ in range(len(backlog))]
    assert {int(item.id, 16) for item in (*ready, *later)} == set(expected)
    assert backlog.first(1e9) is None
