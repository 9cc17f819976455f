"""What rank 0 tells about its machine."""

from __future__ import annotations

from ablate.trial.machine import Machine


def test_the_machine_is_looked_at_now_and_then() -> None:
    """Shares of the whole in per cent, under the names of MLflow's own system metrics; nothing
    before it is time to look again."""
    found = Machine(every_s=0.0).look()
    assert {"system/cpu_utilization_percentage", "system/system_memory_usage_percentage"} <= {
        *found
    }
    assert all(0 <= value <= 100 for name, value in found.items() if name.endswith("percentage"))
    assert Machine(every_s=3600.0).look() == {}
