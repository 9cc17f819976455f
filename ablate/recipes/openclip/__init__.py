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

from ablate.recipes.openclip.beginning import beginning
from ablate.recipes.openclip.classes import class_folders, zero_shot_classes
from ablate.recipes.openclip.config import PEER, Augmentation, Config
from ablate.recipes.openclip.data import lost_samples, num_samples, num_steps
from ablate.recipes.openclip.data_sets import data_sets
from ablate.recipes.openclip.known_faults import known_faults
from ablate.recipes.openclip.measure import choose_evaluations, evaluate
from ablate.recipes.openclip.peer import (
    check_model,
    command,
    export_model,
    own_fields,
    shell,
    upstream,
)
from ablate.recipes.openclip.peer_log import peer_runs
from ablate.recipes.openclip.plan import (
    chance,
    check,
    describe_start,
    measures,
    metrics,
    num_evaluations,
    outline,
    plain_config,
    share_out,
    shorten,
    sketch,
    unsound,
    warmup_steps,
)
from ablate.recipes.openclip.same import same_rules
from ablate.recipes.openclip.suspects import causes
from ablate.recipes.openclip.task import build, run, specimen
from ablate.training.init_from import InitFrom

PRELOAD = (
    "torch",
    "torch.distributed",
    "torch.nn.parallel",
    "torch.distributed.optim",
    "torch.distributed.fsdp",
    "torch._dynamo",
    "torch.utils.data",
    "torchvision.transforms",
    "numpy.ma",
    "PIL.JpegImagePlugin",
    "safetensors.torch",
    "open_clip",
    "ablate.markers",
    "ablate.training.data.shards",
    "ablate.training.data.augment",
    "ablate.training.data.batches",
    "ablate.training.ranks",
    "ablate.training.data.pairs",
    "ablate.training.evaluations.on_features",
    "ablate.training.evaluations.retrieval",
    "ablate.training.evaluations.zero_shot",
    "ablate.training.evaluations.health",
    "ablate.training.inspection.inspect",
    "ablate.training.fit",
    "ablate.training.optim",
    "ablate.training.remote",
    "ablate.trial.worker",
)
"""Modules that a warm parent imports, so that a forked rank starts at once."""

__all__ = [
    "Augmentation",
    "Config",
    "InitFrom",
    "PEER",
    "PRELOAD",
    "beginning",
    "build",
    "causes",
    "chance",
    "choose_evaluations",
    "check",
    "check_model",
    "class_folders",
    "command",
    "data_sets",
    "evaluate",
    "describe_start",
    "export_model",
    "known_faults",
    "lost_samples",
    "measures",
    "metrics",
    "num_evaluations",
    "num_samples",
    "num_steps",
    "outline",
    "own_fields",
    "peer_runs",
    "plain_config",
    "run",
    "same_rules",
    "share_out",
    "shell",
    "shorten",
    "sketch",
    "specimen",
    "unsound",
    "upstream",
    "warmup_steps",
    "zero_shot_classes",
]
