"""What the machine of a rank does meanwhile: processor, memory, accelerators.

Measured by rank 0, where the work is; the names are MLflow's own for its system metrics.
"""

from __future__ import annotations

import contextlib
import os
import time
from typing import Any

import psutil
import pynvml

EVERY_S = 10.0
"""Time between two looks: one takes less than a millisecond of a core."""

_SLOWED_BY = {
    "heat": pynvml.nvmlClocksEventReasonSwThermalSlowdown
    | pynvml.nvmlClocksEventReasonHwThermalSlowdown,
    "power": pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown,
    "hardware": pynvml.nvmlClocksEventReasonHwSlowdown,
}
"""Why a card has lowered its clocks, by NVML's bits. A card that keeps to its own power limit
(SwPowerCap) is not among them: under load that is how it is meant to run."""


class Machine:
    """Looks at this machine now and then, and at the accelerators of this gang on it."""

    def __init__(self, *, every_s: float = EVERY_S, nvml: Any = pynvml) -> None:
        self._every_s = every_s
        self._due = time.monotonic() + every_s
        psutil.cpu_percent()  # the next call tells about the time since this one
        self._nvml = nvml
        self._cards: dict[str, Any] = {}
        with contextlib.suppress(nvml.NVMLError):  # no driver, or a device that is part of a card
            nvml.nvmlInit()
            self._cards = _find_cards(nvml, os.environ.get("CUDA_VISIBLE_DEVICES"))

    def look(self) -> dict[str, float]:
        """Percentages, of each accelerator degrees and watts too, and 1 for each reason why it is
        slowed; empty before it is time to look again."""
        now = time.monotonic()
        if now < self._due:
            return {}
        self._due = now + self._every_s
        found = {
            "system/cpu_utilization_percentage": psutil.cpu_percent(),
            "system/system_memory_usage_percentage": float(psutil.virtual_memory().percent),
        }
        for name, card in self._cards.items():
            with contextlib.suppress(self._nvml.NVMLError):  # a card that is away for a moment
                found |= self._look_at(card, f"system/gpu_{name}")
        return found

    def _look_at(self, card: Any, name: str) -> dict[str, float]:
        nvml = self._nvml
        memory = nvml.nvmlDeviceGetMemoryInfo(card)
        seen = {
            "utilization_percentage": float(nvml.nvmlDeviceGetUtilizationRates(card).gpu),
            "memory_usage_percentage": 100.0 * memory.used / memory.total,
            "power_usage_watts": nvml.nvmlDeviceGetPowerUsage(card) / 1000,
            "temperature_celsius": float(
                nvml.nvmlDeviceGetTemperature(card, nvml.NVML_TEMPERATURE_GPU)
            ),
        }
        with contextlib.suppress(nvml.NVMLError):  # a driver that does not tell
            reasons = nvml.nvmlDeviceGetCurrentClocksEventReasons(card)
            seen |= {f"slowed_by_{why}": 1.0 for why, bits in _SLOWED_BY.items() if reasons & bits}
        return {f"{name}_{key}": value for key, value in seen.items()}


def _find_cards(nvml: Any, visible: str | None) -> dict[str, Any]:
    """Number -> handle of the cards that this gang has here, as nvidia-smi counts them; of all
    cards where nobody says."""
    if visible is None:
        numbers = [str(number) for number in range(nvml.nvmlDeviceGetCount())]
    else:
        numbers = [name for name in visible.split(",") if name.isdecimal()]
    return {number: nvml.nvmlDeviceGetHandleByIndex(int(number)) for number in numbers}
