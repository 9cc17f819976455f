"""What a step does beyond training: functions of the loop that only look.

The benchmarks put a clock around each; ``test_benches_run.py`` fails where one is gone or no longer
called.
"""

from __future__ import annotations

from ablate.recipes import openclip
from ablate.recipes.openclip import learner
from ablate.training import exchange, loop, optim

EVERY_STEP = (
    (optim.GradientNorms, "measure"),
    (optim.ZeroGradients, "update"),
    (optim.UpdateMeter, "rms"),
    (learner, "measure"),
    (exchange.Exchange, "push"),
    (loop.Run, "take"),
)
"""(owner, name)."""

UPDATES = (optim.UpdateMeter, "start"), (optim.UpdateMeter, "finish")
"""Every step.UPDATE_STEPS steps."""

LOOK = (openclip.task, "make_look_inside")
"""Makes what is called every step.LOOK_STEPS steps."""
