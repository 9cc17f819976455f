"""The scripts for accelerators run where there is none, so that they cannot rot."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent


def measured(script: str, chosen: str, folder: Path) -> tuple[dict[str, Any], str]:
    """What a script found on this CPU, and what it printed."""
    command = [sys.executable, str(HERE / script), "--device", "cpu", "--tiny", "--only", chosen]
    done = subprocess.run(
        [*command, "--out", str(folder)], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((folder / "found.json").read_text())
    assert "error" not in json.dumps(found)
    return found, done.stdout


def test_the_script_measures_a_small_model_on_a_cpu(tmp_path: Path) -> None:
    """Steps are timed, a run is left in the step that was asked for, and nothing is an error."""
    found, said = measured("measure.py", "machine,waits,speed,leaving", tmp_path)
    exact = found["speed"]["exact"]
    assert exact["ms_a_step"] > 0 and exact["tflop_a_step"] > 0
    assert found["leaving"]["stop"]["steps_later"] <= 1  # a CPU's numbers are read at once
    assert "speed / exact / ms_a_step" in said


@pytest.mark.exhaustive
def test_the_script_for_several_measures_two_ranks(tmp_path: Path) -> None:
    """The end of a rank that runs out of memory alone says so, before the first step and later."""
    found, said = measured("gang.py", "machine,alone", tmp_path)
    assert all(found["alone"][f"step {at}"]["says so"] for at in (0, 3))
    assert "machine / all_reduce_gb_per_s" in said


@pytest.mark.exhaustive
def test_the_script_for_several_resumes_and_follows_the_peer(tmp_path: Path) -> None:
    """A kill leaves no trace in losses and files, all ranks leave with a checkpoint of the last
    step, and the shared loss is the peer's."""
    found, _ = measured("gang.py", "resume,leaving,losses,speed", tmp_path)
    assert found["leaving"]["checkpoint"] == f"step-{found['leaving']['last step']:06d}"
    assert found["resume"]["2 ranks, fp32"]["resumed"] == "none"
    assert [v for k, v in found["losses"].items() if k != "seconds"] == [f"within {1e-6:g}"]
