"""What a configuration amounts to before anything runs: warnings, steps, measurements, chance."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ablate.errors import DataError, suggest
from ablate.recipes.openclip.certain import check_data, check_settings
from ablate.recipes.openclip.classes import class_folders, zero_shot_classes
from ablate.recipes.openclip.config import Config, is_vit
from ablate.recipes.openclip.data import num_samples, num_steps, open_index
from ablate.recipes.openclip.evaluation_fields import KINDS
from ablate.recipes.openclip.model import sketch_model
from ablate.recipes.openclip.step import handed_on, make_optimizer, refuse_idle
from ablate.recipes.openclip.weights import fit_weights
from ablate.training.counts import count_evaluations
from ablate.training.data.shard_names import expand_shards
from ablate.training.evaluations.fields import data_of
from ablate.training.init_from import InitFrom, describe_initial
from ablate.training.sketches import remember, sentence, shape_of
from ablate.trial.metrics import Metric
from ablate.trial.precision import slow_on_cpu
from ablate.trial.recipe import Note, Outline, absolute

if TYPE_CHECKING:
    import torch

    from ablate.training.weights import LoadReport

LONG_WARMUP = 0.1
"""A warmup above this share of the steps is warned of."""


IMAGENET = (
    Metric("imagenet_top1", "fraction", "zero-shot top-1 accuracy", "maximize", judged=True),
    Metric("imagenet_top5", "fraction", "zero-shot top-5 accuracy", "maximize"),
)
"""What the peer's own evaluation measures, on imagenet_val."""


@dataclass(frozen=True, slots=True)
class Sketch:
    """A model and its optimizer without memory for their values."""

    groups: Mapping[str, Any]
    """What is decayed, counted and hashed as a trial records it."""
    disk_bytes: int
    """What a trial's checkpoints take at most: the last two, the best one, those kept for good."""


def metrics(config: Config) -> tuple[Metric, ...]:
    """What a run may be judged by; evaluations with a name measure NAME_OF_METRIC/NAME."""
    return IMAGENET + tuple(metric for kind in KINDS for metric in kind.MEASURES)


def outline(config: Config, *, workers: int, gpus: int, root: Path, deep: bool = False) -> Outline:
    """What a configuration amounts to on a gang; `deep` sketches model and optimizer
    with torch, which is also imported where there are initial weights to look at.

    Raises:
        ValueError: it cannot run there; says why and what to change.
        LoadError: the initial weights do not fit.
    """
    steps, why = None, ""
    try:
        steps = num_steps(config, workers=workers, num_samples=num_samples(config, root=root))
    except (DataError, OSError) as error:
        why = str(error)
    warnings = check(config, workers=workers, gpus=gpus, steps=steps)
    placed = absolute(config, root=root)
    warnings += check_data(placed, workers=workers)
    start = describe_start(placed)
    if start is not None:
        warnings.append(start)
    size, notes = None, list[Note]()
    if deep:
        try:
            sketched = sketch(config)
        except (ImportError, OSError, RuntimeError) as error:
            # An architecture that needs files of another machine, or that torch cannot sketch.
            warnings.append(f"what the optimizer decays cannot be counted here: {error}")
        else:
            size = sketched.disk_bytes
            groups = sketched.groups
            notes.append(Note(label="decay", text=sentence(groups), facts=groups))
    return Outline(
        measures=measures(config),
        measured_on={
            **dict.fromkeys((metric.name for metric in IMAGENET), str(config.imagenet_val)),
            **data_of(config.evaluations, default=config.imagenet_val),
        },
        steps=steps,
        samples=config.batch_size * config.accum_freq * workers,
        no_steps=why,
        warmup=warmup_steps(config),
        evaluations=num_evaluations(config),
        checkpoint_bytes=size,
        shared_bytes=shared_bytes(config),
        warnings=tuple(warnings),
        notes=tuple(notes),
    )


def shared_bytes(config: Config) -> int:
    """What one worker's loading processes hold ready at most: batches of bytes, or of floats where
    timm transforms them."""
    side = config.force_image_size or model_config(config.model)["vision_cfg"].get("image_size")
    height, width = side if isinstance(side, (tuple, list)) else (side or 224, side or 224)
    number = 4 if config.aug_cfg.use_timm else 1
    image = 3 * int(height) * int(width) * number
    return config.workers * config.prefetch * config.batch_size * image


def check(config: Config, *, workers: int, gpus: int, steps: int | None = None) -> list[str]:
    """Warnings about a configuration on a gang of `workers`, each with `gpus` GPUs (0: CPU).

    `steps` of the run, where they are known.

    Raises:
        ValueError: it cannot run there; says why and what to change.
    """
    if config.train_data is None:
        raise ValueError("train_data is missing; give the shards to train on")
    expand_shards(config.train_data)  # refuses commands and addresses
    _check_model(config.model)
    if config.use_bn_sync and workers > 1 and gpus == 0:
        raise ValueError(
            "use_bn_sync needs GPUs: torch's SyncBatchNorm has no CPU kernel. "
            "Set gang.gpus_per_worker: 1, or use_bn_sync: false"
        )
    if config.cuda_graphs and gpus == 0:
        raise ValueError(
            "cuda_graphs needs GPUs: on a CPU there is nothing to launch. "
            "Set gang.gpus_per_worker: 1, or cuda_graphs: false"
        )
    _check_locks(config)
    warnings = check_settings(config, model_config(config.model), workers=workers, steps=steps)
    if config.use_bn_sync and workers == 1:
        warnings.append("use_bn_sync does nothing with one worker")
    if gpus == 0:
        warnings += slow_on_cpu(config.precision)
    if config.precision in ("pure_fp16", "fp16") and (config.eps or 1.0) < 6e-8:
        warnings.append(
            f"eps {config.eps} is below fp16's smallest number: Adam divides by zero where "
            "weights are fp16. Set eps: 1e-6"
        )
    if workers == 1:
        for name in ("local_loss", "gather_with_grad"):
            if getattr(config, name):
                warnings.append(f"{name} does nothing with one worker")
    warnings += [
        f"{why}: use it as a negative control only" for why in unsound(config, workers=workers)
    ]
    if config.precision == "pure_bf16" and not is_vit(config.model):
        warnings.append(
            "pure_bf16 keeps BatchNorm's running statistics in bf16, where small updates round to "
            "nothing: off by about 1 % at the usual momentum of 0.1, by a sixth at 0.01, and they "
            "never move at 0.001; amp_bf16 and bf16 keep them in fp32"
        )
    if steps is not None:
        warnings += _warmup_warning(config, steps)
    return warnings


def unsound(config: Config, *, workers: int) -> list[str]:
    """Why no one should train with this configuration, whatever it scores; empty if one may."""
    if workers > 1 and config.local_loss and not config.gather_with_grad:
        return ["local_loss without gather_with_grad gives a biased gradient"]
    return []


def sketch(config: Config) -> Sketch:
    """What the optimizer decays, and what a trial's checkpoints take; imports torch where no such
    shape was sketched on this machine before.

    Raises:
        ValueError: a trainable parameter would be in no group, or in two; the optimizer cannot
            take a step with these settings.
    """
    shape = shape_of(config, without=_NO_SHAPE)
    described = model_config(shape.model)
    groups, size = remember("openclip", shape, described, lambda: _sketch(shape))
    return Sketch(groups, config.keep.at_once(config.epochs) * size)


_NO_SHAPE = frozenset(
    """
    lr warmup lr_scheduler skip_scheduler epochs epochs_cooldown lr_cooldown_power lr_cooldown_end
    batch_size accum_freq grad_clip_norm local_loss gather_with_grad seed train_data
    train_num_samples max_fault_share aug_cfg imagenet_val zeroshot_frequency evaluations
    init_from interruption image_mean image_std image_interpolation image_resize_mode fast_jpeg
    fast_resize cache_gib prefetch pin_memory workers checkpoint_frequency checkpoint_minutes
    keep_every
    """.split()
)
"""Fields that decide neither which parameters there are, nor how an optimizer groups and keeps
them."""


def _sketch(config: Config) -> tuple[dict[str, Any], int]:
    """The optimizer's groups, and bytes of one checkpoint."""
    from ablate.training.optim import describe, state_bytes

    # Fused kernels want parameters with memory; a rate of any size changes no group.
    plain = config.model_copy(update={"fused": False, "lr": 1e-3})
    model = sketch_model(config)
    optimizer, groups = make_optimizer(plain, model)
    refuse_idle(plain, model, optimizer)
    try:
        size = state_bytes(model, optimizer)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"opt: {config.opt} cannot take a step with {handed_on(config)}: {error}"
        ) from error
    if config.ema_decay is not None:
        size += sum(t.numel() * t.element_size() for t in model.state_dict().values())
    return describe(groups), size


def describe_start(config: Config) -> str | None:
    """What init_from brings, tried on a model without memory; None where nothing is loaded.

    Imports torch if there is something to load.

    Raises:
        LoadError: the file does not fit the model; says which tensors, and the likely mend.
    """
    source = config.init_from
    if source is None:
        return None
    return describe_initial(source, lambda: _fit(source, sketch_model(config)))


@lru_cache(maxsize=64)  # the cells of a study mostly start from one file
def _fit(source: InitFrom, sketched: torch.nn.Module) -> LoadReport:
    return fit_weights(source, sketched)


def _check_model(name: str) -> None:
    """Raise ValueError for a name that open_clip does not know, with the likely one."""
    if ":" in name:  # hf-hub:... and local-dir:... are looked up where the model is made
        return
    known = {known for folder in _model_folders() for known in _described(folder)}
    if "open_clip" in sys.modules:  # where descriptions may have been added
        known.update(sys.modules["open_clip"].list_models())
    if len(known) > 1 and name.replace("/", "-") not in known:
        raise ValueError(f"model {name!r} is not known; {suggest(name, sorted(known))}")


def _check_locks(config: Config) -> None:
    """Raise ValueError for locks that open_clip's own towers refuse with an assertion."""
    model = model_config(config.model)
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


def model_config(name: str) -> dict[str, Any]:
    """open_clip's description of a model, without importing it; empty when it is not known."""
    stem = name.replace("/", "-")
    for folder in _model_folders():
        if stem in _described(folder):
            content: dict[str, Any] = json.loads(_described(folder)[stem])
            return content
    return {}


@cache  # a study of thousands of cells asks for each
def _described(folder: Path) -> Mapping[str, str]:
    """Name -> description of the models in a folder of a package."""
    return {path.stem: path.read_text(encoding="utf-8") for path in folder.glob("*.json")}


@cache
def _model_folders() -> tuple[Path, ...]:
    """Where descriptions of models are: our own, and open_clip's where it is installed."""
    library = importlib.util.find_spec("open_clip")
    own = Path(__file__).parent
    if library is None or library.origin is None:
        return (own,)
    return own, Path(library.origin).parent / "model_configs"


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


def share_out(config: Config, *, workers: int, ranks: int, root: Path) -> Config:
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
            "train_num_samples": math.ceil(num_samples(config, root=root) / whole) * whole,
            "cuda_graphs": False,  # they cannot accumulate, and change no number
        }
    )


def num_evaluations(config: Config) -> int:
    """Epochs after which something is evaluated."""
    every = [spec.every for spec in config.evaluations]
    if zero_shot_runs(config):
        every.append(config.zeroshot_frequency)
    return count_evaluations(every, epochs=config.epochs)


def shorten(config: Config, *, steps: int, workers: int) -> Config:
    """A run of a few steps and one evaluation that takes the same time for each."""
    samples = steps * config.batch_size * config.accum_freq * workers
    return config.model_copy(
        update={"train_num_samples": samples, "epochs": 1, "epochs_cooldown": None}
    )


def measures(config: Config) -> tuple[str, ...]:
    """Names of the measurements that the run's evaluations give."""
    own = tuple(metric.name for metric in IMAGENET) if zero_shot_runs(config) else ()
    return own + tuple(name for spec in config.evaluations for name in spec.measures())


def zero_shot_runs(config: Config) -> bool:
    """Whether the peer's own zero-shot evaluation is asked for."""
    return config.imagenet_val is not None and config.zeroshot_frequency > 0


def warmup_steps(config: Config) -> int:
    """Steps over which the learning rate rises; 0 with skip_scheduler."""
    return 0 if config.skip_scheduler else config.warmup


def chance(config: Config, *, root: Path, metric: str = IMAGENET[0].name) -> float:
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
        return open_index(placed).num_samples
    if not path.endswith(".tar"):
        return len(class_folders(Path(placed)))
    names, templates = zero_shot_classes(placed)
    return 1000 if templates is None else len(names)


def plain_config(model: str) -> Config:
    """A model by its name alone, to look at weights of elsewhere."""
    return Config(model=model, precision="fp32")
