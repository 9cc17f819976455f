"""The fields of a trial: flags of facebookresearch/mae's three scripts, and a few of our own.

Their defaults are kept where they are flags; what they write into the code (betas, the crop, the
precision) is a field with that value as its default. `stage` says which script it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ablate.training.evaluations.fields import (
    EvaluationFields,
    Positive,
    refuse_unclear,
)
from ablate.training.evaluations.kinds import ON_FEATURES
from ablate.training.evaluations.kinds.linear import LinearEvaluation
from ablate.training.init_from import InitFrom
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


class AccuracyEvaluation(EvaluationFields):
    """Accuracy of the trained head on labelled images of the training's classes."""

    MEASURES = (
        Metric("image_top1", "fraction", "top-1 accuracy of the trained head", "maximize"),
        Metric("image_top5", "fraction", "top-5 accuracy of the trained head", "maximize"),
    )

    kind: Literal["accuracy"]
    """The kind of evaluation."""


_LINEAR_FIRST = sorted(ON_FEATURES, key=lambda kind: kind is not LinearEvaluation)
KINDS: tuple[type[EvaluationFields], ...] = (
    *_LINEAR_FIRST,
    ReconstructionEvaluation,
    AccuracyEvaluation,
)
"""The first is what a study is judged by that names no objective."""

if TYPE_CHECKING:
    Evaluation = EvaluationFields
else:
    Evaluation = Annotated[Union[KINDS], Field(discriminator="kind")]  # noqa: UP007  # found


SCRIPTS = {
    "pretrain": "main_pretrain.py",
    "finetune": "main_finetune.py",
    "linprobe": "main_linprobe.py",
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "finetune": {
        "batch_size": 64,
        "epochs": 50,
        "warmup_epochs": 5,
        "min_lr": 1e-6,
        "betas": (0.9, 0.999),
        "crop_scale": (0.08, 1.0),
    },
    "linprobe": {
        "batch_size": 512,
        "epochs": 90,
        "warmup_epochs": 10,
        "blr": 0.1,
        "weight_decay": 0.0,
        "crop_scale": (0.08, 1.0),
    },
}
"""Where a stage's script differs from main_pretrain.py in what it takes for a field."""
_OF_PRETRAIN = ("mask_ratio", "norm_pix_loss", "param_groups", "init")
OF_FINETUNE = (
    "drop_path", "clip_grad", "layer_decay", "aa", "smoothing", "reprob", "mixup", "cutmix",
)  # fmt: skip
"""Fields that are flags of main_finetune.py alone."""
ELSEWHERE: dict[str, tuple[str, ...]] = {
    "pretrain": ("init_from", *OF_FINETUNE),
    "finetune": _OF_PRETRAIN,
    "linprobe": (*_OF_PRETRAIN, "betas", *OF_FINETUNE),
}
"""Fields that a stage does not have."""


class Config(BaseModel):
    """One run of a stage; the fields are its script's flags, with its defaults."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    # what is trained
    stage: Annotated[Literal["pretrain", "finetune", "linprobe"], Role.LATER] = "pretrain"
    """Which script: main_pretrain.py, main_finetune.py or main_linprobe.py. Where the latter two
    have another default it is said after a field's meaning."""
    model: Literal[
        "tiny", "mae_vit_base_patch16", "mae_vit_large_patch16", "mae_vit_huge_patch14"
    ] = "mae_vit_large_patch16"
    """Encoder and decoder; tiny has 585,024 numbers and trains on a laptop (input_size 32). The
    other stages have the encoder alone, a head on the mean of its patches (finetune) or on its
    class token (linprobe)."""
    input_size: Annotated[int, Field(gt=0)] = 224
    """Side of the input image, pixels; a multiple of the model's patch."""
    mask_ratio: Annotated[float, Field(gt=0.0, le=1.0)] = 0.75
    """Share of the patches that the encoder does not see."""
    norm_pix_loss: bool = False
    """Reconstruct patches less their mean, over their deviation."""

    # how it is optimised
    batch_size: Annotated[int, Field(ge=1), Role.SPEED] = 64
    """Samples of one worker's micro-batch. linprobe: 512."""
    accum_iter: Annotated[int, Field(ge=1), Role.SPEED] = 1
    """Micro-batches of one optimizer step."""
    epochs: Annotated[int, Field(ge=1), Role.SAME_PACE, Role.SPEED] = 400
    """Passes over the training data. finetune: 50, linprobe: 90."""
    warmup_epochs: Annotated[float, Field(ge=0), Role.SAME_PACE, Role.SPEED] = 40
    """Epochs of linear warmup, which may be a fraction. finetune: 5, linprobe: 10."""
    blr: Annotated[Positive, Role.SAME_PACE, Role.SPEED, Role.OPTIMIZER] = 1e-3
    """Base learning rate: lr = blr * batch_size * accum_iter * workers / 256.
    linprobe: 0.1."""
    lr: Annotated[Positive | None, Role.SAME_PACE, Role.SPEED, Role.OPTIMIZER] = None
    """Peak learning rate, in place of blr."""
    min_lr: Annotated[float, Field(ge=0), Role.SAME_PACE, Role.SPEED] = 0.0
    """Learning rate at the end of the cosine. finetune: 1e-6."""
    weight_decay: Annotated[float, Field(ge=0), Role.SAME_PACE, Role.SPEED, Role.OPTIMIZER] = 0.05
    """Decoupled weight decay of the decayed parameters. linprobe: 0, of LARS."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of weights, data order, crops and masks."""

    # main_finetune.py's own
    init_from: Annotated[InitFrom | None, Role.LATER] = None
    """Weights of a pre-training (``--finetune``): of a trial here, an export of it, or the
    peer's files with ``key: model``. Encoder alone; the head is new. Both later stages."""
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0), Role.LATER, Role.SAME_PACE, Role.SPEED] = (
        0.75
    )
    """A layer's rate is lr times this to the power of the layers above it."""
    drop_path: Annotated[float, Field(ge=0.0, lt=1.0), Role.LATER, Role.SAME_PACE] = 0.1
    """Share of samples for which the last block is left out; less for those below."""
    clip_grad: Annotated[Positive | None, Role.LATER, Role.SPEED] = None
    """Largest global gradient norm."""
    aa: Annotated[str | None, Role.LATER, Field(pattern=r"^(rand|augmix|original|v0|3a)")] = (
        "rand-m9-mstd0.5-inc1"
    )
    """timm's automatic augmentation."""
    smoothing: Annotated[float, Field(ge=0.0, lt=1.0), Role.LATER, Role.SAME_PACE] = 0.1
    """Of labels."""
    reprob: Annotated[Share, Role.LATER, Role.SAME_PACE] = 0.25
    """Share of the images of which a rectangle is erased."""
    mixup: Annotated[float, Field(ge=0.0), Role.LATER, Role.SAME_PACE] = 0.0
    """Mixup's alpha; 0: none. Needs an even batch_size."""
    cutmix: Annotated[float, Field(ge=0.0), Role.LATER, Role.SAME_PACE] = 0.0
    """CutMix's alpha; 0: none. With both, each batch takes one of them."""

    # data
    data_path: Annotated[str | None, Role.PATH] = None
    """Training images: a folder, or WebDataset shards (.tar). Labels are not looked at by
    pretrain; the other stages need them."""
    num_workers: Annotated[int, Field(ge=0), Role.FREE] = 10
    """Processes that load data, for each worker."""

    # values that the peer has in its code
    betas: Annotated[tuple[Beta, Beta], Role.SAME_PACE, Role.SPEED, Role.OPTIMIZER] = (0.9, 0.95)
    """AdamW's decays of the mean and of the squares. finetune: (0.9, 0.999)."""
    crop_scale: Annotated[tuple[Share, Share], Role.SPEED] = (0.2, 1.0)
    """Random resized crop: smallest and largest share of the image's area. finetune and linprobe:
    from 0.08."""
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
    """What is measured: linear, knn, reconstruction, accuracy; each on its schedule."""
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

    @model_validator(mode="before")
    @classmethod
    def _with_defaults_of_its_script(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return {**DEFAULTS.get(str(given.get("stage")), {}), **given}

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
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise ValueError(
                f"mixup and cutmix mix a batch with itself turned round, so batch_size "
                f"{self.batch_size} must be even"
            )
        self._refuse_what_is_of_another_stage()
        refuse_unclear(self.evaluations, default_path=self.val_path, default="val_path")
        return self

    def _refuse_what_is_of_another_stage(self) -> None:
        for name in ELSEWHERE[self.stage]:
            usual = type(self).model_fields[name].default
            if getattr(self, name) != usual:
                raise ValueError(
                    f"{name} is nothing that stage {self.stage} ({SCRIPTS[self.stage]}) has; leave "
                    "it out"
                )
        foreign = AccuracyEvaluation if self.stage == "pretrain" else ReconstructionEvaluation
        if any(isinstance(spec, foreign) for spec in self.evaluations):
            lacks = "head" if self.stage == "pretrain" else "decoder"
            raise ValueError(
                f"stage {self.stage} has no {lacks}, which the evaluation "
                f"{foreign.kind_name()} needs"
            )

    @property
    def patches(self) -> int:
        """Patches of one image."""
        side: int = self.input_size // SIZES[self.model][0]
        return side * side
