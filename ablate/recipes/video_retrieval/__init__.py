"""Retrieval of videos by texts and of texts by videos: an open_clip model on frames.

Each frame goes through the image tower, and the mean of its frames' features is a clip's; texts go
through the text tower as they are. The Config's fields are named after InternVideo2's
configuration of its CLIP training, with its values; see docs/recipes/video_retrieval.md. Videos
in files need the extra ``video``.
"""

from ablate.recipes.video_retrieval.beginning import beginning
from ablate.recipes.video_retrieval.config import Config
from ablate.recipes.video_retrieval.model import check_model, export_model
from ablate.recipes.video_retrieval.plan import chance, metrics, outline, shorten
from ablate.recipes.video_retrieval.task import build, run, specimen

PRELOAD = (
    "torch",
    "torch.distributed",
    "torch.nn.parallel",
    "torch.utils.data",
    "safetensors.torch",
    "open_clip",
    "ablate.markers",
    "ablate.training.data.batches",
    "ablate.training.data.clip_samples",
    "ablate.training.evaluations.clip_retrieval",
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
    "export_model",
    "metrics",
    "outline",
    "run",
    "shorten",
    "specimen",
]
