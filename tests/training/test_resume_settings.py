"""Any setting, and any pair of settings, that a study may name survives a kill."""

from __future__ import annotations

import signal
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pytest
from interruptions import LAST_WORDS, SMALL, after_step, assert_same
from pairs import Pair, Row, all_pairs, cover, pairs_of
from small_trials import DEADLINE_S, add_models, config, log_of, run, start, write_trial

from ablate.recipes import openclip
from ablate.training import checkpoint

OWN: dict[str, Any] = {"beta1": None, "beta2": None}
"""Each optimizer has defaults of its own."""

FACTORS: dict[str, dict[str, dict[str, Any]]] = {
    "model": {"resnet": {}, "vit": {"model": "tiny-test-vit"}},
    "text": {"built in": {}, "custom": {"force_custom_text": True, "force_quick_gelu": True}},
    "attention": {"plain": {}, "normalised": {"qk_norm": True}},
    "dropout": {"none": {}, "patches": {"force_patch_dropout": 0.5}},
    "frozen": {
        "nothing": {},
        "image": {"lock_image": True},
        "text": {"lock_text": True, "lock_text_freeze_layer_norm": True},
    },
    "activations": {"kept": {}, "recomputed": {"grad_checkpointing": True}},
    "compiler": {"none": {}, "inductor": {"torchcompile": True}},
    "graph": {"any": {}, "static": {"ddp_static_graph": True}},
    "precision": {
        name: {"precision": name}
        for name in ("fp32", "amp", "amp_bf16", "bf16", "fp16", "pure_bf16", "pure_fp16")
    },
    "optimizer": {
        "adamw": {},
        "fused": {"fused": True},
        "stable": {"clip_updates": True},
        "sgd": {"opt": "timm/sgd", "momentum": 0.9, **OWN},
        "lamb": {"opt": "timm/lamb", **OWN},
        "adan": {"opt": "timm/adan", **OWN},
        "adafactor": {"opt": "timm/adafactorbv", **OWN},
        "lookahead": {"opt": "timm/lookahead_adamw", **OWN},
    },
    "decay": {
        rule: {"param_groups": rule} if rule != "open_clip" else {}
        for rule in ("open_clip", "open_clip_next", "timm")
    },
    "memory": {"contiguous": {}, "channels last": {"channels_last": True}},
    "rate": {
        "cosine": {},
        "constant": {"lr_scheduler": "const"},
        "cooldown": {"lr_scheduler": "const-cooldown", "epochs_cooldown": 1},
    },
    "accumulation": {"none": {}, "two": {"accum_freq": 2}},
    "clipping": {
        "none": {},
        "one": {"grad_clip_norm": 1.0},
        "units": {"grad_clip_units": 0.01},
        "z": {"grad_clip_z": 2.5},
    },
    "judged": {"weights": {}, "their average": {"ema_decay": 0.9}},
    "loss": {
        "softmax": {},
        "with gradient": {"gather_with_grad": True},
        "local": {"gather_with_grad": True, "local_loss": True},
        "sigmoid": {"siglip": True},
        "shift": {"siglip": True, "loss_dist_impl": "shift"},
        "reduce": {"siglip": True, "loss_dist_impl": "reduce"},
        "gather": {"siglip": True, "loss_dist_impl": "gather"},
    },
    "augmentation": {
        "crop": {},
        "colour": {
            "aug_cfg": {
                "color_jitter": [0.4, 0.4, 0.4, 0.1],
                "color_jitter_prob": 0.8,
                "gray_scale_prob": 0.2,
                "scale": [0.4, 1],
            }
        },
        "timm": {"aug_cfg": {"use_timm": True, "re_prob": 0.3, "color_jitter": 0.4}},
    },
    "decoding": {"peer": {}, "fast": {"fast_jpeg": True}},
    "resizing": {"peer": {}, "fast": {"fast_resize": True}},
    "loaders": {"none": {}, "two": {"workers": 2}},
    "evaluation": {"zero-shot": {}, "knn": {"evaluations": [{"kind": "knn"}]}},
    "ranks": {"1": {}, "2": {}, "3": {}, "4": {}},
}
"""Levels by factor, as fields; the first of each is the default."""

ELSEWHERE = {
    "speed": "says which of fused, channels_last and fast_resize are on; they are factors",
    "interruption": "a break on purpose; test_interruption",
    "seed": "compared; other values are other trials",
    "force_image_size": "shapes only",
    "force_context_length": "shapes only",
    "image_mean": "a constant of the input",
    "image_std": "a constant of the input",
    "image_interpolation": "a constant of the input",
    "image_resize_mode": "of evaluation images only",
    "lock_image_freeze_bn_stats": "fewer buffers that change than lock_image, which is a factor",
    "lock_image_unlocked_groups": "fewer frozen tensors than lock_image, which is a factor",
    "lock_text_unlocked_layers": "fewer frozen tensors than lock_text, which is a factor",
    "use_bn_sync": "needs GPUs",
    "cuda_graphs": "needs GPUs",
    "logit_scale_init": "a number before the first step, which the checkpoint replaces",
    "logit_scale_max": "a bound of every step",
    "lr": "a number; what it does to a step is a function of the step",
    "eps": "a number of the optimizer",
    "opt_kwargs": "settings of the optimizer; its state is that of the optimizers here",
    "wd": "a number of the optimizer",
    "warmup": "the rate is a function of the step",
    "skip_scheduler": "the rate is a function of the step",
    "lr_cooldown_power": "the rate is a function of the step",
    "lr_cooldown_end": "the rate is a function of the step",
    "epochs": "test_resume dies in both epochs",
    "train_data": "compared by its fingerprint",
    "train_num_samples": "how many steps; test_fewer_ranks has one that no batch divides",
    "dataset_type": "one kind there is",
    "imagenet_val": "evaluated in every case",
    "zeroshot_frequency": "test_resume_state resumes from a checkpoint that was not evaluated",
    "init_from": "weights before the first step, which the checkpoint replaces",
    "max_fault_share": "a bound; test_data_faults",
    "cache_gib": "test_cache: the same pixels with and without",
    "prefetch": "how far loaders read ahead; they are a factor",
    "pin_memory": "needs GPUs",
    "checkpoint_frequency": "when, not what",
    "checkpoint_minutes": "when, not what; test_checkpoint_clock dies within an epoch",
    "keep_every": "test_resume_state keeps all",
}
"""Fields that are no factor here, and why."""

STEPS = 8
LEVELS = {factor: tuple(levels) for factor, levels in FACTORS.items()}


def fields_of(row: Row) -> dict[str, Any]:
    """2 epochs of 4 steps of 16 samples or, with 3 ranks, 12."""
    ranks = int(row.get("ranks", "1"))
    fields = {**SMALL, "train_num_samples": 4 * ranks * (16 // ranks // 2 * 2)}
    for factor, level in row.items():
        fields |= FACTORS[factor][level]
    return {**fields, "batch_size": 16 // ranks // 2 * 2 // fields.get("accum_freq", 1)}


def stands_together(row: Row) -> bool:
    """Whether a study may ask for it."""
    try:
        openclip.check(config(**fields_of(row)), workers=int(row.get("ranks", "1")), gpus=0)
    except ValueError:  # pydantic's is one
        return False
    return True


@lru_cache(maxsize=1)
def cases() -> tuple[frozenset[Pair], list[Row]]:
    add_models()
    possible = all_pairs(LEVELS, stands_together)
    return possible, cover(LEVELS, possible)


def test_every_field_is_a_factor_or_has_a_reason() -> None:
    """A new field of a study without a place here fails this test."""
    varied = set(fields_of({})) - ELSEWHERE.keys() | {
        name for levels in FACTORS.values() for fields in levels.values() for name in fields
    }
    assert varied | ELSEWHERE.keys() == openclip.Config.model_fields.keys()
    assert varied.isdisjoint(ELSEWHERE)


def test_the_cases_hold_every_pair_that_can_be() -> None:
    """Each pair of levels stands in a case; the pairs that are left out are refused at plan."""
    possible, rows = cases()
    assert set().union(*map(pairs_of, rows)) == possible
    assert all(row.keys() == FACTORS.keys() for row in rows)
    refused = all_pairs(LEVELS, lambda row: True) - possible
    assert {tuple(sorted(factor for factor, _ in pair)) for pair in refused} == {
        ("decay", "optimizer"),
        ("augmentation", "resizing"),
        ("activations", "attention"),
        ("judged", "precision"),
    }


def die_and_come_back(folder: Path, data: Path, row: Row) -> None:
    """SIGKILL at the last step, resumed from the checkpoint in the middle; all is the same."""
    ranks, fields = int(row.get("ranks", "1")), fields_of(row)
    env = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "kernels")}
    patience_s = 900.0 if "inductor" in row.values() else DEADLINE_S  # ranks compile side by side
    go = partial(run, workers=ranks, deadline_s=patience_s, **env)
    whole = write_trial(folder / "whole", data, gang=ranks, **fields)
    assert go(whole.folder) == [0] * ranks, log_of(whole)
    trial = write_trial(folder / "trial", data, gang=ranks, **fields)
    kill = partial(after_step, STEPS)
    dying = start(trial.folder, workers=ranks, prepare=kill, deadline_s=patience_s, **env)
    codes = dying.wait_for_a_death()
    assert -signal.SIGKILL in codes and LAST_WORDS in log_of(trial)
    assert checkpoint.steps(trial.folder / "checkpoints") == [STEPS // 2]
    assert go(trial.folder) == [0] * ranks, log_of(trial)
    assert_same(trial, whole)


SHARP: tuple[Row, ...] = (
    {"optimizer": "fused", "memory": "channels last"},
    {"optimizer": "adan", "precision": "amp_bf16", "memory": "channels last"},
    {"ranks": "3", "graph": "static"},
)
"""Pairs that once came back as another run."""

AVERAGED: tuple[Row, ...] = (
    {"judged": "their average", "ranks": "2", "precision": "amp"},
    {"judged": "their average", "model": "vit", "attention": "normalised"},
)
"""A state beside the model and the optimizer, and parameters beside the named model's."""


@pytest.mark.parametrize("row", SHARP, ids=lambda row: ", ".join(row.values()))
def test_settings_with_a_state_of_their_own_survive(tmp_path: Path, data: Path, row: Row) -> None:
    """Every loss and every file bit-equal after a kill."""
    die_and_come_back(tmp_path, data, row)


@pytest.mark.exhaustive
@pytest.mark.parametrize("row", AVERAGED, ids=lambda row: ", ".join(row.values()))
def test_averages_and_named_parameters_survive(tmp_path: Path, data: Path, row: Row) -> None:
    """The same of a state beside the model and the optimizer."""
    die_and_come_back(tmp_path, data, row)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "covering" in metafunc.fixturenames:
        wanted = "exhaustive" in metafunc.config.getoption("-m").replace("not exhaustive", "")
        rows = cases()[1] if wanted else []
        metafunc.parametrize("covering", rows, ids=[", ".join(row.values()) for row in rows])


@pytest.mark.exhaustive
@pytest.mark.timeout(1200)  # some compile
def test_every_pair_of_settings_survives(tmp_path: Path, data: Path, covering: Row) -> None:
    """The same for every pair of levels that a study may name."""
    die_and_come_back(tmp_path, data, covering)
