"""Masked autoencoders, pre-trained, fine-tuned and probed as facebookresearch/mae does it.

The Config's fields are the flags of its three scripts with their defaults, `stage` says which;
model, mask and loss of a pre-training are transformers' ViTMAE, the encoder with a head is timm's.
Needs ``pip install 'ablate-runner[ssl]'``.

Three facts that an ablation must know:

* timm renamed ``optim_factory.add_weight_decay``. What people write in its place decides, without
  a word, whether LayerNorms and biases are decayed: ``param_groups``, and the plan counts them.
* transformers 5.24 builds this model with positions, class token and mask token of zero, which is
  right before ``from_pretrained`` and wrong before training: ``init``.
* With ``norm_pix_loss`` an encoder that says nothing has a loss of about 1, so a curve near 1 is
  no curve: the loss of predicting nothing is measured, and stands in the record.
"""

from ablate.recipes.mae.beginning import beginning
from ablate.recipes.mae.config import PEER, Config
from ablate.recipes.mae.peer import check_model, command, export_model
from ablate.recipes.mae.plan import (
    chance,
    metrics,
    outline,
    share_out,
    shorten,
    unsound,
)
from ablate.recipes.mae.task import build, run, specimen

PRELOAD = (
    "torch",
    "torch.distributed",
    "torch.nn.parallel",
    "torch.utils.data",
    "safetensors.torch",
    "timm.optim",
    "transformers.models.vit_mae.modeling_vit_mae",
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
