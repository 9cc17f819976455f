"""How often a healthy run is called something, by its length: measured, see docs/markers.md."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class FalseNames:
    """Simulated healthy runs of one length, of six kinds of noise in equal parts; below 91,000
    steps half of them of a loss that hardly falls under five times the noise."""

    steps: int
    named: int
    """Called SPIKY or DEGRADED; none had another name."""
    runs: int


MEASURED = (
    FalseNames(100, 17, 1200),
    FalseNames(276, 26, 1200),
    FalseNames(1500, 37, 1200),
    FalseNames(91_000, 15, 600),
)
"""By tests/calibration/test_markers.py."""


def false_names(steps: int) -> FalseNames:
    """What was measured at the length that is nearest, as a factor."""
    return min(MEASURED, key=lambda found: abs(math.log(found.steps / max(steps, 1))))
