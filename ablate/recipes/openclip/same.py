"""Levels of openclip that are provably the same experiment.

Configurations are plain mappings of Config's fields; one that is missing counts as unset.
"""

from __future__ import annotations

from ablate.recipes.openclip.config import CLIPS
from ablate.trial.same import Config, SameRule


def same_rules() -> tuple[SameRule, ...]:
    """The rules, in their order."""
    return RULES


def _one_worker(config: Config, workers: int) -> Config:
    if workers > 1:
        return {}
    return {
        "local_loss": False,
        "gather_with_grad": False,
        "use_bn_sync": False,
        "loss_dist_impl": None,
    }


def _local_slices(config: Config, workers: int) -> Config:
    if not (config.get("local_loss") and config.get("gather_with_grad")):
        return {}
    return {"local_loss": False} if config.get("accum_freq", 1) == 1 else {}


def _gradient_scale(config: Config, workers: int) -> Config:
    if workers == 1 or config.get("local_loss") or config.get("siglip"):
        return {}
    scale_free = (
        config.get("opt", "adamw") == "adamw"
        and all(config.get(name) is None for name in CLIPS)
        and config.get("precision") in ("fp32", "bf16", "amp_bf16", "pure_bf16")
        and config.get("accum_freq", 1) == 1
    )
    return {"gather_with_grad": True} if scale_free else {}


def _no_schedule(config: Config, workers: int) -> Config:
    constant = config.get("lr_scheduler") == "const" and config.get("warmup") == 0
    if not (config.get("skip_scheduler") or constant):
        return {}
    return {
        "skip_scheduler": True,
        "lr_scheduler": "const",
        "warmup": 0,
        "epochs_cooldown": None,
        "lr_cooldown_power": 1.0,
        "lr_cooldown_end": 0.0,
    }


def _nothing_decays(config: Config, workers: int) -> Config:
    return {"param_groups": "open_clip"} if config.get("wd") == 0 else {}


def _same_formula(config: Config, workers: int) -> Config:
    return {
        "fused": False,
        "torchcompile": False,
        "cuda_graphs": False,
        "grad_checkpointing": False,
        "ddp_static_graph": False,
    }


def _fields_of_speed(config: Config, workers: int) -> Config:
    return {"speed": "exact"}


RULES = (
    SameRule(
        "fields_of_speed",
        True,
        "speed only says which of fused, channels_last and fast_resize are on",
        _fields_of_speed,
        frozenset({"speed"}),
    ),
    SameRule(
        "one_worker",
        True,
        "with one worker there is nothing to gather or to synchronise",
        _one_worker,
        frozenset("local_loss gather_with_grad use_bn_sync loss_dist_impl".split()),
    ),
    SameRule(
        "local_slices",
        False,
        "with gather_with_grad the mean of the local losses over the workers is the global loss, "
        "so local_loss has the same gradient",
        _local_slices,
        frozenset("local_loss gather_with_grad accum_freq".split()),
    ),
    SameRule(
        "gradient_scale",
        False,
        "without gather_with_grad the towers' gradients are 1/workers of the true ones; AdamW "
        "divides by their size, so without clipping and without fp16 the steps are the same (up to "
        "eps)",
        _gradient_scale,
        frozenset(
            [
                *("local_loss", "siglip", "opt", "precision", "accum_freq", "gather_with_grad"),
                *CLIPS,
            ]
        ),
    ),
    SameRule(
        "no_schedule",
        True,
        "a constant learning rate without warmup is what skip_scheduler gives",
        _no_schedule,
        frozenset(
            {
                *("lr_scheduler", "warmup", "skip_scheduler", "epochs_cooldown"),
                *("lr_cooldown_power", "lr_cooldown_end"),
            }
        ),
    ),
    SameRule(
        "nothing_decays",
        True,
        "with wd 0 it does not matter which parameters would be decayed",
        _nothing_decays,
        frozenset("wd param_groups".split()),
    ),
    SameRule(
        "same_formula",
        False,
        "fused kernels, compilation, recomputed activations and a static graph evaluate the same "
        "formula",
        _same_formula,
        frozenset("fused torchcompile cuda_graphs grad_checkpointing ddp_static_graph".split()),
    ),
)
"""In this order: a later rule may rely on what an earlier one has rewritten."""
