"""CLIP models of open_clip, trained as ``open_clip_train.main`` 3.3.0 trains them.

The only module of the project that imports open_clip. The Config's fields are open_clip_train's
own flags (with underscores), so a study reads like its command line, and :func:`command` gives
that command line back with every value resolved.

Three facts that an ablation must know, and ``check`` says:

* The gradients of the loss without flags are those of ``gather_with_grad`` divided by the number of
  workers: the same experiment under AdamW without clipping. ``local_loss`` without
  ``gather_with_grad`` is a different, biased gradient.
* ``precision: amp`` is fp16 autocast with a gradient scaler, also on a CPU.
* The default warmup is 10000 steps, which covers a short run completely.
"""

from ablate.recipes.openclip.classes import class_folders, zero_shot_classes
from ablate.recipes.openclip.config import (
    NOT_IDENTITY,
    PATH_FIELDS,
    PEER,
    SAME_PACE,
    SPEED_FIELDS,
    Augmentation,
    Config,
    InitFrom,
)
from ablate.recipes.openclip.data import lost_samples, num_samples, num_steps
from ablate.recipes.openclip.peer import OWN_FIELDS, command, export_model, shell
from ablate.recipes.openclip.plan import (
    chance,
    check,
    describe_start,
    measures,
    num_evaluations,
    share_out,
    shorten,
    sketch,
    warmup_steps,
)
from ablate.recipes.openclip.task import build, specimen
from ablate.recipes.openclip.weights import PROBE_FILE

__all__ = [
    "Augmentation",
    "Config",
    "InitFrom",
    "NOT_IDENTITY",
    "OWN_FIELDS",
    "PATH_FIELDS",
    "PEER",
    "PROBE_FILE",
    "SAME_PACE",
    "SPEED_FIELDS",
    "build",
    "chance",
    "check",
    "class_folders",
    "command",
    "export_model",
    "lost_samples",
    "measures",
    "num_evaluations",
    "num_samples",
    "num_steps",
    "describe_start",
    "share_out",
    "shell",
    "shorten",
    "sketch",
    "specimen",
    "warmup_steps",
    "zero_shot_classes",
]
