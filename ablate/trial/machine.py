"""What the machine of a rank does meanwhile: processor, memory, accelerators.

Measured by rank 0, where the work is; the names are MLflow's own for its system metrics.
"""

from __future__ import annotations

import contextlib
import importlib
import time
from typing import Any

import psutil

EVERY_S = 10.0
"""Time between two looks: one takes less than a millisecond of a core."""


class Machine:
    """Looks at this machine now and then. Accelerators are seen where NVML's binding (``pynvml``)
    and its driver are there."""

    def __init__(self, *, every_s: float = EVERY_S) -> None:
        self._every_s = every_s
        self._due = time.monotonic() + every_s
        psutil.cpu_percent()  # the next call tells about the time since this one
        self._nvml = _find_nvml()

    def look(self) -> dict[str, float]:
        """Percentages, and watts of each accelerator; empty before it is time to look again."""
        now = time.monotonic()
        if now < self._due:
            return {}
        self._due = now + self._every_s
        found = {
            "system/cpu_utilization_percentage": psutil.cpu_percent(),
            "system/system_memory_usage_percentage": float(psutil.virtual_memory().percent),
        }
        if self._nvml is not None:
            with contextlib.suppress(self._nvml.NVMLError):  # a card that is away for a moment
                for number in range(self._nvml.nvmlDeviceGetCount()):
                    found |= self._card(number)
        return found

    def _card(self, number: int) -> dict[str, float]:
        nvml, name = self._nvml, f"system/gpu_{number}"
        card = nvml.nvmlDeviceGetHandleByIndex(number)
        memory = nvml.nvmlDeviceGetMemoryInfo(card)
        return {
            f"{name}_utilization_percentage": float(nvml.nvmlDeviceGetUtilizationRates(card).gpu),
            f"{name}_memory_usage_percentage": 100.0 * memory.used / memory.total,
            f"{name}_power_usage_watts": nvml.nvmlDeviceGetPowerUsage(card) / 1000,
        }


def _find_nvml() -> Any:
    """NVML's binding where it can be used, else None."""
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return None
    return nvml
