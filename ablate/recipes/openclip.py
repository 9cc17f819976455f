"""CLIP models of open_clip, trained as ``open_clip_train.main`` 3.3.0 trains them.

The only module of the project that imports open_clip. The Config's fields are open_clip_train's
own flags (with underscores), so a study reads like its command line, and :func:`command` gives
that command line back with every value resolved.

Three facts that an ablation must know, and ``check`` says:

* The gradients of the loss without flags are those of ``gather_with_grad`` divided by the number of
  workers: the same experiment under AdamW without clipping. ``local_loss`` without
  ``gather_with_grad`` is a different, biased gradient.
* ``precision: amp`` is fp16 autocast with a gradient scaler, also on a CPU.
* The default warmup is 10000 steps, which covers a short run completely.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ablate.datasets.shard_names import expand_shards
from ablate.errors import DataError, LoadError
from ablate.recipes import _evaluations as specs
from ablate.recipes import absolute

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    from ablate.datasets.shards import ShardIndex
    from ablate.recipes import Evaluation, Specimen, Task
    from ablate.training.data import Batch, ImageTextSamples
    from ablate.training.evaluate import Encoder, EvalImages, ImageSource
    from ablate.training.health import Look

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
    if _is_vit(model):
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


OWN_FIELDS: Mapping[str, tuple[Any, ...]] = {
    "init_from": (None,),
    "param_groups": ("open_clip",),
    "evaluations": (),
    "fused": (),
    "channels_last": (),
    "data_order": (),
    "fast_jpeg": (False,),
    "fast_resize": (False,),
    "max_fault_share": (),
    "cache_gib": (),
    "prefetch": (),
    "pin_memory": (),
    "checkpoint_frequency": (),
    "keep_every": (),
}
"""Fields that are no flags of the peer, each with the values under which our run is the peer's;
none: any value, the field has no influence on a sound run, or (fused, channels_last) on its
rounding only, or (data_order) on which of equally good orders is taken."""

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

LONG_WARMUP = 0.1
"""A warmup above this share of the steps is warned of."""

PATH_FIELDS = ("train_data", "imagenet_val")

SPEED_FIELDS = frozenset(
    {
        *("lr", "warmup", "lr_scheduler", "skip_scheduler", "batch_size", "accum_freq", "epochs"),
        *("opt", "beta1", "beta2", "momentum", "eps", "wd", "grad_clip_norm"),
        *("aug_cfg", "force_patch_dropout", "pretrained", "init_from", "siglip"),
    }
)
"""Fields that change how fast a run learns: early scores of their values are not comparable."""


# --------------------------------------------------------------------------- plan


def check(config: Config, *, workers: int, gpus: int, steps: int | None = None) -> list[str]:
    """Warnings about a configuration on a gang of `workers`, each with `gpus` GPUs (0: CPU).

    `steps` of the run, where they are known.

    Raises:
        ValueError: it cannot run there; says why and what to change.
    """
    if config.train_data is None:
        raise ValueError("train_data is missing; give the shards to train on")
    expand_shards(config.train_data)  # refuses commands and addresses
    if config.use_bn_sync and workers > 1 and gpus == 0:
        raise ValueError(
            "use_bn_sync needs GPUs: torch's SyncBatchNorm has no CPU kernel. "
            "Set gang.gpus_per_worker: 1, or use_bn_sync: false"
        )
    _check_locks(config)
    warnings = []
    if config.use_bn_sync and workers == 1:
        warnings.append("use_bn_sync does nothing with one worker")
    if gpus == 0:
        if config.precision == "amp":
            warnings.append(
                "precision amp on a CPU is fp16 autocast with a CPU gradient scaler: real, but "
                "slower than fp32 where the CPU emulates fp16; amp_bf16 is the usual choice on CPUs"
            )
        if config.precision in ("fp16", "pure_fp16"):
            warnings.append(
                f"precision {config.precision} on a CPU emulates fp16: right in its rounding, slow"
            )
    if config.precision in ("pure_fp16", "fp16") and (config.eps or 1.0) < 6e-8:
        warnings.append(
            f"eps {config.eps} is below fp16's smallest number: Adam divides by zero where "
            "weights are fp16. Set eps: 1e-6"
        )
    if config.data_order == "stream":
        if importlib.util.find_spec("webdataset") is None:
            raise ValueError(
                "data_order: stream needs the webdataset library: install ablate-runner[stream], "
                "or set data_order: indexed"
            )
        warnings.append(
            "data_order stream is not reproducible: the peer's pipeline shuffles by process id and "
            "time, a resumed epoch repeats some samples and misses others, and unreadable ones "
            "are skipped uncounted"
        )
    if workers == 1:
        for name in ("local_loss", "gather_with_grad"):
            if getattr(config, name):
                warnings.append(f"{name} does nothing with one worker")
    elif config.local_loss and not config.gather_with_grad:
        warnings.append(
            "local_loss without gather_with_grad gives a biased gradient: "
            "use it as a negative control only"
        )
    if config.precision == "pure_bf16" and not _is_vit(config.model):
        warnings.append(
            "pure_bf16 keeps BatchNorm's running statistics in bf16, where small updates round to "
            "nothing: off by about 1 % at the usual momentum of 0.1, by a sixth at 0.01, and they "
            "never move at 0.001; amp_bf16 and bf16 keep them in fp32"
        )
    if steps is not None:
        warnings += _warmup_warning(config, steps)
    return warnings


def _is_vit(model: str) -> bool:
    """As open_clip_train tells when it chooses AdamW's defaults."""
    return "vit" in model.lower()


def _check_locks(config: Config) -> None:
    """Raise ValueError for locks that open_clip's own towers refuse with an assertion."""
    model = _model_config(config.model)
    hugging_face = "hf_model_name" in model.get("text_cfg", {})
    if config.lock_text and not config.lock_text_freeze_layer_norm and not hugging_face:
        raise ValueError(
            f"the text tower of {config.model} cannot be locked without its LayerNorms; "
            "set lock_text_freeze_layer_norm: true, or lock_text: false"
        )
    resnet = isinstance(model.get("vision_cfg", {}).get("layers"), list)
    if config.lock_image_unlocked_groups and resnet:
        raise ValueError(
            f"the image tower of {config.model} can only be locked whole; "
            "set lock_image_unlocked_groups: 0"
        )


def _model_config(name: str) -> dict[str, Any]:
    """open_clip's description of a model, without importing it; empty when it is not known."""
    library = importlib.util.find_spec("open_clip")
    folders = [Path(__file__).parent]
    if library is not None and library.origin is not None:
        folders.append(Path(library.origin).parent / "model_configs")
    for folder in folders:
        path = folder / f"{name.replace('/', '-')}.json"
        if path.is_file():
            content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return content
    return {}


def _warmup_warning(config: Config, steps: int) -> list[str]:
    if config.skip_scheduler or config.warmup <= LONG_WARMUP * steps:
        return []
    if config.warmup >= steps:
        return [
            f"warmup {config.warmup} covers the whole run of {steps} steps: "
            "the learning rate never reaches lr"
        ]
    return [
        f"warmup {config.warmup} is {config.warmup / steps:.0%} of the {steps} steps: above "
        f"{LONG_WARMUP:.0%}, a shorter warmup is part of what is compared; scale it with the run"
    ]


def num_samples(config: Config, *, root: Path) -> int:
    """Samples of one epoch: as given, else counted in the shards under `root`."""
    if config.train_num_samples is not None:
        return config.train_num_samples
    return _train_index(absolute(config, PATH_FIELDS, root=root)).num_samples


def num_steps(config: Config, *, workers: int, num_samples: int) -> int:
    """Optimizer steps of the run.

    As the peer counts with at most one loader process: batches of an epoch are rounded up (the
    last is filled from the epoch's start), then divided by accum_freq and rounded down.
    """
    batches = math.ceil(num_samples / (config.batch_size * workers))
    return batches // config.accum_freq * config.epochs


def share_out(config: Config, *, workers: int, ranks: int, num_samples: int) -> Config:
    """The configuration with which `ranks` do the work of `workers`, which they divide.

    Each takes several micro-batches in the place of one, so a step sees the same samples, and an
    epoch has as many steps. BatchNorm and losses that look at a rank's own samples see others.
    """
    whole = config.batch_size * workers
    return Config(
        **{
            **config.model_dump(),
            "accum_freq": config.accum_freq * (workers // ranks),
            # Rounded up as num_steps rounds, so that both count the same steps.
            "train_num_samples": math.ceil(num_samples / whole) * whole,
        }
    )


def num_evaluations(config: Config) -> int:
    """Epochs after which something is evaluated."""
    every = [spec.every for spec in config.evaluations]
    if _zero_shot_runs(config):
        every.append(config.zeroshot_frequency)
    schedules = [_schedule_of_epochs(number, config.epochs) for number in every]
    return sum(any(due(epoch) for due in schedules) for epoch in range(1, config.epochs + 1))


def shorten(config: Config, *, steps: int, workers: int) -> Config:
    """A run of a few steps and one evaluation that takes the same time for each."""
    samples = steps * config.batch_size * config.accum_freq * workers
    return config.model_copy(
        update={"train_num_samples": samples, "epochs": 1, "epochs_cooldown": None}
    )


def measures(config: Config) -> tuple[str, ...]:
    """Names of the measurements that the run's evaluations give."""
    own = ("imagenet_top1", "imagenet_top5") if _zero_shot_runs(config) else ()
    return own + tuple(name for spec in config.evaluations for name in spec.measures())


def _zero_shot_runs(config: Config) -> bool:
    return config.imagenet_val is not None and config.zeroshot_frequency > 0


def warmup_steps(config: Config) -> int:
    """Steps over which the learning rate rises; 0 with skip_scheduler."""
    return 0 if config.skip_scheduler else config.warmup


def chance(config: Config, *, root: Path, metric: str = "imagenet_top1") -> float:
    """A measurement by guessing: k of all classes, or of all pairs; 0 where it is not measured.

    Raises:
        DataError: the data of that evaluation are not there.
    """
    if metric.startswith("imagenet_"):
        path, num = config.imagenet_val, metric.removeprefix("imagenet_top")
    else:
        found = [spec for spec in config.evaluations if metric in spec.measures()]
        if not found:
            return 0.0
        path = found[0].path or config.imagenet_val
        measure = metric.removesuffix(found[0].label)
        num = measure.rpartition("_r" if found[0].kind == "retrieval" else "_top")[2]
    if path is None:
        return 0.0
    kind = "retrieval" if metric.startswith("retrieval_") else "labelled"
    return min(1.0, int(num) / _num_answers(path, root, kind))


def _num_answers(path: str, root: Path, kind: str) -> int:
    placed = "::".join(str(root / part) for part in path.split("::"))
    if kind == "retrieval":
        return _index(placed).num_samples
    if not path.endswith(".tar"):
        return len(class_folders(Path(placed)))
    names, templates = zero_shot_classes(placed)
    return 1000 if templates is None else len(names)


def class_folders(folder: Path) -> list[Path]:
    """Class folders of an image folder, in torchvision's order: a class's number is its place.

    Raises:
        DataError: there are none.
    """
    if folder.is_dir():
        found = sorted(entry.path for entry in os.scandir(folder) if entry.is_dir())
        if found:
            return [Path(path) for path in found]
    raise DataError(
        f"{folder} holds no class folders. Give imagenet_val, or an evaluation's path, a folder "
        "with one folder of images for each class (for the small data set: ablate data emoji)"
    )


def zero_shot_classes(data: Path | str) -> tuple[list[str], list[str] | None]:
    """Class names and prompt templates of labelled images: a folder of class folders, or shards.

    With ``classnames.json`` (a list, in the order of the class numbers) and ``templates.json``
    (a list of texts with ``{}`` for the name) in the folder, or beside the first shard, those;
    else ImageNet's, for which there must be 1000 class folders (of shards that is checked when
    they are read). Templates are None for ImageNet's 80.

    Raises:
        DataError: names and folders do not match.
    """
    shards = str(data).endswith(".tar")
    folder = Path(expand_shards(str(data))[0]).parent if shards else Path(data)
    num_classes = None if shards else len(class_folders(folder))
    names_file, templates_file = folder / "classnames.json", folder / "templates.json"
    if names_file.exists() != templates_file.exists():
        missing = templates_file if names_file.exists() else names_file
        raise DataError(f"{missing} is missing: classnames.json and templates.json go together")
    if not names_file.exists():
        if num_classes not in (None, 1000):
            raise DataError(
                f"{folder} has {num_classes} classes and no classnames.json, and open_clip's "
                "ImageNet names are for 1000. Add classnames.json and templates.json to it"
            )
        return [], None
    names = json.loads(names_file.read_text(encoding="utf-8"))
    templates = json.loads(templates_file.read_text(encoding="utf-8"))
    if num_classes not in (None, len(names)):
        raise DataError(f"{names_file} names {len(names)} classes, {folder} has {num_classes}")
    if not templates or not all("{}" in template for template in templates):
        raise DataError(f"{templates_file} must list texts that hold {{}} for the class name")
    return names, templates


# --------------------------------------------------------------------------- the peer


def command(config: Config, *, workers: int) -> list[str]:
    """The command that trains this with the peer, every value resolved.

    Raises:
        ValueError: a field of our own makes this run something that the peer cannot do.
    """
    for name, same in OWN_FIELDS.items():
        if same and getattr(config, name) not in same:
            raise ValueError(
                f"{name} {getattr(config, name)!r} has no equal in {PEER}; "
                f"the exported run would differ. Set {name}: {same[0]}"
            )
    arguments: list[str] = []
    for name in Config.model_fields:
        if name not in OWN_FIELDS:
            arguments += _flag(name, getattr(config, name))
    # Without "--" torchrun takes the peer's --logs for an abbreviation of its own --logs-specs.
    launcher = ["torchrun", "--nproc_per_node", str(workers), "-m", "--", "open_clip_train.main"]
    return [*launcher, *arguments]


def _flag(name: str, value: Any) -> list[str]:
    flag = "--" + name.replace("_", "-")
    if value is None or value is False:
        return []
    if value is True:
        return [flag]
    if isinstance(value, Augmentation):
        given = {key: item for key, item in value if item is not None}
        return [flag, *(f"{key}={_compact(item)}" for key, item in given.items())]
    if isinstance(value, tuple):
        return [flag, *(repr(item) for item in value)]
    return [flag, value if isinstance(value, str) else repr(value)]


def _compact(value: Any) -> str:
    return repr(value).replace(" ", "")


def shell(arguments: Sequence[str]) -> str:
    """A command as one line that a POSIX shell reads back unchanged."""
    return shlex.join(arguments)


def export_model(config: Config, weights: Path, folder: Path) -> None:
    """Write `folder` so that open_clip loads it as ``local-dir:FOLDER``.

    `weights` is a checkpoint's model.safetensors. The weights are copied as they are.

    Raises:
        ValueError: the tokenizer is not open_clip's own, so its files cannot be written.
    """
    import shutil

    import open_clip

    _register_models()
    model_config = open_clip.get_model_config(config.model)
    if model_config is None:
        raise ValueError(f"open_clip knows no model {config.model!r}")
    if model_config["text_cfg"].get("hf_tokenizer_name"):
        raise ValueError(f"{config.model} has a tokenizer of its own, which is not exported")
    if config.force_image_size is not None:
        model_config["vision_cfg"]["image_size"] = config.force_image_size
    if config.force_context_length is not None:
        model_config["text_cfg"]["context_length"] = config.force_context_length
    if config.force_quick_gelu:
        model_config["quick_gelu"] = True
    if config.force_custom_text:
        model_config["custom_text"] = True
    if config.siglip:
        model_config["init_logit_bias"] = -10
    folder.mkdir(parents=True, exist_ok=True)
    preprocess = {
        "mean": config.image_mean or open_clip.OPENAI_DATASET_MEAN,
        "std": config.image_std or open_clip.OPENAI_DATASET_STD,
        "interpolation": config.image_interpolation or "bicubic",
        "resize_mode": config.image_resize_mode or "shortest",
    }
    content = {"model_cfg": model_config, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(content, indent=2) + "\n")
    shutil.copyfile(weights, folder / "open_clip_model.safetensors")
    model = open_clip.create_model(f"local-dir:{folder}", output_dict=True)
    features = {name: value.tolist() for name, value in _probe_features(model).items()}
    (folder / PROBE_FILE).write_text(json.dumps(features) + "\n")


PROBE_FILE = "probe_features.json"
"""Features of a fixed probe, stored beside exported weights: whoever loads them can check."""


def _probe_features(model: Any, *, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """Normalised features of four fixed images and texts, in eval mode; shape (4, dimensions).

    `dtype` is the type of images that the model takes, where it is not that of its weights.
    """
    import numpy as np
    import torch
    from open_clip.utils import to_2tuple

    from ablate.training.augment import uniforms

    height, width = to_2tuple(model.visual.image_size)
    numbers = uniforms(np.arange(4, dtype=np.uint64), 3 * height * width)
    images = torch.from_numpy(numbers.astype(np.float32) * 4 - 2).view(4, 3, height, width)
    texts = torch.arange(4 * model.context_length).view(4, -1) * 997 % 40000 + 1
    texts[:, -1] = model.vocab_size - 1  # the largest number ends a text
    device = model.logit_scale.device
    training = model.training
    model.eval()
    with torch.no_grad():
        features = {
            "image": _encode_image(model, images.to(device, dtype)).float().cpu(),
            "text": _encode_text(model, texts.to(device)).float().cpu(),
        }
    model.train(training)
    return features


_OF_THE_MODEL = (
    "model", "siglip", "force_image_size", "force_context_length", "force_quick_gelu",
    "force_custom_text", "force_patch_dropout", "image_mean", "image_std", "image_interpolation",
    "image_resize_mode", "precision", "init_from",
)  # fmt: skip
"""Fields that decide what is built and loaded."""

_FRESH_SEED = 1_234_567_891


def _check_load(config: Config, model: Any, report: Mapping[str, Any]) -> dict[str, Any]:
    """Compare the loaded model with another load, in a fresh process under another seed.

    What the file does not determine is what differs: parameters at their random initialisation.
    The other load is made once for a machine and kept in the cache. Gives what goes into the
    load report: ``reloaded`` in words, and the names in ``random``.

    Raises:
        LoadError: the features differ for another reason than gaps that init_from allows.
    """
    import open_clip
    import torch

    from ablate.training import cache
    from ablate.training.weights import compare_features, digest_tensors

    fields = {name: getattr(config, name) for name in _OF_THE_MODEL}
    seed = _FRESH_SEED + (config.seed == _FRESH_SEED)
    content = Config(**fields, seed=seed).model_dump_json()

    def build(folder: Path) -> None:
        _run_fresh("from ablate.recipes import openclip; openclip._load_afresh", content, folder)

    name = cache.key("load-1", content, report["sha256"], torch.__version__, open_clip.__version__)
    folder = cache.build_once("loads", name, build)
    other = json.loads((folder / "load.json").read_text(encoding="utf-8"))
    mine = digest_tensors(model.state_dict())
    random = sorted(n for n, digest in mine.items() if other["tensors"].get(n) != digest)
    dtype = open_clip.get_input_dtype(config.precision)
    exact = dtype is None and model.logit_scale.device.type == "cpu"
    wrong = compare_features(
        {name: torch.tensor(value) for name, value in other["features"].items()},
        _probe_features(model, dtype=dtype),
        tolerance=1e-4 if exact else 2e-2,  # another device, or 8 bits, rounds otherwise
    )
    far = ", ".join(f"{item.name} by {item.largest:.2g}" for item in wrong)
    allowed = {*report["missing"], *report["mismatched"], *report["reset"]}
    unknown = [name for name in random if name not in allowed]
    if unknown or (wrong and not random):
        why = (
            f"at random initialisation: {', '.join(unknown[:8])}"
            + (f" and {len(unknown) - 8} more" if unknown[8:] else "")
            if unknown
            else "all tensors are equal, so the model computes differently there"
        )
        raise LoadError(
            f"{report['path']} was loaded twice, here and in a fresh process, and the models are "
            f"not the same ({f'features differ: {far}' if wrong else 'features are equal'}); {why}"
        )
    if not wrong:
        said = "equal features in a fresh process"
    else:
        said = f"features differ in a fresh process ({far}): {len(random)} tensors are random"
    return {"reloaded": said, "random": random}


def _load_afresh(content: str, folder: str) -> None:
    """The other process of :func:`_check_load`: builds, loads, and leaves load.json."""
    import open_clip
    import torch

    from ablate.training.weights import digest_tensors

    config = Config.model_validate_json(content)
    model, _, _, _ = _create_model(config, torch.device("cpu"))
    features = _probe_features(model, dtype=open_clip.get_input_dtype(config.precision))
    found = {
        "tensors": digest_tensors(model.state_dict()),
        "features": {name: value.tolist() for name, value in features.items()},
    }
    (Path(folder) / "load.json").write_text(json.dumps(found), encoding="utf-8")


def _run_fresh(function: str, *arguments: object) -> None:
    """Call ``function`` (imports and a name) with these texts in a new interpreter, without GPUs.

    Raises:
        LoadError: it failed; gives its last words.
    """
    import subprocess
    import sys

    code = f"import sys; {function}(*sys.argv[1:])"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**env, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise LoadError(f"init_from cannot be loaded again in a fresh process: {last[0]}")


def _load_weights(config: Config, model: torch.nn.Module) -> dict[str, Any]:
    """Start from config.init_from; the load report, for the record.

    Raises:
        LoadError: the weights do not fit, or the model computes other features than were stored
            with them; says which tensors are at their random initialisation.
    """
    import torch
    from open_clip.model import resize_pos_embed, resize_text_pos_embed

    from ablate.training.weights import compare_features, load_weights

    def resize(state: Any, net: Any) -> None:
        resize_pos_embed(state, net)
        resize_text_pos_embed(state, net)

    source = config.init_from
    assert source is not None
    path = Path(source.path)
    report = load_weights(
        model,
        path,
        sha256=source.sha256,
        key_map=source.key_map,
        reset=source.reset,
        allow_missing=source.allow_missing,
        allow_unexpected=source.allow_unexpected,
        on_shape=source.on_shape,
        min_loaded=source.min_loaded,
        resize=resize,
    )
    content = {**report.to_dict(), "features": "not checked: no probe beside the weights"}
    probe = path.parent / PROBE_FILE
    if report.at_random or report.resized or report.cast:
        content["features"] = "not checked: not all tensors are the file's"
    elif probe.exists():
        stored = {k: torch.tensor(v) for k, v in json.loads(probe.read_text()).items()}
        wrong = compare_features(stored, _probe_features(model))
        if wrong:
            far = ", ".join(f"{item.name} by {item.largest:.2g}" for item in wrong)
            raise LoadError(
                f"{path} loads by name, but the model's features differ from those stored with "
                f"it: {far}. Another architecture (quick_gelu?), or names that were swapped"
            )
        content["features"] = "equal to those stored with the weights"
    return content


# --------------------------------------------------------------------------- train


def build(config: Config, *, rank: int, world_size: int, device: torch.device) -> Task:
    """The model with its initial weights, its data, optimizer, step and evaluations.

    The initial weights are the peer's for the same seed.
    """
    import open_clip
    import torch
    from open_clip.transform import PreprocessCfg

    from ablate.recipes import Task
    from ablate.training import augment, data, optim

    assert config.train_data is not None, "check() refuses a configuration without train_data"
    model, train_transform, eval_transform, facts = _create_model(config, device)
    if config.init_from is not None:
        facts["init_from"] |= _check_load(config, model, facts["init_from"])
    model.train()

    preprocess = PreprocessCfg(**model.visual.preprocess_cfg)
    tokenizer = open_clip.get_tokenizer(config.model, context_length=config.force_context_length)
    index = _train_index(config)
    samples = data.ImageTextSamples(
        index,
        transform=_train_transform(config, preprocess, train_transform),
        tokenizer=tokenizer,
        tokenizer_name=_tokenizer_name(tokenizer),
        # A stream reads the shards itself; then only the probe of the health is read from here.
        cache_gib=0.0 if config.data_order == "stream" else config.cache_gib,
        at_least=_least_size(config, preprocess.size) if config.fast_jpeg else None,
    )
    if index.faults:
        facts["shard_faults"] = {**index.num_faults, "lost_samples": lost_samples(index)}
    epoch_samples = config.train_num_samples or index.num_samples
    steps = num_steps(config, workers=world_size, num_samples=epoch_samples)
    steps_per_epoch = steps // config.epochs
    optimizer, groups = _optimizer(config, model)
    to_input = augment.ToInput(
        preprocess.mean,
        preprocess.std,
        device=device,
        dtype=open_clip.get_input_dtype(config.precision) or torch.float32,
        channels_last=config.channels_last,
    )
    stream = None
    if config.data_order == "stream":
        stream = _stream(
            config, index, epoch_samples, train_transform, tokenizer, world_size=world_size
        )
    facts["data_order"] = data.STREAMED if stream else data.BY_POSITION
    global_batch = config.batch_size * world_size * config.accum_freq
    return Task(
        model=model,
        samples=samples,
        num_samples=epoch_samples,
        batch_size=config.batch_size,
        accum_freq=config.accum_freq,
        epochs=config.epochs,
        optimizer=optimizer,
        schedule=_schedule(config, steps_per_epoch),
        forward_backward=_forward_backward(config, rank, world_size, device, to_input),
        after_step=_clamp_logit_scale(model),
        scaler=torch.amp.GradScaler(device.type) if config.precision == "amp" else None,
        grad_clip_norm=config.grad_clip_norm,
        sync_batch_norm=config.use_bn_sync,
        compile=config.torchcompile,
        static_graph=config.ddp_static_graph,
        evaluations=_evaluations(
            config, model, samples, epoch_samples, eval_transform, tokenizer, device, to_input
        ),
        seed=config.seed,
        stream=stream,
        loader_workers=config.workers,
        prefetch=config.prefetch,
        pin_memory=config.pin_memory,
        max_fault_share=config.max_fault_share,
        checkpoint_epochs=config.checkpoint_frequency,
        keep_every_epochs=config.keep_every,
        look_inside=_look_inside(config, model, device, to_input),
        watched=(
            "visual.conv1.weight",
            "visual.attnpool.c_proj.weight",
            "*positional_embedding",
        ),
        warmup=config.warmup,
        global_batch=None if config.siglip else global_batch,
        feature_dim=model.visual.output_dim,
        parameter_groups=optim.describe(groups),
        facts=facts,
    )


def _create_model(config: Config, device: torch.device) -> tuple[Any, Any, Any, dict[str, Any]]:
    """The model with its initial weights and frozen parts, both transforms, facts."""
    import warnings

    import numpy as np
    import open_clip
    import torch

    _register_models()
    _seed_everything(config.seed)
    siglip = {"init_logit_scale": np.log(10), "init_logit_bias": -10} if config.siglip else {}
    with warnings.catch_warnings():
        # It also comes for colour jitter that is applied; Augmentation refuses what is not.
        warnings.filterwarnings("ignore", "Unused augmentation cfg items")
        model, train_transform, eval_transform = open_clip.create_model_and_transforms(
            config.model,
            precision=config.precision,
            device=device,
            force_quick_gelu=config.force_quick_gelu,
            force_custom_text=config.force_custom_text,
            force_patch_dropout=config.force_patch_dropout,
            force_image_size=config.force_image_size,
            force_context_length=config.force_context_length,
            image_mean=config.image_mean,
            image_std=config.image_std,
            image_interpolation=config.image_interpolation,
            image_resize_mode=config.image_resize_mode,
            aug_cfg=_augmentation(config),
            output_dict=True,
            **siglip,
        )
    facts: dict[str, Any] = {}
    if config.init_from is not None:
        facts["init_from"] = _load_weights(config, model)
    if config.lock_image:
        model.lock_image_tower(
            unlocked_groups=config.lock_image_unlocked_groups,
            freeze_bn_stats=config.lock_image_freeze_bn_stats,
        )
    if config.lock_text:
        model.lock_text_tower(
            unlocked_layers=config.lock_text_unlocked_layers,
            freeze_layer_norm=config.lock_text_freeze_layer_norm,
        )
    if config.grad_checkpointing:
        model.set_grad_checkpointing()
    if config.channels_last:
        model.to(memory_format=torch.channels_last)
    return model, train_transform, eval_transform, facts


def specimen(config: Config, *, data: str | None, device: torch.device) -> Specimen:
    """The model with its initial weights in eval mode, and labelled images to look at it with.

    The images are `data` (a folder of class folders, or shards with class numbers), else those
    of imagenet_val or of the first evaluation that has any.

    Raises:
        DataError: the images cannot be used.
    """
    import numpy as np
    import open_clip
    import torch
    from open_clip.transform import PreprocessCfg

    from ablate.recipes import Specimen
    from ablate.training import augment

    model, _, transform, _ = _create_model(config, device)
    model.eval()
    frozen = tuple(name for name, p in model.named_parameters() if not p.requires_grad)
    path = data or config.imagenet_val
    if path is None:
        labelled = [spec.path for spec in config.evaluations if spec.kind != "retrieval"]
        path = labelled[0] if labelled else None
    preprocess = PreprocessCfg(**model.visual.preprocess_cfg)
    dtype = open_clip.get_input_dtype(config.precision) or torch.float32
    to_input = augment.ToInput(preprocess.mean, preprocess.std, device=device, dtype=dtype)
    encoder = _encoder(config, device, to_input)
    # The run's own evaluations have filled the cache; a look at a few images of others shall not.
    if data is not None or not measures(config):
        config = config.model_copy(update={"cache_gib": 0.0})
    images = _labelled_images(config, path, model, transform) if path is not None else None

    def features(net: torch.nn.Module, rows: npt.NDArray[np.int64]) -> torch.Tensor:
        assert images is not None
        with torch.inference_mode(), encoder.autocast():
            parts = [
                encoder.images(net, pixels).float().cpu()
                for pixels in images.chosen(rows, encoder.batch_size)
            ]
        return torch.cat(parts).clone()

    zero_shot, names = None, list[str]()
    if path is not None and images is not None:
        try:
            names, _ = zero_shot_classes(path)
            names = names or list(open_clip.IMAGENET_CLASSNAMES)
            prompts = _prompts(path, images)
            tokenizer = open_clip.get_tokenizer(
                config.model, context_length=config.force_context_length
            )
            zero_shot = _zero_shot_answers(prompts, images, encoder, tokenizer)
        except DataError:
            pass  # without names there is no zero-shot classification, and the rest stands
    return Specimen(
        model=model,
        frozen=frozen,
        labels=images.labels if images is not None else np.zeros(0, np.int64),
        class_names=names,
        features=features,
        zero_shot=zero_shot,
    )


def _zero_shot_answers(
    prompts: Sequence[Sequence[str]], images: EvalImages, encoder: Encoder, tokenizer: Any
) -> Any:
    """Specimen.zero_shot of these images."""
    import numpy as np
    import torch

    from ablate.training.distributed import Gang
    from ablate.training.evaluate import ZeroShot

    def answers(
        net: torch.nn.Module,
        features: torch.Tensor,
        rows: npt.NDArray[np.int64],
        most_prompts: int | None,
    ) -> torch.Tensor:
        classes, labels = np.unique(images.labels[rows], return_inverse=True)
        count = len(prompts[0])
        if most_prompts is not None:
            count = max(1, min(count, most_prompts // len(classes)))
        picked = np.linspace(0, len(prompts[0]) - 1, count).round().astype(int)
        classifier = ZeroShot(
            images,
            [[prompts[number][place] for place in picked] for number in classes],
            tokenizer=tokenizer,
            tokenizer_name=_tokenizer_name(tokenizer),
            encoder=encoder,
            due=lambda epoch: True,
        ).classifier(net, Gang(0, 1, 0, 1, encoder.device))
        logits = features @ classifier.float().cpu()
        return logits.argmax(dim=1) == torch.from_numpy(labels)

    return answers


def _seed_everything(seed: int) -> None:
    import random

    import numpy as np
    import torch

    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def _augmentation(config: Config) -> dict[str, Any]:
    return {key: item for key, item in config.aug_cfg if item is not None}


def _index(pattern: str) -> ShardIndex:
    from ablate.datasets.shards import index_shards
    from ablate.training.cache import cache_folder

    index = index_shards(pattern, cache=cache_folder() / "shards")
    missing = [str(fault) for fault in index.faults if fault.kind == "missing_shard"]
    if missing:
        raise DataError(
            f"{len(missing)} shards of {pattern} are missing, the first: "
            f"{missing[0]}. Fetch them, or leave them out of the pattern"
        )
    return index


def _train_index(config: Config) -> ShardIndex:
    """The index of train_data.

    Raises:
        DataError: shards are missing, or more samples are lost than max_fault_share allows.
    """
    assert config.train_data is not None
    index = _index(config.train_data)
    lost = lost_samples(index)
    if lost > config.max_fault_share * (lost + index.num_samples):
        shown = "; ".join(str(fault) for fault in index.faults[:3])
        raise DataError(
            f"about {lost} of {lost + index.num_samples} samples of train_data "
            f"{config.train_data} are lost, more than the share of {config.max_fault_share:g} "
            f"that max_fault_share allows: {shown}. Fetch these shards again"
        )
    return index


def lost_samples(index: ShardIndex) -> int:
    """Samples that the shards should hold and the index lacks: a truncated shard would else only
    make an epoch shorter.

    Incomplete samples are counted; what a shard lost that is not read to its end is taken to be
    what it lacks of the median of the whole shards.
    """
    import numpy as np

    lost, broken = 0, set()
    for fault in index.faults:
        if fault.kind in ("missing_caption", "missing_image", "duplicate_key"):
            lost += fault.count
        else:
            broken.add(fault.shard)
    whole = [shard.num_samples for shard in index.shards if shard.path not in broken]
    typical = int(np.median(whole)) if whole else max(s.num_samples for s in index.shards)
    for shard in index.shards:
        if shard.path in broken:
            lost += max(typical - shard.num_samples, 0)
    return lost


def _train_transform(config: Config, preprocess: Any, peer_transform: Any) -> Any:
    """The peer's own transform, or for its default path the same operations without overhead.

    A random resized crop is drawn and resized by ablate.training.augment, which gives 8-bit
    images that are normalised in one go on the device; jitter and grey are the peer's objects.
    """
    from ablate.training import augment

    if config.aug_cfg.use_timm:
        return augment.SeededTransform(peer_transform)
    # The peer's list: crop, to RGB (done at decoding), then jitter, grey, to tensor, normalise.
    extra = tuple(peer_transform.transforms[2:-2])
    return augment.SeededCrop(
        preprocess.size, scale=config.aug_cfg.scale, extra=extra, fast=config.fast_resize
    )


def _least_size(config: Config, size: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width that an image needs, so that its smallest crop is no smaller than `size`.

    For crops of the image's own shape; narrower ones may be enlarged a little.
    """
    height, width = (size, size) if isinstance(size, int) else size
    smallest = math.sqrt(config.aug_cfg.scale[0])
    return math.ceil(height / smallest), math.ceil(width / smallest)


def _stream(
    config: Config,
    index: ShardIndex,
    num_samples: int,
    transform: Any,
    tokenizer: Any,
    *,
    world_size: int,
) -> Callable[[int, int], Iterator[Batch]]:
    """Micro-batches through the peer's own WebDataset pipeline and transform.

    Shards are ordered by seed and epoch; the peer seeds the shuffle of samples with process id and
    time. What is unreadable it skips, uncounted.

    Raises:
        DataError: a loading process may get fewer samples than a batch, and would wait for ever.
    """
    import numpy as np

    from ablate.training.data import Batch, ignore_stop_signals

    processes = max(1, config.workers) * world_size
    sizes = np.sort([shard.num_samples for shard in index.shards])
    fewest = int(sizes[: len(sizes) // processes].sum())
    if fewest < config.batch_size:
        raise DataError(
            f"data_order: stream deals {len(sizes)} shards to {processes} loading processes, so "
            f"one of them may get {fewest} samples, fewer than batch_size {config.batch_size}. "
            "Lower workers or batch_size, or set data_order: indexed"
        )
    steps = num_steps(config, workers=world_size, num_samples=num_samples)
    per_epoch = steps // config.epochs * config.accum_freq

    def batches(start: int, stop: int) -> Iterator[Batch]:
        # Newer versions than 0.2.86 refuse to run commands when they see this.
        os.environ["WDS_SECURE"] = "1"
        from open_clip_train.data import get_wds_dataset

        gopen = importlib.import_module("webdataset.gopen")
        for scheme in gopen.gopen_schemes:  # commands and addresses; plain paths pass by them
            gopen.gopen_schemes[scheme] = gopen.gopen_error
        arguments = SimpleNamespace(
            train_data=[shard.path for shard in index.shards],
            train_num_samples=num_samples,
            train_data_upsampling_factors=None,
            dataset_resampled=False,
            batch_size=config.batch_size,
            workers=config.workers,
            world_size=world_size,
            seed=config.seed,
        )
        source = get_wds_dataset(arguments, transform, is_train=True, tokenizer=tokenizer)
        if config.workers:
            loader = source.dataloader.pipeline[0]
            loader.multiprocessing_context = "fork"  # its parts cannot be pickled
            loader.worker_init_fn = ignore_stop_signals
        while start < stop:
            epoch, within = divmod(start, per_epoch)
            source.set_epoch(epoch)
            for images, texts in islice(source.dataloader, per_epoch - within):
                yield Batch((images, texts), substitutes=0)
            start += per_epoch - within

    return batches


def _optimizer(config: Config, model: torch.nn.Module) -> tuple[torch.optim.Optimizer, Any]:
    import torch

    from ablate.training import optim

    if config.opt == "adamw":
        groups = optim.group_parameters(model, rule=config.param_groups, weight_decay=config.wd)
        assert config.beta1 is not None and config.beta2 is not None and config.eps is not None
        adamw = torch.optim.AdamW(
            [group.for_optimizer() for group in groups],
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            fused=True if config.fused else None,
        )
        return adamw, groups
    from timm.optim import create_optimizer_v2

    options: dict[str, Any] = {}
    if config.beta1 is not None:
        options["betas"] = (config.beta1, config.beta2)
    if config.momentum is not None:
        options["momentum"] = config.momentum
    optimizer = create_optimizer_v2(
        model,
        config.opt.removeprefix("timm/"),
        lr=config.lr,
        weight_decay=config.wd,
        eps=config.eps,
        **options,
    )
    return optimizer, optim.read_groups(model, optimizer)


def _schedule(config: Config, steps_per_epoch: int) -> Callable[[int], float]:
    """Learning rate of optimizer step `step` (from 0), by the peer's formulas."""
    lr, warmup = config.lr, config.warmup
    steps = steps_per_epoch * config.epochs

    def warm(step: int) -> float:
        return lr * (step + 1) / warmup

    def constant(step: int) -> float:
        return warm(step) if step < warmup else lr

    def cosine(step: int) -> float:
        if step < warmup:
            return warm(step)
        # In the peer's order of operations, so that the rounding is the same too.
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) * lr

    def cooldown(step: int) -> float:
        if step < warmup:
            return warm(step)
        assert config.epochs_cooldown is not None
        start = steps - steps_per_epoch * config.epochs_cooldown
        if step < start:
            return lr
        left = float((1 - (step - start) / (steps - start)) ** config.lr_cooldown_power)
        return left * (lr - config.lr_cooldown_end) + config.lr_cooldown_end

    if config.skip_scheduler:
        return lambda step: lr
    return {"cosine": cosine, "const": constant, "const-cooldown": cooldown}[config.lr_scheduler]


def _autocast(config: Config, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    import torch

    dtypes = {"amp": torch.float16, "amp_bf16": torch.bfloat16}
    dtype = dtypes.get(config.precision)
    if dtype is None:
        return nullcontext
    return lambda: torch.autocast(device.type, dtype=dtype)


def _forward_backward(
    config: Config, rank: int, world_size: int, device: torch.device, to_input: Any
) -> Any:
    """One step's forward and backward passes, as the peer's train_one_epoch."""
    import torch
    from open_clip.loss import ClipLoss, SigLipLoss

    loss: torch.nn.Module
    if config.siglip:
        loss = SigLipLoss(rank=rank, world_size=world_size, dist_impl=config.loss_dist_impl)
    else:
        loss = ClipLoss(
            local_loss=config.local_loss,
            gather_with_grad=config.gather_with_grad,
            cache_labels=True,
            rank=rank,
            world_size=world_size,
        )
    autocast = _autocast(config, device)
    no_features = ("logit_scale", "logit_bias")

    def total(outputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return torch.as_tensor(sum(loss(**outputs, output_dict=True).values()))

    def forward_backward(
        model: torch.nn.Module,
        batches: Sequence[tuple[torch.Tensor, ...]],
        backward: Callable[[torch.Tensor], None],
    ) -> dict[str, torch.Tensor]:
        inputs = [(to_input(images), texts) for images, texts in batches]
        if len(inputs) == 1:
            images, texts = inputs[0]
            with autocast():
                outputs = model(images, texts)
                value = total(outputs)
            backward(value)
            return _measure(value, outputs)
        # Features of all micro-batches first, without gradient; then each again with it, so that
        # every sample has the whole step's samples as negatives.
        cached: dict[str, list[torch.Tensor]] = {}
        with torch.no_grad():
            for images, texts in inputs:
                with autocast():
                    for name, feature in model(images, texts).items():
                        if name not in no_features:
                            cached.setdefault(name, []).append(feature)
        for j, (images, texts) in enumerate(inputs):
            with autocast():
                outputs = model(images, texts)
                whole = {
                    name: torch.cat([*features[:j], outputs[name], *features[j + 1 :]])
                    for name, features in cached.items()
                }
                for name in no_features:
                    if name in outputs:
                        whole[name] = outputs[name]
                value = total(whole)
            backward(value)
        return _measure(value, outputs)

    return forward_backward


def _measure(loss: torch.Tensor, outputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Scalars of one step, on the device; features are this rank's last micro-batch."""
    import torch

    with torch.no_grad():
        images = outputs["image_features"].float()
        texts = outputs["text_features"].float()
        scale = outputs["logit_scale"].float()
        cosines = images @ texts.T
        diagonal = torch.arange(len(images), device=images.device)
        return {
            "loss": loss.detach(),
            "in_batch_accuracy": (cosines.argmax(dim=1) == diagonal).float().mean(),
            "image_feature_std": images.std(dim=0).mean(),
            "text_feature_std": texts.std(dim=0).mean(),
            "alignment": 2 - 2 * cosines.diagonal().mean(),
            "logits_lse": torch.logsumexp(scale * cosines, dim=1).mean(),
        }


def _clamp_logit_scale(model: torch.nn.Module) -> Callable[[], dict[str, torch.Tensor]]:
    import torch

    scale = model.logit_scale
    assert isinstance(scale, torch.Tensor)

    def clamp() -> dict[str, torch.Tensor]:
        with torch.no_grad():
            scale.clamp_(0, math.log(100))
            return {"logit_scale": scale.float().exp()}

    return clamp


def _evaluations(
    config: Config,
    model: Any,
    samples: ImageTextSamples,
    num_samples: int,
    transform: Any,
    tokenizer: Any,
    device: torch.device,
    to_input: Any,
) -> tuple[Evaluation, ...]:
    """The peer's zero-shot evaluation, those of `evaluations`, and the model's health with any."""
    from ablate.training.evaluate import ZeroShot
    from ablate.training.health import Health

    encoder = _encoder(config, device, to_input)
    words = {"tokenizer": tokenizer, "tokenizer_name": _tokenizer_name(tokenizer)}
    found: list[Evaluation] = []
    if _zero_shot_runs(config):
        assert config.imagenet_val is not None
        images = _labelled_images(config, config.imagenet_val, model, transform)
        prompts = _prompts(config.imagenet_val, images)
        due = _schedule_of_epochs(config.zeroshot_frequency, config.epochs)
        found.append(ZeroShot(images, prompts, encoder=encoder, due=due, **words))
    found += [
        _evaluation(spec, config, model, transform, encoder, words) for spec in config.evaluations
    ]
    if not found:
        return ()
    health = Health(
        samples,
        num_samples=num_samples,
        seed=config.seed,
        look=_look(config, device, to_input),
        due=lambda epoch: any(evaluation.due(epoch) for evaluation in found),
        device=device,
        arbiter=found[0] if _zero_shot_runs(config) else None,
    )
    return *found, health


def _evaluation(
    spec: specs.Evaluation,
    config: Config,
    model: Any,
    transform: Any,
    encoder: Encoder,
    words: Mapping[str, Any],
) -> Evaluation:
    from ablate.training import evaluate

    due = _schedule_of_epochs(spec.every, config.epochs)
    path = spec.path or config.imagenet_val
    assert path is not None, "Config refuses an evaluation without data"
    if isinstance(spec, specs.RetrievalEvaluation):
        pairs = evaluate.captioned_shards(_index(path))
        images = _eval_images(config, pairs, model, transform)
        return evaluate.Retrieval(images, encoder=encoder, due=due, label=spec.label, **words)
    images = _labelled_images(config, path, model, transform)
    if isinstance(spec, specs.ZeroShotEvaluation):
        return evaluate.ZeroShot(
            images,
            _prompts(path, images),
            encoder=encoder,
            due=due,
            name=f"zero_shot{spec.label}",
            measures=spec.measures(),
            counts=None,
            clock=f"eval_time_s/zero_shot{spec.label}",
            **words,
        )
    reference = None
    if spec.train_path is not None:
        reference = _labelled_images(config, spec.train_path, model, transform)
    if isinstance(spec, specs.KnnEvaluation):
        return evaluate.Neighbours(
            images,
            encoder=encoder,
            due=due,
            reference=reference,
            neighbours=spec.neighbours,
            temperature=spec.temperature,
            label=spec.label,
        )
    return evaluate.LinearProbe(
        images,
        encoder=encoder,
        due=due,
        reference=reference,
        penalty=spec.penalty,
        label=spec.label,
    )


def _schedule_of_epochs(every: int, epochs: int) -> Callable[[int], bool]:
    """After every so many epochs and after the last, as the peer's zeroshot_frequency."""
    return lambda epoch: epoch % every == 0 or epoch == epochs


def _encoder(config: Config, device: torch.device, to_input: Any) -> Encoder:
    from ablate.training.evaluate import Encoder

    return Encoder(
        encode_image=_encode_image,
        encode_text=_encode_prompts,
        autocast=_autocast(config, device),
        to_input=to_input,
        device=device,
        batch_size=config.batch_size,
    )


def _labelled_images(config: Config, path: str, model: Any, transform: Any) -> EvalImages:
    """Images of a folder of class folders, or of shards with class numbers."""
    from ablate.training import evaluate

    if path.endswith(".tar"):
        source = evaluate.labelled_shards(path)
    else:
        class_folders(Path(path))
        source = evaluate.image_folder(Path(path))
    return _eval_images(config, source, model, transform)


def _eval_images(config: Config, source: ImageSource, model: Any, transform: Any) -> EvalImages:
    from open_clip.utils import to_2tuple
    from torchvision.transforms import Compose

    from ablate.training.evaluate import EvalImages

    # The peer's list ends in: to RGB (done at decoding), to tensor, normalise (both in to_input).
    to_bytes = Compose(transform.transforms[:-3])
    return EvalImages(
        source,
        transform=to_bytes,
        transform_name=repr(to_bytes),
        size=to_2tuple(model.visual.image_size),
        cache_gib=config.cache_gib,
    )


def _prompts(path: str, images: EvalImages) -> list[list[str]]:
    """The texts of each class: of the data's own names and templates, or ImageNet's.

    Raises:
        DataError: an image's class number has no name.
    """
    import open_clip

    names, templates = zero_shot_classes(path)
    if templates is None:
        prompts = [
            [template(name) for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
            for name in open_clip.IMAGENET_CLASSNAMES
        ]
    else:
        prompts = [[template.format(name) for template in templates] for name in names]
    largest = int(images.labels.max())
    if largest >= len(prompts):
        whose = "ImageNet" if templates is None else "classnames.json"
        raise DataError(f"{path} has class number {largest}, and {whose} names {len(prompts)}")
    return prompts


def _look_inside(
    config: Config, model: torch.nn.Module, device: torch.device, to_input: Any
) -> Callable[[tuple[torch.Tensor, ...]], dict[str, torch.Tensor]]:
    """Largest attention logits of each layer, on eight samples in eval mode."""
    from ablate.training.attention import attention_logits

    autocast = _autocast(config, device)

    def look_inside(batch: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
        images, texts = (tensor[:8] for tensor in batch)

        def run() -> None:
            with autocast():
                model(to_input(images), texts)

        model.eval()
        try:
            return attention_logits(model, run)
        finally:
            model.train()

    return look_inside


def _look(config: Config, device: torch.device, to_input: Any) -> Look:
    """Loss and features of a batch on its own, for the health of the model."""
    from open_clip.loss import ClipLoss, SigLipLoss

    loss: torch.nn.Module = SigLipLoss() if config.siglip else ClipLoss()
    autocast = _autocast(config, device)

    def look(model: Any, batch: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
        images, texts = batch
        with autocast():
            outputs = model(to_input(images), texts)
            value = loss(**outputs)
        return {
            "loss": value,
            "image_feature": outputs["image_features"],
            "text_feature": outputs["text_features"],
        }

    return look


def _tokenizer_name(tokenizer: Any) -> str:
    """What cached tokens depend on, beside the texts."""
    import open_clip

    vocabulary = getattr(tokenizer, "vocab_size", "")
    name = f"{type(tokenizer).__name__}-{tokenizer.context_length}-{vocabulary}"
    return f"{name}-open_clip-{open_clip.__version__}"


def _encode_image(model: Any, images: torch.Tensor) -> torch.Tensor:
    features: torch.Tensor = model.encode_image(images, normalize=True)
    return features


def _encode_text(model: Any, texts: torch.Tensor) -> torch.Tensor:
    features: torch.Tensor = model.encode_text(texts, normalize=True)
    return features


def _encode_prompts(model: Any, texts: torch.Tensor) -> torch.Tensor:
    """As :func:`_encode_text`, without computing the padding after the longest text.

    A causal text tower that pools at the end token never looks at what follows it; prompts have
    about ten tokens of 77. Equal up to rounding.
    """
    import open_clip
    import torch

    if (
        not isinstance(model, open_clip.CLIP)
        or model.attn_mask is None
        or model.text_pool_type != "argmax"
        or not isinstance(model.text_projection, torch.Tensor)
    ):
        return _encode_text(model, texts)
    length = int(texts.argmax(dim=-1).max()) + 1
    texts = texts[:, :length]
    cast = model.transformer.get_cast_dtype()
    x = model.token_embedding(texts).to(cast) + model.positional_embedding[:length].to(cast)
    x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:length, :length]))
    ends = x[torch.arange(len(x), device=x.device), texts.argmax(dim=-1)]
    features = ends @ model.text_projection
    normalised: torch.Tensor = torch.nn.functional.normalize(features, dim=-1)
    return normalised


def _register_models() -> None:
    """Make the models that ship beside this file known to open_clip."""
    import open_clip

    for path in sorted(Path(__file__).parent.glob("*.json")):
        if open_clip.get_model_config(path.stem) is None:
            open_clip.add_model_config(path)
