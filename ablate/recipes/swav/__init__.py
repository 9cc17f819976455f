"""SwAV, trained as ``main_swav.py`` of facebookresearch/swav trains it.

The Config's fields are that script's flags with its defaults; loss, projection head and LARS are
lightly's, the backbones torchvision's. Needs ``pip install 'ablate-runner[ssl]'``.

Three facts that an ablation must know:

* Uniform predictions have a loss of ln(nmb_prototypes). A loss that rests there has uniform
  assignments; one that falls to 0 may have put everything on one prototype. So what is used of the
  prototypes is measured every step, and the loss alone judges nothing.
* lightly's own switches differ from the peer without a word: its Sinkhorn balances each worker's
  batch alone (``sinkhorn_scope: local``), its prototypes have a bias (``prototype_bias``), and its
  queue begins with random vectors, where the peer's is unused until it is filled, as ours.
* A checkpoint has the same size however long it was trained: size says nothing about learning.
"""

from ablate.recipes.swav.beginning import beginning
from ablate.recipes.swav.config import PEER, Config
from ablate.recipes.swav.peer import check_model, command, export_model
from ablate.recipes.swav.plan import chance, metrics, outline, share_out, shorten, unsound
from ablate.recipes.swav.task import build, run, specimen

PRELOAD = (
    "torch",
    "torch.distributed",
    "torch.nn.parallel",
    "torch.utils.data",
    "safetensors.torch",
    "torchvision.transforms",
    "torchvision.models.resnet",
    "lightly.loss.swav_loss",
    "lightly.utils.lars",
    "ablate.markers",
    "ablate.training.data.pictures",
    "ablate.training.evaluations.health",
    "ablate.training.evaluations.on_features",
    "ablate.training.fit",
    "ablate.trial.worker",
)
"""Modules that a warm parent imports, so that a forked rank starts at once."""

__all__ = [
    "Config",
    "PEER",
    "PRELOAD",
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
    "unsound",
]
