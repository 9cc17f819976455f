"""How late a stop is heard where numbers come later than their steps."""

from __future__ import annotations

import pytest
import torch

from ablate.training.exchange import EARS_S, FLUSH_STEPS, Exchange
from ablate.training.ranks import Gang


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def heard_at(seconds_a_step: float, *, asked_in: int) -> tuple[int, list[int]]:
    """The step after which a stop asked for in step `asked_in` is read; all steps read so far."""
    clock = Clock()
    gang = Gang(0, 1, 0, 1, torch.device("cpu"))
    exchange = Exchange(gang, at_once=False, clock=clock)
    read: list[int] = []
    for step in range(1, 500):
        clock.now += seconds_a_step
        asked = float(step == asked_in)
        loss = {"loss": torch.tensor(float(step))}
        for host, numbers in exchange.push(loss, (asked, 0.0, 0.0, 0.0, 0.0), {"step": step}):
            assert numbers["loss"] == host["step"]
            read.append(host["step"])
            if numbers["stop"]:
                return step, read
    raise AssertionError("never heard")


@pytest.mark.parametrize("seconds_a_step", [0.001, 0.05, 0.1, 0.3, 1.0, 4.0, 60.0])
def test_a_stop_is_heard_in_seconds_or_two_steps(seconds_a_step: float) -> None:
    """However long a step takes; and no step is lost or read twice on the way."""
    for asked_in in (1, 2, 50, 61, 200):
        heard, read = heard_at(seconds_a_step, asked_in=asked_in)
        late = heard - asked_in
        assert late <= 2 * FLUSH_STEPS
        assert late * seconds_a_step <= max(2 * EARS_S, 2 * seconds_a_step) + 1e-9
        assert read == list(range(1, read[-1] + 1))


def test_short_steps_are_read_sixteen_at_a_time() -> None:
    """A wait in every step would cost what the ring is there to save."""
    heard, _ = heard_at(0.001, asked_in=200)
    assert heard - 200 > FLUSH_STEPS


class Moment:
    """A point in the time of a device that lags behind the host."""

    def __init__(self, at_ms: float) -> None:
        self.at_ms = at_ms

    def elapsed_time(self, end: Moment, /) -> float:
        return end.at_ms - self.at_ms


def test_steps_of_a_device_take_its_own_time() -> None:
    """The host hands steps of 100 ms over in 12 ms; a checkpoint between two is no step's time,
    and no row is without one but those before the device's time is known."""
    moments = [0.0]
    gang = Gang(0, 1, 0, 1, torch.device("cpu"))
    exchange = Exchange(gang, at_once=False, mark=lambda: Moment(moments[-1]))
    rows = []
    for step in range(1, 61):
        if step in (1, 41):
            moments.append(moments[-1] + 5000.0)  # a checkpoint
            exchange.begin()
        moments.append(moments[-1] + (100.0 if step != 20 else 700.0))
        numbers = {"loss": torch.tensor(0.0)}
        host = {"step": step, "step_time_s": 0.012}
        rows += exchange.push(numbers, (0.0, 0.0, 0.0, 0.0, 0.0), host)
        if step in (40, 60):
            rows += exchange.flush()
    times = {row["step"]: row["step_time_s"] for row, _ in rows}
    assert list(times) == list(range(1, 61))
    assert times.pop(20) == pytest.approx(0.7)
    assert list(times.values()) == pytest.approx([0.1] * 59)
