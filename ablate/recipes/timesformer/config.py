"""The fields of a trial: upstream's keys in lower case, and a few of our own."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ablate.training.init_from import InitFrom
from ablate.training.interruption import Interruption
from ablate.training.task import Keep
from ablate.trial.recipe import Role

Positive = Annotated[float, Field(gt=0.0)]
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]

UPSTREAM: dict[str, str] = {
    "batch_size": "TRAIN.BATCH_SIZE",
    "eval_period": "TRAIN.EVAL_PERIOD",
    "checkpoint_period": "TRAIN.CHECKPOINT_PERIOD",
    "num_frames": "DATA.NUM_FRAMES",
    "sampling_rate": "DATA.SAMPLING_RATE",
    "train_jitter_scales": "DATA.TRAIN_JITTER_SCALES",
    "train_crop_size": "DATA.TRAIN_CROP_SIZE",
    "test_crop_size": "DATA.TEST_CROP_SIZE",
    "random_flip": "DATA.RANDOM_FLIP",
    "mean": "DATA.MEAN",
    "std": "DATA.STD",
    "base_lr": "SOLVER.BASE_LR",
    "lr_policy": "SOLVER.LR_POLICY",
    "steps": "SOLVER.STEPS",
    "lrs": "SOLVER.LRS",
    "cosine_end_lr": "SOLVER.COSINE_END_LR",
    "max_epoch": "SOLVER.MAX_EPOCH",
    "warmup_epochs": "SOLVER.WARMUP_EPOCHS",
    "warmup_start_lr": "SOLVER.WARMUP_START_LR",
    "optimizing_method": "SOLVER.OPTIMIZING_METHOD",
    "momentum": "SOLVER.MOMENTUM",
    "dampening": "SOLVER.DAMPENING",
    "nesterov": "SOLVER.NESTEROV",
    "weight_decay": "SOLVER.WEIGHT_DECAY",
    "model_name": "MODEL.MODEL_NAME",
    "num_ensemble_views": "TEST.NUM_ENSEMBLE_VIEWS",
    "num_spatial_crops": "TEST.NUM_SPATIAL_CROPS",
    "num_workers": "DATA_LOADER.NUM_WORKERS",
    "pin_memory": "DATA_LOADER.PIN_MEMORY",
    "seed": "RNG_SEED",
}
"""Field -> upstream's key; ``attention_type`` chooses upstream's file, what is not here is ours."""


class Config(BaseModel):
    """One training run of TimeSformer."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False,
        protected_namespaces=(),
    )  # fmt: skip

    # what is trained
    model_name: Literal["vit_base_patch16_224", "tiny"] = "vit_base_patch16_224"
    """Upstream's model, or a small sister that trains on a laptop (patch 8, width 64, depth 2)."""
    attention_type: Literal["divided_space_time", "joint_space_time", "space_only"] = (
        "divided_space_time"
    )
    """Over time and space apart, over both at once, or over space alone."""
    drop_path_rate: Annotated[float, Field(ge=0, lt=1), Role.SAME_PACE] = 0.1
    """Largest share of residual branches dropped in training; upstream's code has 0.1."""
    zero_temporal: Annotated[bool, Role.SAME_PACE] = True
    """Start as a model of single frames, as upstream: all temporal branches but the first are 0."""
    init_from: InitFrom | None = None
    """Weights to start from; never an optimizer's state."""
    interruption: Interruption | None = None
    """A break from which a part of the state does not come back, to see what that does."""

    # what it sees
    train_data: Annotated[str | None, Role.PATH] = None
    """Clips: a folder of class folders, or a .csv of 'path label' lines as upstream reads."""
    val_data: Annotated[str | None, Role.PATH] = None
    """Clips to judge by, with the same classes."""
    epoch_clips: Annotated[Count | None, Role.SAME_PACE, Role.SPEED] = None
    """Clips of one epoch, to which the set is cut or repeated; all of them when empty."""
    num_frames: Count = 8
    """Frames of a clip that the model sees."""
    sampling_rate: Count = 32
    """Frames of the file from one of them to the next; a shorter clip is spread over."""
    frame_order: Annotated[Literal["kept", "shuffled", "first_only"], Role.SAME_PACE] = "kept"
    """Control of what time tells: their order, none, or one frame over and over."""
    train_jitter_scales: tuple[Count, Count] = (256, 320)
    """The short side is scaled to a random length between these, pixels."""
    train_crop_size: Count = 224
    """Side of the random square that training sees."""
    test_crop_size: Count = 224
    """Side of the squares that an evaluation sees; the model takes train_crop_size alone."""
    random_flip: Annotated[bool, Role.SAME_PACE] = True
    """Mirror half of the training clips; wrong where left and right are classes."""
    mean: tuple[float, float, float] = (0.45, 0.45, 0.45)
    """Mean of the input channels."""
    std: tuple[Positive, Positive, Positive] = (0.225, 0.225, 0.225)
    """Deviation of the input channels."""
    num_ensemble_views: Count = 1
    """Moments of a clip that an evaluation averages over."""
    num_spatial_crops: Count = 3
    """Places along the long side that an evaluation averages over."""

    # how it is optimised
    base_lr: Annotated[Positive, Role.SAME_PACE, Role.SPEED, Role.OPTIMIZER] = 0.005
    """Learning rate."""
    lr_policy: Annotated[
        Literal["steps_with_relative_lrs", "cosine"], Role.SAME_PACE, Role.SPEED
    ] = "steps_with_relative_lrs"
    """Shape of the learning rate."""
    steps: Annotated[tuple[int, ...], Role.SAME_PACE, Role.SPEED] = (0, 11, 14)
    """Epochs from which the factors of lrs hold."""
    lrs: Annotated[tuple[Positive, ...], Role.SAME_PACE, Role.SPEED] = (1.0, 0.1, 0.01)
    """Factors of base_lr."""
    cosine_end_lr: Annotated[float, Field(ge=0), Role.SAME_PACE] = 0.0
    """Learning rate at the end of the cosine."""
    warmup_epochs: Annotated[float, Field(ge=0), Role.SAME_PACE, Role.SPEED] = 0.0
    """Epochs over which the learning rate rises from warmup_start_lr."""
    warmup_start_lr: Annotated[float, Field(ge=0), Role.SAME_PACE, Role.SPEED] = 0.01
    """Where it rises from."""
    max_epoch: Annotated[int, Field(ge=1), Role.SAME_PACE, Role.SPEED] = 15
    """Passes over the training clips."""
    batch_size: Annotated[int, Field(ge=1), Role.SPEED] = 8
    """Clips of one step, over all workers."""
    accum_freq: Count = 1
    """Parts that each worker's share of a step is taken in; changes rounding alone."""
    optimizing_method: Annotated[Literal["sgd", "adam", "adamw"], Role.SPEED] = "sgd"
    """The optimizer; adam adds weight_decay to the gradient, adamw takes it off the weights."""
    momentum: Annotated[float, Field(ge=0, lt=1), Role.SAME_PACE, Role.SPEED, Role.OPTIMIZER] = 0.9
    """Of sgd."""
    dampening: Annotated[float, Field(ge=0, lt=1), Role.SAME_PACE, Role.OPTIMIZER] = 0.0
    """Of sgd's momentum."""
    nesterov: Annotated[bool, Role.SAME_PACE, Role.OPTIMIZER] = True
    """Nesterov's momentum, of sgd."""
    weight_decay: Annotated[float, Field(ge=0), Role.SAME_PACE, Role.SPEED, Role.OPTIMIZER] = 1e-4
    """Of all parameters, biases and norms too, as upstream's."""
    grad_clip_norm: Annotated[Positive | None, Role.SPEED] = None
    """Largest global gradient norm; empty: no clipping, as upstream."""
    precision: Literal["fp32", "amp_bf16"] = "fp32"
    """fp32 as upstream, or bf16 autocast."""

    # when it is looked at, and how it is run
    eval_period: Annotated[int, Field(ge=1)] = 5
    """Epochs between two evaluations; the last epoch has one."""
    checkpoint_period: Annotated[int, Field(ge=1)] = 5
    """Epochs between two checkpoints."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of weights, order, crops and drop path: the replicate."""
    num_workers: Annotated[int, Field(ge=0), Role.FREE] = 8
    """Loading processes of each worker."""
    prefetch: Annotated[int, Field(ge=1), Role.FREE] = 4
    """Batches that each of them reads ahead."""
    pin_memory: Annotated[bool, Role.FREE] = True
    """Keep batches for a GPU in page-locked memory."""
    cache_gib: Annotated[float, Field(ge=0), Role.FREE] = 4.0
    """Decoded clips that fit into this are kept for all trials of a machine."""
    max_fault_share: Annotated[Share, Role.FREE] = 0.01
    """Share of unreadable clips above which a trial fails."""

    @property
    def keep(self) -> Keep:
        """Which checkpoints are written and kept."""
        return Keep(every=self.checkpoint_period)

    @model_validator(mode="after")
    def _fits_together(self) -> Config:
        low, high = self.train_jitter_scales
        if low > high or low < self.train_crop_size:
            raise ValueError(
                f"train_jitter_scales {list(self.train_jitter_scales)} must rise and be at least "
                f"train_crop_size {self.train_crop_size}, or the square does not fit"
            )
        if self.test_crop_size != self.train_crop_size:
            raise ValueError(
                f"test_crop_size {self.test_crop_size} differs from train_crop_size "
                f"{self.train_crop_size}, and the model takes one size alone; set both alike"
            )
        patch = patch_size(self)
        if self.train_crop_size % patch:
            raise ValueError(
                f"train_crop_size {self.train_crop_size} is no multiple of {self.model_name}'s "
                f"patches of {patch} pixels"
            )
        if self.lr_policy == "steps_with_relative_lrs" and (
            len(self.steps) != len(self.lrs)
            or not self.steps
            or self.steps[0] != 0
            or list(self.steps) != sorted(set(self.steps))
        ):
            raise ValueError(
                f"steps {list(self.steps)} must begin with 0, rise, and be as many as lrs "
                f"{list(self.lrs)}"
            )
        if (
            self.nesterov
            and self.optimizing_method == "sgd"
            and (not self.momentum or self.dampening)
        ):
            raise ValueError("nesterov needs momentum above 0 and dampening 0; set nesterov: false")
        return self


def patch_size(config: Config) -> int:
    """Side of the model's patches, pixels."""
    return 8 if config.model_name == "tiny" else 16
