"""Two studies on one Ray."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "faults"))
from hosts import Nodes  # noqa: E402

pytestmark = pytest.mark.exhaustive
DRIVER = str(Path(__file__).parent / "turns_driver.py")


def test_a_second_study_has_its_turn(tmp_path: Path) -> None:
    """It is placed while the first, which has many more trials than seats, is at work."""
    with Nodes(cpus=(0, 1), folder=tmp_path) as nodes:

        def drive(name: str, count: int) -> subprocess.Popen[bytes]:
            address, folder = nodes.ray_address, tmp_path / name
            return nodes.run(0, [sys.executable, DRIVER, address, str(folder), str(count)])

        with drive("long", 1000) as long:
            assert long.stdout is not None
            long.stdout.readline()
            long.stdout.readline()
            with drive("short", 2) as short:
                began, *placed = map(float, short.communicate(timeout=240)[0].split())
            assert long.poll() is None
            long.kill()
    assert len(placed) == 2 and placed[0] - began < 20.0
