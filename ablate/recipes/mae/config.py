"""The fields of a trial: flags of facebookresearch/mae's main_pretrain.py, and a few of our own.

Its defaults are kept where they are flags; what it writes into the code (betas, the crop, the
precision) is a field with that value as its default.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, Union

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ablate.training.evaluations.fields import (
    EvaluationFields,
    Positive,
    refuse_unclear,
)
from ablate.training.evaluations.kinds import ON_FEATURES
from ablate.training.evaluations.kinds.linear import LinearEvaluation
from ablate.training.interruption import Interruption
from ablate.training.task import Keep
from ablate.trial.metrics import Metric
from ablate.trial.recipe import Role

PEER = "facebookresearch/mae"
EXTRA = "ssl"
"""What pip installs of ours for this recipe."""
LIBRARIES = ("transformers", "timm")

SIZES = {
    "tiny": (8, 96, 4, 4, 64, 2, 4),
    "mae_vit_base_patch16": (16, 768, 12, 12, 512, 8, 16),
    "mae_vit_large_patch16": (16, 1024, 24, 16, 512, 8, 16),
    "mae_vit_huge_patch14": (14, 1280, 32, 16, 512, 8, 16),
}
"""Patch, then width, depth and heads of the encoder, and of the decoder (models_mae.py); tiny is
our own, for 32 px."""

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


class ReconstructionEvaluation(EvaluationFields):
    """Loss on held-out images under fixed masks, and a picture of a few of them."""

    MEASURES = (
        Metric("recon_loss", "", "reconstruction loss on held-out images", "minimize"),
        Metric("recon_gap", "", "its distance below predicting nothing", "maximize", chance=0.0),
        Metric("recon_loss_worst", "", "the same at the worst patch of the picture", "minimize"),
    )

    kind: Literal["reconstruction"]
    """The kind of evaluation."""


_LINEAR_FIRST = sorted(ON_FEATURES, key=lambda kind: kind is not LinearEvaluation)
KINDS: tuple[type[EvaluationFields], ...] = (*_LINEAR_FIRST, ReconstructionEvaluation)
"""The first is what a study is judged by that names no objective."""

if TYPE_CHECKING:
    Evaluation = EvaluationFields
else:
    Evaluation = Annotated[Union[KINDS], Field(discriminator="kind")]  # noqa: UP007  # found


class Config(BaseModel):
    """One pre-training run; the fields are main_pretrain.py's flags."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    # what is trained
    model: Literal[
        "tiny", "mae_vit_base_patch16", "mae_vit_large_patch16", "mae_vit_huge_patch14"
    ] = "mae_vit_large_patch16"
    """Encoder and decoder; tiny has 585,024 numbers and trains on a laptop (input_size 32)."""
    input_size: Annotated[int, Field(gt=0)] = 224
    """Side of the input image, pixels; a multiple of the model's patch."""
    mask_ratio: Annotated[float, Field(gt=0.0, le=1.0)] = 0.75
    """Share of the patches that the encoder does not see."""
    norm_pix_loss: bool = False
    """Reconstruct patches less their mean, over their deviation."""

    # how it is optimised
    batch_size: Annotated[int, Field(ge=1), Role.SPEED] = 64
    """Samples of one worker's micro-batch."""
    accum_iter: Annotated[int, Field(ge=1), Role.SPEED] = 1
    """Micro-batches of one optimizer step."""
    epochs: Annotated[int, Field(ge=1), Role.SAME_PACE, Role.SPEED] = 400
    """Passes over the training data."""
    warmup_epochs: Annotated[float, Field(ge=0), Role.SAME_PACE, Role.SPEED] = 40
    """Epochs of linear warmup, which may be a fraction."""
    blr: Annotated[Positive, Role.SAME_PACE, Role.SPEED, Role.OPTIMIZER] = 1e-3
    """Base learning rate: lr = blr * batch_size * accum_iter * workers / 256."""
    lr: Annotated[Positive | None, Role.SAME_PACE, Role.SPEED, Role.OPTIMIZER] = None
    """Peak learning rate, in place of blr."""
    min_lr: Annotated[float, Field(ge=0), Role.SAME_PACE, Role.SPEED] = 0.0
    """Learning rate at the end of the cosine."""
    weight_decay: Annotated[float, Field(ge=0), Role.SAME_PACE, Role.SPEED, Role.OPTIMIZER] = 0.05
    """Decoupled weight decay of the decayed parameters."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of weights, data order, crops and masks."""

    # data
    data_path: Annotated[str | None, Role.PATH] = None
    """Training images: a folder, or WebDataset shards (.tar). Labels are not looked at."""
    num_workers: Annotated[int, Field(ge=0), Role.FREE] = 10
    """Processes that load data, for each worker."""

    # values that the peer has in its code
    betas: Annotated[tuple[Beta, Beta], Role.SAME_PACE, Role.SPEED, Role.OPTIMIZER] = (0.9, 0.95)
    """AdamW's decays of the mean and of the squares."""
    crop_scale: Annotated[tuple[Share, Share], Role.SPEED] = (0.2, 1.0)
    """Random resized crop: smallest and largest share of the image's area."""
    precision: Literal["amp", "amp_bf16", "fp32"] = "amp"
    """amp is fp16 autocast with a gradient scaler."""
    param_groups: Annotated[
        Literal["mae", "renamed_positional", "timm", "all", "none"], Role.SAME_PACE
    ] = "mae"
    """What is decayed. mae: all but tensors of one dimension and biases. renamed_positional: what
    ``param_groups_weight_decay(model, wd, ())`` gives, the old call with the new name: everything.
    timm: as mae, and no class token. all: everything. none: nothing."""
    init: Literal["mae", "transformers"] = "mae"
    """Initial weights of models_mae.py, or those that transformers 5.24 constructs, whose
    positions are zero: a negative control."""

    # our own
    val_path: Annotated[str | None, Role.PATH] = None
    """Held-out labelled images that evaluations look at: a folder of class folders, or shards."""
    evaluations: tuple[Evaluation, ...] = ()
    """What is measured: linear, knn, reconstruction; each on its schedule."""
    train_num_samples: Annotated[Annotated[int, Field(ge=1)] | None, Role.SAME_PACE] = None
    """Samples of an epoch; counted in the data when empty."""
    max_fault_share: Annotated[Share, Role.SAME_PACE] = 0.01
    """Share of unreadable images above which the trial fails as a data fault."""
    cache_gib: Annotated[float, Field(ge=0), Role.FREE] = 8.0
    """Largest cache of decoded images a data set may fill, GiB; 0: none."""
    interruption: Annotated[Interruption | None, Role.SAME_PACE] = None
    """A break from which a part of the state does not come back, to see what that does."""
    checkpoint_frequency: Annotated[int, Field(ge=1), Role.FREE, Role.SAME_PACE] = 1
    """A checkpoint after every so many epochs."""
    keep_every: Annotated[int, Field(ge=0), Role.FREE, Role.SAME_PACE] = 0
    """Keep the checkpoints of every so many epochs for good; 0: the last two and the best."""

    @property
    def keep(self) -> Keep:
        """Which checkpoints are written and kept."""
        return Keep(every=self.checkpoint_frequency, for_good=self.keep_every)

    @model_validator(mode="after")
    def _agree(self) -> Config:
        patch = SIZES[self.model][0]
        if self.input_size % patch:
            raise ValueError(
                f"input_size {self.input_size} is no multiple of {self.model}'s patch of {patch} "
                f"pixels. Set input_size: {max(1, round(self.input_size / patch)) * patch}"
            )
        if self.crop_scale[0] > self.crop_scale[1]:
            raise ValueError(
                f"crop_scale {self.crop_scale} is empty; write the smaller share first"
            )
        if self.warmup_epochs > self.epochs:
            raise ValueError(
                f"warmup_epochs {self.warmup_epochs:g} is longer than epochs {self.epochs}"
            )
        refuse_unclear(self.evaluations, default_path=self.val_path, default="val_path")
        return self

    @property
    def patches(self) -> int:
        """Patches of one image."""
        side: int = self.input_size // SIZES[self.model][0]
        return side * side
