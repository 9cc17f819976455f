"""What a configuration amounts to before anything runs: warnings, steps, measurements, chance."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from warnings import catch_warnings, filterwarnings

from ablate.datasets.shard_names import expand_shards
from ablate.errors import suggest
from ablate.recipes import Sketch
from ablate.recipes.openclip.classes import class_folders, zero_shot_classes
from ablate.recipes.openclip.config import Config, InitFrom, is_vit
from ablate.recipes.openclip.data import open_index
from ablate.recipes.openclip.model import sketch_model
from ablate.recipes.openclip.step import handed_on, make_optimizer
from ablate.recipes.openclip.weights import fit_weights

if TYPE_CHECKING:
    import torch

    from ablate.training.weights import LoadReport

LONG_WARMUP = 0.1
"""A warmup above this share of the steps is warned of."""


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
    if config.precision == "pure_bf16" and not is_vit(config.model):
        warnings.append(
            "pure_bf16 keeps BatchNorm's running statistics in bf16, where small updates round to "
            "nothing: off by about 1 % at the usual momentum of 0.1, by a sixth at 0.01, and they "
            "never move at 0.001; amp_bf16 and bf16 keep them in fp32"
        )
    if steps is not None:
        warnings += _warmup_warning(config, steps)
    return warnings


def sketch(config: Config) -> Sketch:
    """What the optimizer decays, and what a trial's checkpoints take; imports torch.

    Raises:
        ValueError: a trainable parameter would be in no group, or in two; the optimizer cannot
            take a step with these settings.
    """
    from ablate.training.checkpoint import KEEP_LAST
    from ablate.training.optim import describe, state_bytes

    plain = config.model_copy(update={"fused": False})  # its kernels want parameters with memory
    model = sketch_model(config)
    optimizer, groups = make_optimizer(plain, model)
    try:
        size = state_bytes(model, optimizer)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"opt: {config.opt} cannot take a step with {handed_on(config)}: {error}"
        ) from error
    written = math.ceil(config.epochs / config.checkpoint_frequency)
    best = 1
    kept = config.epochs // config.keep_every if config.keep_every else 0
    return Sketch(describe(groups), min(KEEP_LAST + best + kept, written) * size)


def describe_start(config: Config) -> str | None:
    """What init_from brings, tried on a model without memory; None where nothing is loaded.

    Imports torch if there is something to load.

    Raises:
        LoadError: the file does not fit the model; says which tensors, and the likely mend.
    """
    source = config.init_from
    if source is None:
        return None
    if not Path(source.path).is_file():
        return f"{source.path} is not on this machine; whether it fits is seen when a trial starts"
    report = _fit(source, sketch_model(config))
    words = [f"{report.loaded_share:.1%} of the parameters come from {source.path}"]
    if report.renamed:
        words.append(f"{len(report.renamed)} tensors renamed")
    if report.at_random:
        shown = ", ".join(report.at_random[:3]) + (", ..." if report.at_random[3:] else "")
        words.append(f"{len(report.at_random)} at their random initialisation: {shown}")
    if report.unexpected:
        words.append(f"{len(report.unexpected)} of the file left out")
    return "; ".join(words)


@lru_cache(maxsize=64)  # the cells of a study mostly start from one file
def _fit(source: InitFrom, sketched: torch.nn.Module) -> LoadReport:
    with catch_warnings():
        filterwarnings("ignore", "for .*: copying from a non-meta parameter")
        return fit_weights(source, sketched)


def _check_model(name: str) -> None:
    """Raise ValueError for a name that open_clip does not know, with the likely one."""
    if ":" in name:  # hf-hub:... and local-dir:... are looked up where the model is made
        return
    known = {path.stem for folder in _model_folders() for path in folder.glob("*.json")}
    if "open_clip" in sys.modules:  # where descriptions may have been added
        known.update(sys.modules["open_clip"].list_models())
    if len(known) > 1 and name.replace("/", "-") not in known:
        raise ValueError(f"model {name!r} is not known; {suggest(name, sorted(known))}")


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
    for folder in _model_folders():
        path = folder / f"{name.replace('/', '-')}.json"
        if path.is_file():
            content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return content
    return {}


def _model_folders() -> list[Path]:
    """Where descriptions of models are: our own, and open_clip's where it is installed."""
    library = importlib.util.find_spec("open_clip")
    folders = [Path(__file__).parent]
    if library is not None and library.origin is not None:
        folders.append(Path(library.origin).parent / "model_configs")
    return folders


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
            "cuda_graphs": False,  # they cannot accumulate, and change no number
        }
    )


def num_evaluations(config: Config) -> int:
    """Epochs after which something is evaluated."""
    every = [spec.every for spec in config.evaluations]
    if zero_shot_runs(config):
        every.append(config.zeroshot_frequency)
    schedules = [make_due(number, config.epochs) for number in every]
    return sum(any(due(epoch) for due in schedules) for epoch in range(1, config.epochs + 1))


def shorten(config: Config, *, steps: int, workers: int) -> Config:
    """A run of a few steps and one evaluation that takes the same time for each."""
    samples = steps * config.batch_size * config.accum_freq * workers
    return config.model_copy(
        update={"train_num_samples": samples, "epochs": 1, "epochs_cooldown": None}
    )


def measures(config: Config) -> tuple[str, ...]:
    """Names of the measurements that the run's evaluations give."""
    own = ("imagenet_top1", "imagenet_top5") if zero_shot_runs(config) else ()
    return own + tuple(name for spec in config.evaluations for name in spec.measures())


def zero_shot_runs(config: Config) -> bool:
    """Whether the peer's own zero-shot evaluation is asked for."""
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
        return open_index(placed).num_samples
    if not path.endswith(".tar"):
        return len(class_folders(Path(placed)))
    names, templates = zero_shot_classes(placed)
    return 1000 if templates is None else len(names)


def make_due(every: int, epochs: int) -> Callable[[int], bool]:
    """After every so many epochs and after the last, as the peer's zeroshot_frequency."""
    return lambda epoch: epoch % every == 0 or epoch == epochs
