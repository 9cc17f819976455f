"""What rank 0 tells about its machine, and what is made of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from ablate.study.table import Cost
from ablate.trial.machine import Machine
from ablate.trial.speed import data_wait, describe_machines, slowed_cards


def test_the_machine_is_looked_at_now_and_then() -> None:
    """Shares of the whole in per cent, under the names of MLflow's own system metrics; nothing
    before it is time to look again."""
    found = Machine(every_s=0.0).look()
    assert {"system/cpu_utilization_percentage", "system/system_memory_usage_percentage"} <= {
        *found
    }
    assert all(0 <= value <= 100 for name, value in found.items() if name.endswith("percentage"))
    assert Machine(every_s=3600.0).look() == {}


class Cards:
    """NVML's binding with cards of its own: a card's handle is its number. What it is not asked for
    here it takes from the real one, so that a name that is not NVML's is an error."""

    reasons = {0: pynvml.nvmlClocksEventReasonSwPowerCap, 1: 0, 2: 0, 3: 0}

    def __getattr__(self, name: str) -> Any:
        value = getattr(pynvml, name)
        if not name.startswith("nvml") or not callable(value):
            return value
        answers = {
            "nvmlInit": lambda: None,
            "nvmlDeviceGetCount": lambda: 4,
            "nvmlDeviceGetHandleByIndex": lambda number: number,
            "nvmlDeviceGetMemoryInfo": lambda card: SimpleNamespace(used=1 + card, total=8),
            "nvmlDeviceGetUtilizationRates": lambda card: SimpleNamespace(gpu=90),
            "nvmlDeviceGetPowerUsage": lambda card: 650_000,
            "nvmlDeviceGetTemperature": lambda card, sensor: 60 + card,
            "nvmlDeviceGetCurrentClocksEventReasons": self.reasons.get,
        }
        return answers[name]


def test_the_cards_of_this_gang_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cards of other trials on the machine are not this trial's; one that keeps to its power limit
    is not slowed."""
    cards = Cards()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,2")
    machine = Machine(every_s=0.0, nvml=cards)
    seen = machine.look()
    assert {name[: len("system/gpu_0")] for name in seen if "gpu" in name} == {
        "system/gpu_0",
        "system/gpu_2",
    }
    assert seen["system/gpu_2_temperature_celsius"] == 62
    assert seen["system/gpu_2_memory_usage_percentage"] == 37.5
    assert seen["system/gpu_0_power_usage_watts"] == 650
    assert slowed_cards([seen]) == ()
    hot = pynvml.nvmlClocksEventReasonHwThermalSlowdown | pynvml.nvmlClocksEventReasonHwSlowdown
    monkeypatch.setitem(cards.reasons, 2, hot)
    assert slowed_cards([seen, machine.look()]) == ("card 2 by heat, hardware",)


def test_waiting_for_data_is_a_share_of_the_steps() -> None:
    """The first step of each attempt starts everything, and does not count."""
    rows = [
        {"attempt": attempt, "data_time_s": wait, "step_time_s": 1.0}
        for attempt, wait in [(1, 1.0), (1, 0.2), (1, 0.4), (2, 1.0), (2, 0.3)]
    ]
    assert data_wait(rows) == pytest.approx(0.3)
    assert data_wait(rows[:1]) is None and data_wait([{"attempt": 1}, {"attempt": 1}]) is None


def test_who_waits_for_data_and_whose_cards_are_slowed_is_said() -> None:
    """One sentence each, with the worst by name; nothing where all is well."""
    trials = {
        "a": Cost(data_wait=0.05),
        "b": Cost(data_wait=0.41, slowed=("card 2 by heat",)),
        "c": Cost(data_wait=None),
        "d": Cost(data_wait=0.2),
    }
    said = describe_machines(trials)
    assert "2 of 4 trials waited for data" in said and "most of all b (41 %)" in said
    assert "1 of 4 trials had accelerators that lowered their clocks: b (card 2 by heat)." in said
    assert describe_machines({"a": Cost(data_wait=0.1)}) == ""
