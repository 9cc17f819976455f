"""The fields of a trial: open_clip_train's own flags with underscores, and a few of our own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ablate.recipes.openclip import evaluation_fields as specs
from ablate.recipes.openclip.elsewhere import ELSEWHERE
from ablate.training.evaluations.fields import refuse_unclear
from ablate.training.init_from import InitFrom
from ablate.training.interruption import Interruption
from ablate.training.task import Keep
from ablate.trial.recipe import Role

PEER = "open_clip_train 3.3.0"


Precision = Literal["fp32", "amp", "amp_bf16", "bf16", "fp16", "pure_bf16", "pure_fp16"]


Share = Annotated[float, Field(ge=0.0, le=1.0)]


Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


Positive = Annotated[float, Field(gt=0.0)]


@dataclass(frozen=True, init=False)
class Ours:
    """In a field's annotation: no flag of the peer."""

    like_the_peer: tuple[Any, ...]
    """Values under which the run is the peer's. None: any value; the field has no influence on a
    sound run, or (those of ``speed``) on its rounding only."""

    def __init__(self, *like_the_peer: Any) -> None:
        object.__setattr__(self, "like_the_peer", like_the_peer)


class _Frozen(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )


class Augmentation(_Frozen):
    """open_clip's aug_cfg. Without `use_timm` only scale, color_jitter and gray_scale_prob act."""

    scale: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0, le=1)]] = (0.9, 1.0)
    """Random resized crop: smallest and largest share of the image's area."""
    ratio: tuple[Positive, Positive] | None = None
    """Smallest and largest aspect ratio of the crop; needs use_timm."""
    color_jitter: float | tuple[float, float, float] | tuple[float, float, float, float] | None = (
        None
    )
    """Strengths of brightness, contrast, saturation, hue; one number is allowed with use_timm."""
    re_prob: Share | None = None
    """Probability of random erasing; needs use_timm."""
    re_count: Annotated[int, Field(ge=1)] | None = None
    """Erased rectangles an image; needs use_timm and re_prob."""
    use_timm: bool = False
    """Use timm's training transform instead of open_clip's."""
    color_jitter_prob: Share | None = None
    """Probability of colour jitter; without use_timm only."""
    gray_scale_prob: Share | None = None
    """Probability of turning grey; without use_timm only."""

    @model_validator(mode="after")
    def _refuse_what_would_be_ignored(self) -> Augmentation:
        if self.scale[0] > self.scale[1]:
            raise ValueError(f"scale {self.scale} is empty; write the smaller share first")
        if self.use_timm:
            for name in ("color_jitter_prob", "gray_scale_prob"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{PEER} drops {name} silently when use_timm is on; "
                        f"remove {name}, or set use_timm: false"
                    )
            if self.re_count is not None and not self.re_prob:
                raise ValueError("re_count does nothing without re_prob; add re_prob")
            return self
        for name in ("ratio", "re_prob", "re_count"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"{PEER} ignores {name} unless use_timm is on (with a warning only); "
                    f"set use_timm: true, or remove {name}"
                )
        if self.color_jitter is not None and not self.color_jitter_prob:
            raise ValueError(
                f"{PEER} ignores color_jitter without color_jitter_prob; "
                "add color_jitter_prob (0.8 is common), or set use_timm: true"
            )
        if self.color_jitter_prob and (
            not isinstance(self.color_jitter, tuple) or len(self.color_jitter) != 4
        ):
            raise ValueError(
                "color_jitter_prob needs color_jitter as four numbers "
                "(brightness, contrast, saturation, hue), such as [0.4, 0.4, 0.4, 0.1]"
            )
        return self


def _peer_defaults(model: str) -> dict[str, float]:
    """Adam's defaults by the model's name, as open_clip_train.params.get_default_params."""
    if is_vit(model):
        return {"lr": 5e-4, "beta1": 0.9, "beta2": 0.98, "eps": 1e-6}
    return {"lr": 5e-4, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8}


class _Model(_Frozen):
    """What is trained."""

    model: Annotated[str, Field(min_length=1)] = "RN50"
    """Name of an open_clip model, or tiny-rn-a, RN50's small sister that trains on a laptop."""
    siglip: Annotated[bool, Role.SPEED] = False
    """Sigmoid loss instead of the softmax one, with SigLIP's initial scale and bias."""
    force_image_size: Annotated[int, Field(gt=0)] | None = None
    """Side of the input image, pixels; the model's own when empty."""
    force_context_length: Annotated[int, Field(gt=0)] | None = None
    """Tokens of a caption; the model's own when empty."""
    force_quick_gelu: bool = False
    """QuickGELU activations, as OpenAI's weights need."""
    force_custom_text: bool = False
    """Build the text tower as a module of its own."""
    qk_norm: Annotated[bool, Role.LATER, Role.SPEED, Ours()] = False
    """LayerNorm over each head's queries and keys, in the attention of open_clip's own transformers
    (Henry et al. 2020, arXiv 2010.04245; Dehghani et al. 2023, arXiv 2302.05442, for stability). No
    flag of the peer: `qk_norm` in a model file, which an export ships."""
    force_patch_dropout: Annotated[Annotated[float, Field(ge=0, lt=1)] | None, Role.SPEED] = None
    """Share of patches dropped in training; ViT only, the model's own when empty."""
    image_mean: tuple[float, float, float] | None = None
    """Mean of the input channels; the model's own when empty."""
    image_std: tuple[Positive, Positive, Positive] | None = None
    """Deviation of the input channels; the model's own when empty."""
    image_interpolation: Literal["bicubic", "bilinear", "random"] | None = None
    """Interpolation when an evaluation image is resized, and with aug_cfg.use_timm a training
    one; the model's own when empty."""
    image_resize_mode: Literal["shortest", "longest", "squash"] | None = None
    """How evaluation images are fitted; the model's own when empty."""
    lock_image: bool = False
    """Freeze the image tower."""
    lock_image_unlocked_groups: Annotated[int, Field(ge=0)] = 0
    """Last groups of the image tower that stay trainable with lock_image."""
    lock_image_freeze_bn_stats: bool = False
    """With lock_image: freeze BatchNorm's running statistics too."""
    lock_text: bool = False
    """Freeze the text tower."""
    lock_text_unlocked_layers: Annotated[int, Field(ge=0)] = 0
    """Last layers of the text tower that stay trainable with lock_text."""
    lock_text_freeze_layer_norm: bool = False
    """With lock_text: freeze LayerNorm too."""
    grad_checkpointing: bool = False
    """Recompute activations in the backward pass; transformers only, it saves memory."""
    use_bn_sync: bool = False
    """BatchNorm statistics over all workers; needs GPUs."""
    torchcompile: bool = False
    """Compile the model; changes rounding, not the maths."""
    ddp_static_graph: bool = False
    """Tell DDP that the graph never changes."""


class _Optimised(_Model):
    """What is trained, and how."""

    precision: Precision = "amp"
    """fp32 (TF32 on GPUs, as the peer), amp (fp16 autocast + scaler), amp_bf16, or weights cast:
    fp16, bf16, pure_*."""
    opt: Annotated[str, Field(pattern=r"^(adamw|timm/[\w-]+)$"), Role.SPEED] = "adamw"
    """adamw, or timm/NAME for an optimizer of timm."""
    lr: Annotated[Positive, Role.SAME_PACE, Role.SPEED, Role.OPTIMIZER] = Field(default=None)  # type: ignore[assignment]  # resolved, never None
    """Peak learning rate; 5e-4 by default."""
    beta1: Annotated[Beta | None, Role.SAME_PACE, Role.SPEED, Role.OPTIMIZER] = None
    """Adam's decay of the mean; 0.9 by default."""
    beta2: Annotated[Beta | None, Role.SAME_PACE, Role.SPEED, Role.OPTIMIZER] = None
    """Adam's decay of the squares; 0.98 by default for names with "vit", else 0.999."""
    eps: Annotated[Positive | None, Role.SAME_PACE, Role.SPEED, Role.OPTIMIZER] = None
    """Adam's epsilon; 1e-6 by default for names with "vit", else 1e-8."""
    wd: Annotated[float, Field(ge=0), Role.SAME_PACE, Role.SPEED, Role.OPTIMIZER] = 0.2
    """Decoupled weight decay of the decayed parameters."""
    momentum: Annotated[
        Annotated[float, Field(ge=0, lt=1)] | None, Role.SAME_PACE, Role.SPEED, Role.OPTIMIZER
    ] = None
    """Momentum, for optimizers of timm that have one."""
    opt_kwargs: Annotated[
        dict[str, bool | int | float | str], Role.SPEED, Role.OPTIMIZER, Ours({})
    ] = {}
    """More settings of an optimizer of timm, by timm's names: {weight_decouple: true}. No flag of
    the peer's 3.3.0."""
    warmup: Annotated[int, Field(ge=0), Role.SAME_PACE, Role.SPEED] = 10000
    """Optimizer steps of linear warmup."""
    lr_scheduler: Annotated[
        Literal["cosine", "const", "const-cooldown"], Role.SAME_PACE, Role.SPEED
    ] = "cosine"
    """Shape of the learning rate after warmup."""
    skip_scheduler: Annotated[bool, Role.SAME_PACE, Role.SPEED] = False
    """Keep the learning rate at lr from the first step on."""
    epochs_cooldown: Annotated[Annotated[int, Field(ge=1)] | None, Role.SAME_PACE] = None
    """Epochs of cooldown at the end, for const-cooldown."""
    lr_cooldown_power: Annotated[Positive, Role.SAME_PACE] = 1.0
    """Power of the cooldown's polynomial; 1 is linear."""
    lr_cooldown_end: Annotated[float, Field(ge=0), Role.SAME_PACE] = 0.0
    """Learning rate at the end of the cooldown."""
    epochs: Annotated[int, Field(ge=1), Role.SAME_PACE, Role.SPEED] = 32
    """Passes over the training data."""
    batch_size: Annotated[int, Field(ge=1), Role.SPEED] = 64
    """Samples of one worker's batch; the global batch is that times workers times accum_freq."""
    accum_freq: Annotated[int, Field(ge=1), Role.SPEED] = 1
    """Batches of one optimizer step; their features are cached, so all are negatives."""
    grad_clip_norm: Annotated[Positive | None, Role.SPEED] = None
    """Largest global gradient norm; empty: no clipping."""
    grad_clip_units: Annotated[Positive | None, Role.SPEED, Ours(None)] = None
    """Largest norm of a unit's gradient, as a share of its weight's: adaptive gradient clipping
    (Brock et al. 2021, who take 0.01); no flag of the peer."""
    grad_clip_z: Annotated[Positive | None, Role.SPEED, Ours(None)] = None
    """ZClip: how many standard deviations the gradient's norm may be above its running mean (Kumar
    et al. 2025, who take 2.5); no flag of the peer."""
    clip_updates: Annotated[bool, Role.SPEED, Ours(False)] = False
    """StableAdamW: shorten a tensor's step where Adam's second moment lags behind its gradient
    (Wortsman et al. 2023); no flag of the peer."""
    ema_decay: Annotated[
        Annotated[float, Field(gt=0.0, lt=1.0)] | None, Role.LATER, Role.SPEED, Ours(None)
    ] = None
    """Judge an exponential moving average of the weights with this decay (Polyak and Juditsky 1992;
    Morales-Brotons et al. 2024, arXiv 2411.18704): timm's ModelEmaV3, whose decay after step t is
    at most 1 - t^(-2/3). BatchNorm's statistics are averaged too. No flag of the peer."""
    logit_scale_init: Annotated[Annotated[float, Field(ge=1.0)] | None, Role.SPEED, Ours()] = None
    """Temperature at the start, which cosines are multiplied by; 1/0.07 when empty, 10 with siglip.
    No flag of the peer: `init_logit_scale`, its logarithm, in a model file, which an export ships;
    with siglip the peer has 10 in its code."""
    logit_scale_max: Annotated[float, Field(gt=1.0, le=100.0), Role.SPEED, Ours(100.0)] = 100.0
    """Largest temperature; the peer has 100 in its code (Radford et al. 2021)."""
    local_loss: bool = False
    """Loss of the local rows of the logits only, not of the whole matrix on every worker."""
    gather_with_grad: bool = False
    """Let gradients flow back through the gathered features."""
    loss_dist_impl: Literal["bidir", "shift", "reduce", "gather"] | None = None
    """How siglip exchanges text features; bidir when empty."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of weights, data order and augmentation."""


class Config(_Optimised):
    """One training run of open_clip; the fields are open_clip_train 3.3.0's flags."""

    ELSEWHERE: ClassVar[Mapping[str, str]] = ELSEWHERE

    # data
    train_data: Annotated[str | None, Role.PATH] = None
    """WebDataset shards with braces ({0000..0575}.tar), several sources joined with ``::``."""
    train_num_samples: Annotated[Annotated[int, Field(ge=1)] | None, Role.SAME_PACE] = None
    """Samples of an epoch; counted in the shards when empty."""
    dataset_type: Literal["webdataset", "auto"] = "auto"
    """Kind of train_data; auto goes by its ending."""
    aug_cfg: Annotated[Augmentation, Role.SPEED] = Augmentation()
    """Augmentation of training images."""
    imagenet_val: Annotated[str | None, Role.PATH] = None
    """Folder of class folders for zero-shot accuracy; see :func:`zero_shot_classes`."""
    zeroshot_frequency: Annotated[int, Field(ge=0), Role.SAME_PACE] = 2
    """Zero-shot accuracy after every so many epochs and after the last; 0: never."""
    workers: Annotated[int, Field(ge=0), Role.FREE] = 4
    """Processes that load data, for each worker."""

    # our own
    evaluations: Annotated[tuple[specs.Evaluation, ...], Ours()] = ()
    """More evaluations: zero_shot on other sets, knn, linear, retrieval; each on its schedule."""
    init_from: Annotated[InitFrom | None, Role.SAME_PACE, Role.SPEED, Ours(None)] = None
    """Weights to start from, with a new optimizer; random initialisation when empty."""
    interruption: Annotated[Interruption | None, Role.SAME_PACE, Ours(None)] = None
    """A break from which a part of the state does not come back, to see what that does."""
    param_groups: Annotated[
        Literal["open_clip", "open_clip_next", "timm"], Role.SAME_PACE, Ours("open_clip")
    ] = "open_clip"
    """Rule that says which parameters are not decayed."""
    speed: Annotated[Literal["exact", "fast"], Ours()] = "fast"
    """fast: what changes rounding only is on wherever it applies: fused, channels_last,
    fast_resize. exact: the peer's arithmetic, to reproduce somebody's run to the last digits."""
    fused: Annotated[bool, Ours()] = True
    """Fused AdamW: the same formula in one kernel, rounded differently (1e-7 a step)."""
    cuda_graphs: Annotated[bool, Ours()] = False
    """With torchcompile, on GPUs: launch the compiled passes as CUDA graphs (inductor's mode
    reduce-overhead). The same kernels with less launching: no rounding beyond torchcompile's."""
    channels_last: Annotated[bool, Ours()] = True
    """Images and convolutions in channels-last memory: other kernels, so other rounding."""
    fast_jpeg: Annotated[bool, Ours(False)] = False
    """Decode large JPEGs at 1/2, 1/4 or 1/8 of their side where a crop allows it: other pixels,
    by 2 to 10 of 255 on average where it applies. The size follows aug_cfg.scale."""
    fast_resize: Annotated[bool, Ours()] = True
    """Resize crops by torch's 8-bit kernel: about one of a hundred values differs, by 1 of 255,
    rarely by 2."""
    max_fault_share: Annotated[Share, Role.SAME_PACE, Ours()] = 0.01
    """Share of unreadable samples above which the trial fails as a data fault."""
    cache_gib: Annotated[float, Field(ge=0), Role.FREE, Ours()] = 8.0
    """Largest cache of decoded images a data set may fill, GiB; 0: none."""
    prefetch: Annotated[int, Field(ge=1), Role.FREE, Ours()] = 4
    """Batches that each loading process reads ahead."""
    pin_memory: Annotated[bool, Role.FREE, Ours()] = True
    """With a GPU: batches wait in page-locked memory, so that their transfer overlaps the step."""
    checkpoint_frequency: Annotated[int, Field(ge=1), Role.FREE, Role.SAME_PACE, Ours()] = 1
    """A checkpoint after every so many epochs."""
    checkpoint_minutes: Annotated[float, Field(ge=0), Role.FREE, Role.SAME_PACE, Ours()] = 10.0
    """A checkpoint at least every so many minutes, also within an epoch, but for at most 1 % of the
    time: what a machine that breaks can cost. 0: at the ends of epochs alone."""
    keep_every: Annotated[int, Field(ge=0), Role.FREE, Role.SAME_PACE, Ours()] = 0
    """Keep the checkpoints of every so many epochs for good; 0: the last two and the best."""

    @model_validator(mode="before")
    @classmethod
    def _resolve(cls, data: Any) -> Any:
        """Write the peer's defaults, which depend on the model and optimizer, into the fields."""
        if not isinstance(data, Mapping):
            return data
        data = dict(data)
        if data.get("precision") == "amp_bfloat16":
            data["precision"] = "amp_bf16"
        if (given := data.get("dataset_type", "auto")) in ("auto", "csv"):
            data["dataset_type"] = _dataset_type(data.get("train_data"), given)
        for name, applies in _where_fast_applies(data).items():
            data.setdefault(name, applies and data.get("speed", "fast") == "fast")
        names = ["lr", "beta1", "beta2", "eps"]
        if str(data.get("opt", "adamw")).startswith("timm/"):
            if data.get("lr") is None:
                raise ValueError(f"opt: {data['opt']} has no default learning rate; give lr")
            for name in names[1:]:
                data.setdefault(name, None)
            return data
        defaults = _peer_defaults(str(data.get("model", "RN50")))
        for name in names:
            if data.get(name) is None:
                data[name] = defaults[name]
        return data

    @property
    def keep(self) -> Keep:
        """Which checkpoints are written and kept."""
        return Keep(
            every=self.checkpoint_frequency,
            for_good=self.keep_every,
            minutes=self.checkpoint_minutes,
        )

    @model_validator(mode="after")
    def _agree(self) -> Config:
        _check_optimizer(self)
        _check_execution(self)
        _check_reading(self)
        _check_schedule(self)
        _check_loss(self)
        refuse_unclear(self.evaluations, default_path=self.imagenet_val, default="imagenet_val")
        _check_locks(self)
        _check_average(self)
        return self


CLIPS = ("grad_clip_norm", "grad_clip_units", "grad_clip_z")
"""Ways to clip a gradient, of which a run has one."""
FAST = ("fused", "channels_last", "fast_resize")
"""What ``speed: fast`` turns on: another rounding of the same formulas."""


def _where_fast_applies(data: Mapping[str, Any]) -> dict[str, bool]:
    augmentation = data.get("aug_cfg") or {}
    use_timm = (
        augmentation.get("use_timm")
        if isinstance(augmentation, Mapping)
        else getattr(augmentation, "use_timm", False)
    )
    return {
        "fused": data.get("opt", "adamw") == "adamw",
        "channels_last": True,
        "fast_resize": not use_timm,
    }


def _dataset_type(train_data: Any, given: str) -> str:
    if given == "auto" and (train_data is None or str(train_data).endswith(".tar")):
        return "webdataset"
    shown = "is read from a CSV" if given == "csv" else "does not end in .tar"
    raise ValueError(
        f"train_data {str(train_data)!r} {shown}. Give WebDataset shards "
        "(.../train-{0000..0575}.tar); ablate data pack LIST FOLDER writes them from a CSV of "
        "pictures and captions"
    )


def is_vit(model: str) -> bool:
    """As open_clip_train tells when it chooses AdamW's defaults."""
    return "vit" in model.lower()


def _check_optimizer(config: Config) -> None:
    if config.speed == "exact" and (given := [name for name in FAST if getattr(config, name)]):
        raise ValueError(
            f"speed: exact is the peer's arithmetic, and {' and '.join(given)} rounds "
            "otherwise; remove one of the two"
        )
    clips = [name for name in CLIPS if getattr(config, name) is not None]
    if len(clips) > 1:
        raise ValueError(f"{' and '.join(clips)} clip the same gradient; keep one")
    if config.clip_updates and config.opt != "adamw":
        raise ValueError("clip_updates is for opt: adamw; remove it")
    if config.logit_scale_init is not None:
        if config.logit_scale_init > config.logit_scale_max:
            raise ValueError(
                f"logit_scale_init {config.logit_scale_init} is above logit_scale_max "
                f"{config.logit_scale_max}"
            )
        if config.init_from is not None:
            raise ValueError(
                "logit_scale_init does nothing with init_from, whose weights bring their own; "
                "remove it"
            )
    if config.opt == "adamw" and config.opt_kwargs:
        raise ValueError("opt_kwargs are for opt: timm/...; opt: adamw has fields of its own")
    if config.opt == "adamw" and config.momentum is not None:
        raise ValueError("momentum does nothing with opt: adamw; remove it, or use timm/sgd")
    if config.opt != "adamw":
        if (config.beta1 is None) != (config.beta2 is None):
            raise ValueError("opt: timm/... takes both betas or none; set the other one too")
        if config.fused:
            raise ValueError("fused is for opt: adamw; remove it")
        if config.param_groups != "open_clip":
            raise ValueError("opt: timm/... groups parameters itself; remove param_groups")


def _check_execution(config: Config) -> None:
    if config.qk_norm and config.grad_checkpointing:
        raise ValueError(
            "open_clip 3.3.0 cannot recompute the activations of attention with qk_norm; "
            "remove grad_checkpointing or qk_norm"
        )
    if config.cuda_graphs and not config.torchcompile:
        raise ValueError(
            "cuda_graphs does nothing without torchcompile; set torchcompile: true, or remove it"
        )
    if config.cuda_graphs and config.accum_freq > 1:
        raise ValueError(
            "cuda_graphs uses the memory of a micro-batch's features again for the next one, "
            "and accum_freq needs them all; set accum_freq: 1, or remove cuda_graphs"
        )


def _check_reading(config: Config) -> None:
    if config.fast_resize and config.aug_cfg.use_timm:
        raise ValueError(
            "fast_resize does nothing with aug_cfg.use_timm, which resizes itself; remove one"
        )


def _check_schedule(config: Config) -> None:
    if config.lr_scheduler == "const-cooldown":
        if config.epochs_cooldown is None:
            raise ValueError("lr_scheduler: const-cooldown needs epochs_cooldown")
        if config.epochs_cooldown > config.epochs:
            raise ValueError(
                f"epochs_cooldown {config.epochs_cooldown} is longer than epochs {config.epochs}"
            )
        if config.lr_cooldown_end > config.lr:
            raise ValueError(f"lr_cooldown_end {config.lr_cooldown_end} is above lr {config.lr}")
    else:
        for name, default in (
            ("epochs_cooldown", None),
            ("lr_cooldown_power", 1.0),
            ("lr_cooldown_end", 0.0),
        ):
            if getattr(config, name) != default:
                raise ValueError(
                    f"{name} does nothing with lr_scheduler: {config.lr_scheduler}; "
                    "set lr_scheduler: const-cooldown, or remove it"
                )


def _check_loss(config: Config) -> None:
    if config.siglip:
        for name in ("local_loss", "gather_with_grad"):
            if getattr(config, name):
                raise ValueError(f"{name} does nothing with siglip; remove it")
    elif config.loss_dist_impl is not None:
        raise ValueError("loss_dist_impl is for siglip; set siglip: true, or remove it")


def _check_average(config: Config) -> None:
    if config.ema_decay is not None and config.precision not in ("fp32", "amp", "amp_bf16"):
        raise ValueError(
            f"precision: {config.precision} keeps weights in 16 bits, in which an average that "
            "moves by a thousandth of a difference stands still; take amp_bf16 or amp, or remove "
            "ema_decay"
        )


def _check_locks(config: Config) -> None:
    for switch, names in (
        ("lock_image", ("lock_image_unlocked_groups", "lock_image_freeze_bn_stats")),
        ("lock_text", ("lock_text_unlocked_layers", "lock_text_freeze_layer_norm")),
    ):
        for name in names:
            if getattr(config, name) and not getattr(config, switch):
                raise ValueError(f"{name} does nothing without {switch}; set {switch}: true")
