"""TimeSformer: clips classified by attention over space and time, trained as upstream trains them.

The Config's fields are the keys of upstream's configuration in lower case, with the values of its
``TimeSformer_divST_8x32_224.yaml``; the model is transformers' of the same name. What differs from
upstream is said in docs/recipes/timesformer.md. Needs the extra ``video``.
"""

from ablate.recipes.timesformer.beginning import beginning
from ablate.recipes.timesformer.config import Config
from ablate.recipes.timesformer.elsewhere import check_model, command, export_model
from ablate.recipes.timesformer.plan import chance, metrics, outline, share_out, shorten
from ablate.recipes.timesformer.task import build, run, specimen

PRELOAD = (
    "torch",
    "torch.distributed",
    "torch.nn.parallel",
    "torch.utils.data",
    "safetensors.torch",
    "transformers.models.timesformer.modeling_timesformer",
    "ablate.markers",
    "ablate.training.data.batches",
    "ablate.training.data.clip_samples",
    "ablate.training.evaluations.clip_accuracy",
    "ablate.training.fit",
    "ablate.training.inspection.inspect",
    "ablate.training.ranks",
    "ablate.trial.worker",
)
"""Modules that a warm parent imports, so that a forked rank starts at once."""

__all__ = [
    "PRELOAD",
    "Config",
    "beginning",
    "build",
    "chance",
    "check_model",
    "command",
    "export_model",
    "metrics",
    "outline",
    "run",
    "share_out",
    "shorten",
    "specimen",
]
