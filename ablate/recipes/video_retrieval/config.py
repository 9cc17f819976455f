"""The fields of a trial, named after InternVideo2's configuration."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ablate.training.init_from import InitFrom
from ablate.training.interruption import Interruption
from ablate.training.task import Keep
from ablate.trial.recipe import Role

Positive = Annotated[float, Field(gt=0.0)]
Count = Annotated[int, Field(ge=1)]
SampleType = Literal["rand", "middle"]


class Config(BaseModel):
    """One training run of text-video retrieval."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    # what is trained
    model: Annotated[str, Field(min_length=1)] = "ViT-B-16"
    """Name of an open_clip model, or tiny-video, which trains on a laptop."""
    image_res: Count = 224
    """Side of a frame, pixels."""
    max_txt_l: Count = 32
    """Tokens of a caption."""
    freeze_vision: bool = True
    """Freeze the image tower."""
    open_vision_clip_projector: bool = True
    """With freeze_vision: but for its last projection."""
    freeze_text: bool = True
    """Freeze the text tower."""
    open_text_projection: bool = False
    """With freeze_text: but for its last projection."""
    temp: Annotated[Positive, Role.SAME_PACE, Role.SPEED] = 0.01
    """Temperature of the softmax at the start; it is learnt."""
    temp_min: Annotated[Positive, Role.SAME_PACE] = 0.01
    """Below this it does not fall."""
    init_from: InitFrom | None = None
    """Weights to start from, e.g. of an image-text model; never an optimizer's state."""
    interruption: Interruption | None = None
    """A break from which a part of the state does not come back, to see what that does."""

    # what it sees
    train_data: Annotated[str | None, Role.PATH] = None
    """Clips with captions: a .json list of {video, caption}, as InternVideo2's annotations."""
    val_data: Annotated[str | None, Role.PATH] = None
    """Clips with captions to retrieve, each caption once."""
    epoch_clips: Annotated[Count | None, Role.SAME_PACE, Role.SPEED] = None
    """Clips of one epoch, to which the set is cut or repeated; all of them when empty."""
    num_frames: Count = 8
    """Frames of a clip in training."""
    num_frames_test: Count = 8
    """Frames of a clip in evaluation."""
    sample_type: Annotated[SampleType, Role.SAME_PACE] = "rand"
    """Which frame of each of num_frames equal parts of a clip: a random one, or the middle one."""
    sample_type_test: Literal["middle"] = "middle"
    """Of an evaluation."""
    random_flip: Annotated[bool, Role.SAME_PACE] = False
    """Mirror half of the training clips; wrong where captions speak of left and right."""

    # how it is optimised
    batch_size: Annotated[int, Field(ge=2), Role.SPEED] = 256
    """Clips of one worker's batch; the others of all workers are the negatives."""
    lr: Annotated[Positive, Role.SAME_PACE, Role.SPEED, Role.OPTIMIZER] = 4e-4
    """Peak learning rate of AdamW."""
    opt_betas: Annotated[
        tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]],
        Role.SAME_PACE, Role.SPEED, Role.OPTIMIZER,
    ] = (0.9, 0.98)  # fmt: skip
    """Decays of its mean and its squares."""
    weight_decay: Annotated[float, Field(ge=0), Role.SAME_PACE, Role.SPEED, Role.OPTIMIZER] = 0.2
    """Of tensors of more than one dimension."""
    max_grad_norm: Annotated[float, Role.SPEED] = -1.0
    """Largest global gradient norm; -1: no clipping."""
    epochs: Annotated[int, Field(ge=1), Role.SAME_PACE, Role.SPEED] = 3
    """Passes over the training clips."""
    warmup_epochs: Annotated[float, Field(ge=0), Role.SAME_PACE, Role.SPEED] = 0.6
    """Epochs over which the learning rate rises from 0."""
    min_lr_multi: Annotated[float, Field(ge=0, le=1), Role.SAME_PACE] = 0.01
    """Where the cosine ends, as a share of lr."""
    precision: Literal["fp32", "amp_bf16"] = "amp_bf16"
    """fp32, or bf16 autocast as upstream."""

    # when it is looked at, and how it is run
    eval_every: Count = 1
    """Epochs between two evaluations; the last epoch has one."""
    save_every: Count = 1
    """Epochs between two checkpoints."""
    seed: Annotated[int, Field(ge=0)] = 42
    """Of weights, order and frames: the replicate."""
    num_workers: Annotated[int, Field(ge=0), Role.FREE] = 12
    """Loading processes of each worker."""
    prefetch: Annotated[int, Field(ge=1), Role.FREE] = 4
    """Batches that each of them reads ahead."""
    cache_gib: Annotated[float, Field(ge=0), Role.FREE] = 4.0
    """Decoded clips that fit into this are kept for all trials of a machine."""
    max_fault_share: Annotated[float, Field(ge=0, le=1), Role.FREE] = 0.01
    """Share of unreadable clips above which a trial fails."""

    @property
    def keep(self) -> Keep:
        """Which checkpoints are written and kept."""
        return Keep(every=self.save_every)

    @model_validator(mode="after")
    def _can_learn(self) -> Config:
        if self.max_grad_norm != -1 and self.max_grad_norm <= 0:
            raise ValueError(f"max_grad_norm {self.max_grad_norm} must be above 0, or -1 for none")
        if self.temp < self.temp_min:
            raise ValueError(f"temp {self.temp} is below temp_min {self.temp_min}")
        return self
