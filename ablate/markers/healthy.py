"""How often a healthy run is called something, by its length: measured, see docs/markers.md."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class FalseNames:
    """Simulated healthy runs of one length, of six kinds of noise in equal parts."""

    steps: int
    named: int
    """Called SPIKY; none had another name."""
    runs: int


MEASURED = (FalseNames(100, 0, 600), FalseNames(276, 7, 600), FalseNames(91_000, 1, 32))
"""By tests/calibration/test_markers.py."""


def false_names(steps: int) -> FalseNames:
    """What was measured at the length that is nearest, as a factor."""
    return min(MEASURED, key=lambda found: abs(math.log(found.steps / max(steps, 1))))
