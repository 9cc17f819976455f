"""Gangs that span hosts, and what happens when a host or its link goes away."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from hosts import RAY_PORT, Hosts, unavailable

HERE = Path(__file__).parent
STEPS = 120
pytestmark = [
    pytest.mark.slow,
    pytest.mark.drill,
    pytest.mark.skipif(bool(unavailable()), reason=unavailable() or "available"),
]


def steps(trial: Path) -> list[tuple[int, int, float]]:
    """Attempt, step and time of each step that rank 0 wrote down."""
    file = trial / "steps.txt"
    if not file.exists():
        return []
    rows = [line.split() for line in file.read_text().splitlines()]
    return [(int(row[0]), int(row[1]), float(row[2])) for row in rows if len(row) == 3]


def until(
    condition: Callable[[], object],
    deadline_s: float,
    driver: subprocess.Popen[bytes] | None = None,
) -> None:
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, "the condition did not come true"
        assert driver is None or driver.poll() is None, "the driver ended early"
        time.sleep(0.02)


@contextmanager
def driving(
    hosts: Hosts, workers: int, trial: Path, *, num_steps: int = STEPS
) -> Iterator[subprocess.Popen[bytes]]:
    """A controller on the first host that trains one trial with a gang of `workers`."""
    driver = hosts.run(
        0,
        [
            *(sys.executable, str(HERE / "drill_driver.py"), f"{hosts.address(0)}:{RAY_PORT}"),
            *(str(workers), str(trial), str(num_steps)),
        ],
    )
    try:
        yield driver
    finally:
        driver.kill()
        driver.wait()
        assert driver.stdout is not None
        driver.stdout.close()


@pytest.mark.parametrize(
    ("fault", "bound_s"),
    [
        ("kill", 20.0),
        pytest.param("cut", 100.0, marks=pytest.mark.drill),
        pytest.param("silence", 100.0, marks=pytest.mark.drill),
        pytest.param("hang", 100.0, marks=pytest.mark.drill),
    ],
)
def test_a_gang_survives_the_loss_of_a_host(
    fault: str,
    bound_s: float,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    """Of three hosts one with a rank goes away: the gang trains again on the other two in time.

    No step is lost or done twice, and the rank that was cut off ends before its successor begins.
    A link that is whole again brings nothing back. Where nobody can see the rank end, its lease
    and the grace for a checkpoint are waited out.
    """
    trial = tmp_path / "trial"
    trial.mkdir()
    # Ranks beside a raylet that hangs go on until Ray gives their node up.
    num_steps = 1200 if fault == "hang" else STEPS
    with (
        Hosts(cpus=(0, 1, 1, 1), folder=tmp_path) as hosts,
        driving(hosts, 4, trial, num_steps=num_steps) as driver,
    ):
        assert driver.stdout is not None
        placed: dict[str, Any] = json.loads(driver.stdout.readline())
        victim = int(placed["nodes"][1].removeprefix("host"))
        until(lambda: len(steps(trial)) >= 20, 60, driver)
        rank = hosts.rank(victim)
        faulted = time.time()
        getattr(hosts, fault)(victim)
        until(lambda: steps(trial)[-1][0] == 2 or not rank.is_running(), bound_s + 30, driver)
        # The rank on the other side of the cut gave up by itself, before its successor began.
        assert not rank.is_running() and steps(trial)[-1][0] == 1
        record_property("cut_off_ended_s", round(time.time() - faulted, 1))
        until(lambda: steps(trial)[-1][0] == 2, bound_s + 30, driver)
        again = next(moment for number, _, moment in steps(trial) if number == 2)
        if fault != "kill":
            hosts.mend(victim)
        lost = json.loads(driver.stdout.readline())
        record_property("noticed_s", round(lost["time"] - faulted, 1))
        record_property("training_again_s", round(again - faulted, 1))
        print(f"{fault}: noticed {lost['time'] - faulted:.1f} s, again {again - faulted:.1f} s")
        assert driver.wait(120) == 0
        rest = [json.loads(line) for line in driver.stdout]
    assert again - faulted <= bound_s
    assert lost["kind"] == "lost" and f"host{victim}" in lost["detail"]
    assert f"host{victim}" not in rest[0]["nodes"] and rest[-1]["exit_codes"] == [0, 0]
    assert [step for _, step, _ in steps(trial)] == list(range(1, num_steps + 1))


@pytest.mark.drill
def test_a_controller_that_is_held_costs_nothing(tmp_path: Path) -> None:
    """SIGSTOP for 30 s, twice the lease (a stall, a migration, Ctrl-Z): the same attempt goes on,
    for Ray's head still counts its nodes."""
    trial = tmp_path / "trial"
    trial.mkdir()
    with (
        Hosts(cpus=(0, 1, 1), folder=tmp_path) as hosts,
        driving(hosts, 3, trial, num_steps=900) as driver,
    ):
        until(lambda: len(steps(trial)) >= 5, 90, driver)
        (controller,) = psutil.Process(driver.pid).children()
        controller.suspend()
        time.sleep(30.0)
        assert len(steps(trial)) < 900, "it would have been over"
        controller.resume()
        driver.send_signal(signal.SIGCONT)  # nsenter stops itself beside its child
        assert driver.wait(240) == 0
    assert [(number, step) for number, step, _ in steps(trial)] == [
        (1, step) for step in range(1, 901)
    ]


@pytest.mark.drill
def test_a_short_silence_changes_nothing(tmp_path: Path) -> None:
    """A link that drops everything for 5 s, less than the lease: the same attempt goes on."""
    trial = tmp_path / "trial"
    trial.mkdir()
    with (
        Hosts(cpus=(0, 1, 1), folder=tmp_path) as hosts,
        driving(hosts, 3, trial) as driver,
    ):
        until(lambda: len(steps(trial)) >= 20, 90, driver)
        hosts.silence(2)
        time.sleep(5.0)
        hosts.mend(2)
        assert driver.wait(120) == 0
    assert [(number, step) for number, step, _ in steps(trial)] == [
        (1, step) for step in range(1, STEPS + 1)
    ]


def test_a_killed_controller_frees_a_joined_ray(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """SIGKILL of a controller ends its ranks on all hosts; Ray stays, and a new one goes on."""
    trial = tmp_path / "trial"
    trial.mkdir()
    with Hosts(cpus=(0, 1, 1), folder=tmp_path) as hosts:
        with driving(hosts, 3, trial) as first:
            until(lambda: len(steps(trial)) >= 20, 90, first)
            ranks = [hosts.rank(1), hosts.rank(2)]
            # nsenter waits for the controller, its child in the host's namespaces.
            (controller,) = psutil.Process(first.pid).children()
            controller.kill()
            killed = time.time()
            until(lambda: not any(rank.is_running() for rank in ranks), 30)
            record_property("ranks_ended_s", round(time.time() - killed, 1))
        done = len(steps(trial))
        relaunched = time.time()
        with driving(hosts, 3, trial) as second:
            until(lambda: len(steps(trial)) > done, 60, second)
            again = time.time() - relaunched
            record_property("relaunched_to_training_s", round(again, 1))
            print(f"relaunched to training {again:.1f} s")
            assert second.wait(120) == 0
    assert [step for _, step, _ in steps(trial)] == list(range(1, STEPS + 1))
