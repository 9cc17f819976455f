"""The script for an accelerator runs where there is none, so that it cannot rot."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent / "measure.py"


def test_the_script_measures_a_small_model_on_a_cpu(tmp_path: Path) -> None:
    """Steps are timed, a run is left in the step that was asked for, and nothing is an error."""
    chosen = "machine,waits,speed,leaving"
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--tiny", "--only", chosen]
    done = subprocess.run(
        [*command, "--out", str(tmp_path)], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert "error" not in json.dumps(found)
    exact = found["speed"]["exact"]
    assert exact["ms_a_step"] > 0 and exact["tflop_a_step"] > 0
    assert found["leaving"]["stop"]["steps_later"] <= 1  # a CPU's numbers are read at once
    assert "speed / exact / ms_a_step" in done.stdout
