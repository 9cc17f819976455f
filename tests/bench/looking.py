"""What a step does beyond training: functions of the loop that only look.

The benchmarks put a clock around each; ``test_benches_run.py`` fails where one is gone or no longer
called.
"""

from __future__ import annotations

from ablate.recipes import openclip
from ablate.training import loop, optim

EVERY_STEP = (
    (optim.GradientNorms, "measure"),
    (optim.ZeroGradients, "update"),
    (optim.UpdateMeter, "rms"),
    (openclip.step, "_measure"),
    (loop._Exchange, "push"),
    (loop._Run, "take"),
)
"""(owner, name)."""

UPDATES = (optim.UpdateMeter, "start"), (optim.UpdateMeter, "finish")
"""Every loop.UPDATE_STEPS steps."""

LOOK = (openclip.task, "make_look_inside")
"""Makes what is called every loop.LOOK_STEPS steps."""
