"""The fields of a trial: flags of facebookresearch/swav's main_swav.py, and a few of our own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, Union

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ablate.training.evaluations.fields import EvaluationFields, Positive, refuse_unclear
from ablate.training.evaluations.kinds import ON_FEATURES
from ablate.training.interruption import Interruption
from ablate.training.task import Keep
from ablate.trial.recipe import Role

PEER = "facebookresearch/swav"
EXTRA = "ssl"
"""What pip installs of ours for this recipe."""
LIBRARIES = ("lightly",)

Share = Annotated[float, Field(gt=0.0, le=1.0)]
Count = Annotated[int, Field(ge=1)]
KINDS: tuple[type[EvaluationFields], ...] = ON_FEATURES

if TYPE_CHECKING:
    Evaluation = EvaluationFields
else:
    Evaluation = Annotated[Union[KINDS], Field(discriminator="kind")]  # noqa: UP007  # found


class Config(BaseModel):
    """One run of SwAV; the fields are main_swav.py's flags."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    # data
    data_path: Annotated[str | None, Role.PATH] = None
    """Training images: a folder, or WebDataset shards (.tar). Labels are not looked at."""
    nmb_crops: tuple[Count, ...] = (2,)
    """Crops of each resolution."""
    size_crops: tuple[Count, ...] = (224,)
    """Their sides, pixels."""
    min_scale_crops: tuple[Share, ...] = (0.14,)
    """Smallest share of the image's area, of each resolution."""
    max_scale_crops: tuple[Share, ...] = (1.0,)
    """Largest share of the image's area, of each resolution."""
    workers: Annotated[int, Field(ge=0), Role.FREE] = 10
    """Processes that load data, for each worker."""

    # what is trained
    arch: Literal["tiny", "resnet18", "resnet34", "resnet50", "resnet101"] = "resnet50"
    """Backbone: torchvision's, or tiny (three stages of 16, 32, 64 channels) for a laptop."""
    hidden_mlp: Annotated[int, Field(ge=0)] = 2048
    """Width between backbone and projection; 0: a linear projection."""
    feat_dim: Count = 128
    """Width of the projection."""
    nmb_prototypes: Annotated[int, Field(ge=2)] = 3000
    """Prototypes."""
    crops_for_assign: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (
        0,
        1,
    )
    """Which crops are assigned to prototypes; of the first resolution."""
    temperature: Positive = 0.1
    """Of the predictions."""
    epsilon: Positive = 0.05
    """Of the assignments; the peer advises 0.03 where training collapses."""
    sinkhorn_iterations: Annotated[int, Field(ge=0)] = 3
    """Rounds of balancing; 0 balances nothing: a negative control."""
    queue_length: Annotated[int, Field(ge=0)] = 0
    """Features of earlier batches that take part in the balance; for small batches."""
    epoch_queue_starts: Annotated[int, Field(ge=0)] = 15
    """Epochs before the queue is used."""

    # how it is optimised
    epochs: Annotated[int, Field(ge=1), Role.SAME_PACE, Role.SPEED] = 100
    """Passes over the training data."""
    batch_size: Annotated[int, Field(ge=2), Role.SPEED] = 64
    """Images of one worker's batch."""
    base_lr: Annotated[Positive, Role.SAME_PACE, Role.SPEED, Role.OPTIMIZER] = 4.8
    """Learning rate after the warmup; for a global batch of 4096, and not scaled."""
    final_lr: Annotated[float, Field(ge=0), Role.SAME_PACE, Role.SPEED] = 0.0
    """Learning rate at the end of the cosine."""
    warmup_epochs: Annotated[int, Field(ge=0), Role.SAME_PACE, Role.SPEED] = 10
    """Epochs of linear warmup."""
    start_warmup: Annotated[float, Field(ge=0), Role.SAME_PACE] = 0.0
    """Learning rate of the first step."""
    freeze_prototypes_niters: Annotated[int, Field(ge=0), Role.SAME_PACE, Role.SPEED] = 313
    """Steps in which the prototypes stay as they are."""
    wd: Annotated[Positive, Role.SAME_PACE, Role.SPEED, Role.OPTIMIZER] = 1e-6
    """Weight decay, of everything."""
    use_fp16: bool = True
    """fp16 autocast with a gradient scaler; the peer's is apex' level O1."""
    sync_bn: Literal["pytorch", "none"] = "pytorch"
    """BatchNorm statistics over all workers; needs GPUs where there are several."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 31
    """Seed of weights, data order and crops."""

    # our own
    optimizer: Annotated[Literal["larc", "sgd"], Role.SPEED] = "larc"
    """SGD with momentum 0.9, inside of LARC as the peer has it, or alone."""
    sinkhorn_scope: Literal["global", "local"] = "global"
    """Whether assignments are balanced over all workers, or by each worker for its own batch."""
    prototype_bias: bool = False
    """Prototypes with a bias, as lightly's have; the peer's have none."""
    normalize_prototypes: bool = True
    """Prototypes of norm 1 before each step."""
    val_path: Annotated[str | None, Role.PATH] = None
    """Held-out labelled images that evaluations look at: a folder of class folders, or shards."""
    evaluations: tuple[Evaluation, ...] = ()
    """What is measured of the backbone's features: knn, linear; each on its schedule."""
    train_num_samples: Annotated[Annotated[int, Field(ge=1)] | None, Role.SAME_PACE] = None
    """Samples of an epoch; counted in the data when empty."""
    max_fault_share: Annotated[float, Field(ge=0, le=1), Role.SAME_PACE] = 0.01
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
    def precision(self) -> str:
        """use_fp16 by its name in other recipes."""
        return "amp" if self.use_fp16 else "fp32"

    @property
    def keep(self) -> Keep:
        """Which checkpoints are written and kept."""
        return Keep(every=self.checkpoint_frequency, for_good=self.keep_every)

    @model_validator(mode="after")
    def _agree(self) -> Config:
        lists = ("nmb_crops", "size_crops", "min_scale_crops", "max_scale_crops")
        lengths = {name: len(getattr(self, name)) for name in lists}
        if len(set(lengths.values())) != 1 or not self.nmb_crops:
            raise ValueError(
                "each resolution of crops needs its number, size and scales: "
                + ", ".join(f"{name} has {length}" for name, length in lengths.items())
            )
        for low, high in zip(self.min_scale_crops, self.max_scale_crops, strict=True):
            if low > high:
                raise ValueError(f"crops between {low:g} and {high:g} of the area: swap them")
        if max(self.crops_for_assign) >= self.nmb_crops[0]:
            raise ValueError(
                f"crops_for_assign {list(self.crops_for_assign)} is beyond the {self.nmb_crops[0]} "
                "crops of the first resolution, which are numbered from 0"
            )
        if sum(self.nmb_crops) < 2:
            raise ValueError("one crop has no other to predict; set nmb_crops: [2]")
        if self.warmup_epochs > self.epochs:
            raise ValueError(
                f"warmup_epochs {self.warmup_epochs} is longer than epochs {self.epochs}"
            )
        refuse_unclear(self.evaluations, default_path=self.val_path, default="val_path")
        return self

    @property
    def crops(self) -> tuple[tuple[int, float, float], ...]:
        """(side, smallest and largest share of the area) of each crop, in the order of views."""
        kinds = zip(
            self.nmb_crops,
            self.size_crops,
            self.min_scale_crops,
            self.max_scale_crops,
            strict=True,
        )
        return tuple((size, low, high) for count, size, low, high in kinds for _ in range(count))

    def queue(self, workers: int) -> int:
        """Features in the queue, over all workers: whole global batches, as the peer rounds."""
        return self.queue_length - self.queue_length % (self.batch_size * workers)
