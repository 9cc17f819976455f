"""The fields of a trial: open_clip_train's own flags with underscores, and a few of our own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ablate.recipes.openclip import evaluation_fields as specs

if TYPE_CHECKING:
    pass

PEER = "open_clip_train 3.3.0"


Precision = Literal["fp32", "amp", "amp_bf16", "bf16", "fp16", "pure_bf16", "pure_fp16"]


Share = Annotated[float, Field(ge=0.0, le=1.0)]


Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


Positive = Annotated[float, Field(gt=0.0)]


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


class InitFrom(_Frozen):
    """Weights to start from: model weights only, never an optimizer's state (that is resuming)."""

    PATH_FIELDS: ClassVar[tuple[str, ...]] = ("path",)

    path: Annotated[str, Field(min_length=1)]
    """A .safetensors file, or a torch file of plain tensors; relative to the study's root."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    """What the file must be; anything when empty."""
    key_map: tuple[tuple[str, str], ...] = ()
    """Replacements (regular expression, text) that turn the file's names into the model's."""
    reset: tuple[str, ...] = ()
    """Globs of tensors that keep their random initialisation."""
    allow_missing: tuple[str, ...] = ()
    """Globs of tensors that the file may lack."""
    allow_unexpected: tuple[str, ...] = ()
    """Globs of tensors (after key_map) that only the file has."""
    on_shape: Literal["error", "skip", "interp_pos"] = "error"
    """A tensor of another shape: refuse, skip it, or interpolate positional embeddings."""
    min_loaded: Share = 0.99
    """Share of the model's parameters that must be loaded."""


def _peer_defaults(model: str) -> dict[str, float]:
    """Adam's defaults by the model's name, as open_clip_train.params.get_default_params."""
    if is_vit(model):
        return {"lr": 5e-4, "beta1": 0.9, "beta2": 0.98, "eps": 1e-6}
    return {"lr": 5e-4, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8}


class Config(_Frozen):
    """One training run of open_clip; the fields are open_clip_train 3.3.0's flags."""

    # what is trained
    model: Annotated[str, Field(min_length=1)] = "RN50"
    """Name of an open_clip model, or tiny-rn-a, RN50's small sister that trains on a laptop."""
    siglip: bool = False
    """Sigmoid loss instead of the softmax one, with SigLIP's initial scale and bias."""
    force_image_size: Annotated[int, Field(gt=0)] | None = None
    """Side of the input image, pixels; the model's own when empty."""
    force_context_length: Annotated[int, Field(gt=0)] | None = None
    """Tokens of a caption; the model's own when empty."""
    force_quick_gelu: bool = False
    """QuickGELU activations, as OpenAI's weights need."""
    force_custom_text: bool = False
    """Build the text tower as a module of its own."""
    force_patch_dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Share of patches dropped in training; ViT only, the model's own when empty."""
    image_mean: tuple[float, float, float] | None = None
    """Mean of the input channels; the model's own when empty."""
    image_std: tuple[Positive, Positive, Positive] | None = None
    """Deviation of the input channels; the model's own when empty."""
    image_interpolation: Literal["bicubic", "bilinear", "random"] | None = None
    """Interpolation when an image is resized; the model's own when empty."""
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

    # how it is optimised
    precision: Precision = "amp"
    """fp32, amp (fp16 autocast + scaler), amp_bf16, or weights cast: fp16, bf16, pure_*."""
    opt: Annotated[str, Field(pattern=r"^(adamw|timm/[\w-]+)$")] = "adamw"
    """adamw, or timm/NAME for an optimizer of timm."""
    lr: Positive = Field(default=None)  # type: ignore[assignment]  # resolved, never None
    """Peak learning rate; 5e-4 by default."""
    beta1: Beta | None = None
    """Adam's decay of the mean; 0.9 by default."""
    beta2: Beta | None = None
    """Adam's decay of the squares; 0.98 by default for names with "vit", else 0.999."""
    eps: Positive | None = None
    """Adam's epsilon; 1e-6 by default for names with "vit", else 1e-8."""
    wd: Annotated[float, Field(ge=0)] = 0.2
    """Decoupled weight decay of the decayed parameters."""
    momentum: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Momentum, for optimizers of timm that have one."""
    warmup: Annotated[int, Field(ge=0)] = 10000
    """Optimizer steps of linear warmup."""
    lr_scheduler: Literal["cosine", "const", "const-cooldown"] = "cosine"
    """Shape of the learning rate after warmup."""
    skip_scheduler: bool = False
    """Keep the learning rate at lr from the first step on."""
    epochs_cooldown: Annotated[int, Field(ge=1)] | None = None
    """Epochs of cooldown at the end, for const-cooldown."""
    lr_cooldown_power: Positive = 1.0
    """Power of the cooldown's polynomial; 1 is linear."""
    lr_cooldown_end: Annotated[float, Field(ge=0)] = 0.0
    """Learning rate at the end of the cooldown."""
    epochs: Annotated[int, Field(ge=1)] = 32
    """Passes over the training data."""
    batch_size: Annotated[int, Field(ge=1)] = 64
    """Samples of one worker's batch; the global batch is that times workers times accum_freq."""
    accum_freq: Annotated[int, Field(ge=1)] = 1
    """Batches of one optimizer step; their features are cached, so all are negatives."""
    grad_clip_norm: Positive | None = None
    """Largest global gradient norm; empty: no clipping."""
    local_loss: bool = False
    """Loss of the local rows of the logits only, not of the whole matrix on every worker."""
    gather_with_grad: bool = False
    """Let gradients flow back through the gathered features."""
    loss_dist_impl: Literal["bidir", "shift", "reduce", "gather"] | None = None
    """How siglip exchanges text features; bidir when empty."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of weights, data order and augmentation."""

    # data
    train_data: str | None = None
    """WebDataset shards with braces ({0000..0575}.tar), several sources joined with ``::``."""
    train_num_samples: Annotated[int, Field(ge=1)] | None = None
    """Samples of an epoch; counted in the shards when empty."""
    dataset_type: Literal["webdataset", "auto"] = "auto"
    """Kind of train_data; auto goes by its ending."""
    aug_cfg: Augmentation = Augmentation()
    """Augmentation of training images."""
    imagenet_val: str | None = None
    """Folder of class folders for zero-shot accuracy; see :func:`zero_shot_classes`."""
    zeroshot_frequency: Annotated[int, Field(ge=0)] = 2
    """Zero-shot accuracy after every so many epochs and after the last; 0: never."""
    workers: Annotated[int, Field(ge=0)] = 4
    """Processes that load data, for each worker."""

    # our own, see OWN_FIELDS
    evaluations: tuple[specs.Evaluation, ...] = ()
    """More evaluations: zero_shot on other sets, knn, linear, retrieval; each on its schedule."""
    init_from: InitFrom | None = None
    """Weights to start from, with a new optimizer; random initialisation when empty."""
    param_groups: Literal["open_clip", "open_clip_next", "timm"] = "open_clip"
    """Rule that says which parameters are not decayed."""
    fused: bool = False
    """Fused AdamW: the same formula in one kernel, rounded differently (1e-7 a step)."""
    cuda_graphs: bool = False
    """With torchcompile, on GPUs: launch the compiled passes as CUDA graphs (inductor's mode
    reduce-overhead). The same kernels with less launching: no rounding beyond torchcompile's."""
    channels_last: bool = False
    """Images and convolutions in channels-last memory: other kernels, so other rounding."""
    data_order: Literal["indexed", "stream"] = "indexed"
    """indexed: by seed and position. stream: the peer's own pipeline, which nothing repeats."""
    fast_jpeg: bool = False
    """Decode large JPEGs at 1/2, 1/4 or 1/8 of their side where a crop allows it: other pixels,
    by 2 to 10 of 255 on average where it applies."""
    fast_resize: bool = False
    """Resize crops by torch's 8-bit kernel: a few values of a thousand differ by 1 of 255."""
    max_fault_share: Share = 0.01
    """Share of unreadable samples above which the trial fails as a data fault."""
    cache_gib: Annotated[float, Field(ge=0)] = 8.0
    """Largest cache of decoded images a data set may fill, GiB; 0: none."""
    prefetch: Annotated[int, Field(ge=1)] = 4
    """Batches that each loading process reads ahead."""
    pin_memory: bool = True
    """With a GPU: batches wait in page-locked memory, so that their transfer overlaps the step."""
    checkpoint_frequency: Annotated[int, Field(ge=1)] = 1
    """A checkpoint after every so many epochs."""
    keep_every: Annotated[int, Field(ge=0)] = 0
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
        if data.get("dataset_type", "auto") == "auto":
            data["dataset_type"] = _dataset_type(data.get("train_data"))
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

    @model_validator(mode="after")
    def _agree(self) -> Config:
        if self.opt == "adamw" and self.momentum is not None:
            raise ValueError("momentum does nothing with opt: adamw; remove it, or use timm/sgd")
        if self.opt != "adamw":
            if (self.beta1 is None) != (self.beta2 is None):
                raise ValueError("opt: timm/... takes both betas or none; set the other one too")
            if self.fused:
                raise ValueError("fused is for opt: adamw; remove it")
            if self.param_groups != "open_clip":
                raise ValueError("opt: timm/... groups parameters itself; remove param_groups")
        if self.cuda_graphs and not self.torchcompile:
            raise ValueError(
                "cuda_graphs does nothing without torchcompile; set torchcompile: true, "
                "or remove it"
            )
        if self.cuda_graphs and self.accum_freq > 1:
            raise ValueError(
                "cuda_graphs uses the memory of a micro-batch's features again for the next one, "
                "and accum_freq needs them all; set accum_freq: 1, or remove cuda_graphs"
            )
        if self.data_order == "stream":
            for name in ("fast_jpeg", "fast_resize"):
                if getattr(self, name):
                    raise ValueError(
                        f"{name} does nothing with data_order: stream, which is the peer's own "
                        "pipeline; remove it, or set data_order: indexed"
                    )
        elif self.fast_resize and self.aug_cfg.use_timm:
            raise ValueError(
                "fast_resize does nothing with aug_cfg.use_timm, which resizes itself; remove one"
            )
        if self.lr_scheduler == "const-cooldown":
            if self.epochs_cooldown is None:
                raise ValueError("lr_scheduler: const-cooldown needs epochs_cooldown")
            if self.epochs_cooldown > self.epochs:
                raise ValueError(
                    f"epochs_cooldown {self.epochs_cooldown} is longer than epochs {self.epochs}"
                )
            if self.lr_cooldown_end > self.lr:
                raise ValueError(f"lr_cooldown_end {self.lr_cooldown_end} is above lr {self.lr}")
        else:
            for name, default in (
                ("epochs_cooldown", None),
                ("lr_cooldown_power", 1.0),
                ("lr_cooldown_end", 0.0),
            ):
                if getattr(self, name) != default:
                    raise ValueError(
                        f"{name} does nothing with lr_scheduler: {self.lr_scheduler}; "
                        "set lr_scheduler: const-cooldown, or remove it"
                    )
        if self.siglip:
            for name in ("local_loss", "gather_with_grad"):
                if getattr(self, name):
                    raise ValueError(f"{name} does nothing with siglip; remove it")
        elif self.loss_dist_impl is not None:
            raise ValueError("loss_dist_impl is for siglip; set siglip: true, or remove it")
        specs.refuse_unclear(self.evaluations, default_path=self.imagenet_val)
        for switch, names in (
            ("lock_image", ("lock_image_unlocked_groups", "lock_image_freeze_bn_stats")),
            ("lock_text", ("lock_text_unlocked_layers", "lock_text_freeze_layer_norm")),
        ):
            for name in names:
                if getattr(self, name) and not getattr(self, switch):
                    raise ValueError(f"{name} does nothing without {switch}; set {switch}: true")
        return self


def _dataset_type(train_data: Any) -> str:
    if train_data is None or str(train_data).endswith(".tar"):
        return "webdataset"
    raise ValueError(
        f"train_data {str(train_data)!r} does not end in .tar. Give WebDataset shards "
        "(.../train-{0000..0575}.tar); other kinds must be converted first"
    )


NOT_IDENTITY = frozenset(
    {"workers", "cache_gib", "prefetch", "pin_memory", "checkpoint_frequency", "keep_every"}
)
"""Fields that change nothing in the result: they do not count in a trial's id."""


SAME_PACE = frozenset(
    {
        *("lr", "wd", "beta1", "beta2", "eps", "momentum", "warmup", "lr_scheduler"),
        *("skip_scheduler", "epochs_cooldown", "lr_cooldown_power", "lr_cooldown_end", "epochs"),
        *("train_num_samples", "zeroshot_frequency", "param_groups", "init_from"),
        *("max_fault_share", "checkpoint_frequency", "keep_every"),
    }
)
"""Fields that change neither the time of a step nor that of an evaluation."""


PATH_FIELDS = ("train_data", "imagenet_val")


SPEED_FIELDS = frozenset(
    {
        *("lr", "warmup", "lr_scheduler", "skip_scheduler", "batch_size", "accum_freq", "epochs"),
        *("opt", "beta1", "beta2", "momentum", "eps", "wd", "grad_clip_norm"),
        *("aug_cfg", "force_patch_dropout", "pretrained", "init_from", "siglip"),
    }
)
"""Fields that change how fast a run learns: early scores of their values are not comparable."""


def is_vit(model: str) -> bool:
    """As open_clip_train tells when it chooses AdamW's defaults."""
    return "vit" in model.lower()
