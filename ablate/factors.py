"""Levels that are provably the same experiment, and why.

A rule rewrites a resolved configuration into a simpler one that trains the same model. Two
configurations are the same experiment when the rules bring them to the same form:

    same_experiment(one, two, workers=8)     # Sameness(reasons=("gradient_scale: ...",)) or None

A new rule is one function and one row of RULES. It may rest on algebra only, never on "it usually
makes no difference", and must say how exact it is. Configurations are plain mappings with
open_clip_train's field names; a field that a recipe does not have counts as unset.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Config = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Rule:
    """One reason why configurations with different fields train the same model."""

    name: str
    is_exact: bool
    """Bit for bit; else up to the rounding of floating point, as another order of summation is."""
    why: str
    rewrite: Callable[[Config, int], Config]
    """(configuration, workers) -> fields to change; empty when the rule does not apply."""


@dataclass(frozen=True, slots=True)
class Sameness:
    """Why two configurations are one experiment."""

    rules: tuple[Rule, ...]

    @property
    def is_exact(self) -> bool:
        return all(rule.is_exact for rule in self.rules)

    @property
    def reasons(self) -> tuple[str, ...]:
        return tuple(f"{rule.name}: {rule.why}" for rule in self.rules)


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
        and config.get("grad_clip_norm") is None
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


RULES = (
    Rule(
        "one_worker",
        True,
        "with one worker there is nothing to gather or to synchronise",
        _one_worker,
    ),
    Rule(
        "local_slices",
        False,
        "with gather_with_grad the mean of the local losses over the workers is the global loss, "
        "so local_loss has the same gradient",
        _local_slices,
    ),
    Rule(
        "gradient_scale",
        False,
        "without gather_with_grad the towers' gradients are 1/workers of the true ones; AdamW "
        "divides by their size, so without clipping and without fp16 the steps are the same (up to "
        "eps)",
        _gradient_scale,
    ),
    Rule(
        "no_schedule",
        True,
        "a constant learning rate without warmup is what skip_scheduler gives",
        _no_schedule,
    ),
    Rule(
        "nothing_decays",
        True,
        "with wd 0 it does not matter which parameters would be decayed",
        _nothing_decays,
    ),
    Rule(
        "same_formula",
        False,
        "fused kernels, compilation, recomputed activations and a static graph evaluate the same "
        "formula",
        _same_formula,
    ),
)
"""In this order: a later rule may rely on what an earlier one has rewritten."""

FIELDS = frozenset(
    {
        *("local_loss", "gather_with_grad", "use_bn_sync", "loss_dist_impl", "accum_freq"),
        *("siglip", "opt", "grad_clip_norm", "precision", "lr_scheduler", "warmup"),
        *("skip_scheduler", "epochs_cooldown", "lr_cooldown_power", "lr_cooldown_end"),
        *("param_groups", "wd", "fused", "torchcompile", "cuda_graphs"),
        *("grad_checkpointing", "ddp_static_graph"),
    }
)
"""All fields that a rule reads or rewrites: whatever sets none of them cannot change an answer."""


def simplify(
    config: Config, *, workers: int
) -> tuple[dict[str, Any], tuple[tuple[Rule, frozenset[str]], ...]]:
    """The configuration's simplest form on a gang of `workers`, and (rule, fields it changed)."""
    simple = dict(config)
    trail = []
    for rule in RULES:
        # A field that the recipe does not have stays absent.
        changes = {
            name: value
            for name, value in rule.rewrite(simple, workers).items()
            if name in simple and simple[name] != value
        }
        if changes:
            simple |= changes
            trail.append((rule, frozenset(changes)))
    return simple, tuple(trail)


def same_experiment(one: Config, two: Config, *, workers: int) -> Sameness | None:
    """Why both configurations train the same model on a gang of `workers`; None if not provable.

    Equal configurations are the same without any rule. Leave out fields that do not matter (names,
    loader workers) before asking; `seed` matters.
    """
    simple_one, trail_one = simplify(one, workers=workers)
    simple_two, trail_two = simplify(two, workers=workers)
    if simple_one != simple_two:
        return None
    differing = {name for name in {*one, *two} if one.get(name) != two.get(name)}
    used = {rule.name for rule, fields in (*trail_one, *trail_two) if fields & differing}
    return Sameness(tuple(rule for rule in RULES if rule.name in used))
