"""Planted single causes, judged by the markers, are named first by the diagnosis."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from marker_traces import healthy_evaluations, noise, whole_rows

from ablate.markers import Context, judge
from ablate.markers.causes import CAUSES
from ablate.markers.diagnosis import diagnose
from ablate.recipes.openclip.suspects import causes

ALL = (*CAUSES, *causes())
STEPS = 2000
CONTEXT = Context(
    global_batch=1024,
    warmup=100,
    steps_total=STEPS,
    accuracy="imagenet_top1",
    chance_top1=0.001,
    eval_images=50_000,
    feature_dim=1024,
)
SANE = {
    "precision": "amp_bf16",
    "lr": 1e-3,
    "beta2": 0.98,
    "eps": 1e-6,
    "warmup": 100,
    "batch_size": 128,
}
Rows = list[dict[str, Any]]


def spike(rows: Rows, at: int, *, height: float = 2.0, norm: float = 1.0) -> None:
    for place, row in enumerate(rows[at : at + 30]):
        row["loss"] += height * math.exp(-place / 6.0)
        row["grad_norm"] *= 1.0 + (norm - 1.0) * math.exp(-place / 6.0)


def at_chance(rows: Rows, *, norm: float, begin: int = 0) -> None:
    rng = np.random.default_rng(9)
    for row, wiggle in zip(rows[begin:], noise(rng, len(rows) - begin), strict=True):
        row["loss"] = math.log(1024) + 0.004 * float(wiggle)
        row["grad_norm"] = norm
        row["text_feature_std"] = 1e-3


def high_lr(rows: Rows, evals: Rows) -> dict[str, Any]:
    """As with lr 30 times too high: an overshoot, then ln(batch) with nothing left to learn."""
    at_chance(rows, norm=1e-4, begin=10)
    for row, loss in zip(rows, (7.6, 7.0, 7.7, 9.5, 8.9, 8.4, 8.2, 7.9, 7.4, 7.1), strict=False):
        row["loss"] = loss
    for row in rows[100:400]:
        row["logit_scale"] = 9.0
    for row in evals:
        row["imagenet_top1"] = 0.001
    return {"lr": 3e-2}


def late_divergence(rows: Rows, evals: Rows) -> dict[str, Any]:
    for place, row in enumerate(rows[1000:]):
        row["loss"] += 2.0 * min(1.0, place / 200.0)
        row["update_ratio/visual"] = 0.08
    return {"lr": 1e-2}


def short_warmup(rows: Rows, evals: Rows) -> dict[str, Any]:
    for row in rows[1:12]:
        row["loss"] += 1.5
    return {"warmup": 1}


def stale_moment(rows: Rows, evals: Rows) -> dict[str, Any]:
    for at in (900, 1300):
        rows[at - 3]["rms/conv1"] = 6.0
        spike(rows, at, norm=8.0)
    return {"beta2": 0.999}


def stale_unwatched(rows: Rows, evals: Rows) -> dict[str, Any]:
    for row in rows:
        del row["rms/conv1"]
    spike(rows, 900, norm=8.0)
    return {"beta2": 0.999}


def bad_stretch(rows: Rows, evals: Rows) -> dict[str, Any]:
    spike(rows, 1100, height=3.0, norm=6.0)
    return {}


def shifted_inputs(rows: Rows, evals: Rows) -> dict[str, Any]:
    """As measured with inputs times -2 for 20 steps: BatchNorm and top-1 suffer for a while."""
    spike(rows, 1100, height=4.0, norm=2.0)
    evals[5].update(bn_drift_max=1.2, imagenet_top1=0.001)
    return {}


def unreadable(rows: Rows, evals: Rows) -> dict[str, Any]:
    for row in rows:
        row["data_faults"] = row["samples"] // 100
    return {}


def wrong_pairs(rows: Rows, evals: Rows) -> dict[str, Any]:
    """As measured with shuffled captions: text features shrink, gradients stay, no overshoot."""
    at_chance(rows, norm=0.1)
    for row in evals:
        row["imagenet_top1"] = 0.001
    return {}


def low_lr(rows: Rows, evals: Rows) -> dict[str, Any]:
    at_chance(rows, norm=3.0)
    for row in rows:
        row["text_feature_std"] = 0.03
        row["update_ratio/visual"] = 1e-9
    return {"lr": 1e-9}


def large_eps(rows: Rows, evals: Rows) -> dict[str, Any]:
    for row in rows:
        row["eps_share"] = 0.9
    return {"eps": 1e-2}


def fp16_range(rows: Rows, evals: Rows) -> dict[str, Any]:
    for place, row in enumerate(rows):
        row["skipped_steps"] = max(0, place - 500) // 20
        row["scaler_scale"] = 65536.0 / 2.0 ** min(10, row["skipped_steps"])
    return {"precision": "amp"}


def fp16_dead(rows: Rows, evals: Rows) -> dict[str, Any]:
    for place, row in enumerate(rows[700:]):
        row["skipped_steps"] += place
        row["scaler_scale"] = 65536.0 / 2.0 ** min(place, 40)
        row["grad_norm"] = math.inf
    return {"precision": "amp"}


def fp16_weights(rows: Rows, evals: Rows) -> dict[str, Any]:
    """--precision pure_fp16 --eps 1e-8: NaN from the first step on."""
    for row in rows[1:]:
        row["loss"] = row["grad_norm"] = math.nan
    for row in evals:
        row.update(params_non_finite=1000, bn_non_finite=10, imagenet_top1=0.001)
    return {"precision": "pure_fp16", "eps": 1e-8}


def infinite_pixel(rows: Rows, evals: Rows) -> dict[str, Any]:
    for row in rows[800:]:
        row["loss"] = row["grad_norm"] = math.nan
    for row in evals:
        if row["step"] > 800:
            row.update(bn_non_finite=64, params_non_finite=64)
    return {}


def overflow(rows: Rows, evals: Rows) -> dict[str, Any]:
    for place, row in enumerate(rows[1000:1040]):
        row["loss"] += 0.3 * place
        row["grad_norm"] *= 1.0 + place
    for row in rows[1040:]:
        row["loss"] = row["grad_norm"] = math.nan
    return {"lr": 1e-2}


def bn_statistics(rows: Rows, evals: Rows) -> dict[str, Any]:
    for row in evals[5:]:
        row.update(bn_gap=0.6, bn_drift_median=0.7, imagenet_top1=0.01, recalibrated_top1=0.15)
    return {"precision": "pure_bf16"}


def absurd_lr(rows: Rows, evals: Rows) -> dict[str, Any]:
    """lr 1e3, as measured: the temperature at its floor after one step, NaN from the fourth on."""
    for row in rows[CONTEXT.warmup :]:
        row["logit_scale"] = 1.0
    for row in rows[CONTEXT.warmup + 3 :]:
        row["loss"] = row["grad_norm"] = math.nan
    return {"lr": 1e3}


def fp16_forward(rows: Rows, evals: Rows) -> dict[str, Any]:
    """Weights x 1e4 under fp16 autocast, as measured: no step has a loss."""
    for place, row in enumerate(rows, start=1):
        row["loss"] = row["grad_norm"] = math.nan
        row["skipped_steps"], row["scaler_scale"] = place, 65536.0 / 2.0 ** min(place, 40)
    return {"precision": "amp"}


def grey_images(rows: Rows, evals: Rows) -> dict[str, Any]:
    """All images alike, as measured: ln(batch), with a gradient that is nearly none."""
    at_chance(rows, norm=1e-4, begin=10)
    for row in rows:
        row["image_feature_std"] = 0.0
    return {}


def cut_off(rows: Rows, evals: Rows) -> dict[str, Any]:
    for row in rows:
        for name in ("visual.conv1.weight", "visual.layer1.0.conv1.weight"):
            row[f"zero_grad_steps/{name}"] = row["step"]
    return {}


def cut_off_and_collapsed(rows: Rows, evals: Rows) -> dict[str, Any]:
    at_chance(rows, norm=0.1)
    return cut_off(rows, evals)


def attention(rows: Rows, evals: Rows) -> dict[str, Any]:
    for row in rows:
        row["attention_logits/text0"] = 10.0 * math.exp(row["step"] / 250.0)
    return {}


def drift(rows: Rows, evals: Rows) -> dict[str, Any]:
    for place, row in enumerate(rows):
        row["loss"] = 4.0 + 0.06 * math.sin(1.7 * place)
        row["logits_lse"] += 0.02 * place
    return {}


def hot(rows: Rows, evals: Rows) -> dict[str, Any]:
    for row in rows[600:]:
        row["logit_scale"] = min(100.0, row["logit_scale"] + (row["step"] - 600) * 0.1)
    return {}


def narrow(rows: Rows, evals: Rows) -> dict[str, Any]:
    for row in rows[600:]:
        row["image_feature_rank"] = 4.0
    return {}


PLANTED = [
    (high_lr, "learning rate too high", "lr"),
    (late_divergence, "learning rate too high", "lr"),
    (short_warmup, "warm-up too short", "warmup"),
    (stale_moment, "Adam's second moment is out of date", "beta2"),
    (stale_unwatched, "Adam's second moment is out of date", "beta2"),
    (bad_stretch, "a stretch of bad data", "train_data"),
    (shifted_inputs, "a stretch of bad data", "train_data"),
    (unreadable, "unreadable samples", "train_data"),
    (wrong_pairs, "images and captions do not belong together", "train_data"),
    (low_lr, "learning rate too low", "lr"),
    (large_eps, "epsilon rules the update", "eps"),
    (fp16_range, "fp16 runs out of range", "precision"),
    (fp16_dead, "fp16 runs out of range", "precision"),
    (fp16_weights, "weights in too low a precision", "precision"),
    (infinite_pixel, "an infinite or NaN input", "train_data"),
    (absurd_lr, "learning rate too high", "lr"),
    (fp16_forward, "fp16 runs out of range", "precision"),
    (grey_images, "images or captions that are all alike", "train_data"),
    (overflow, "overflow after the loss ran away", "lr"),
    (bn_statistics, "BatchNorm's running statistics", "precision"),
    (cut_off, "a part of the model gets no gradient", "lock_image"),
    (cut_off_and_collapsed, "a part of the model gets no gradient", "lock_image"),
    (attention, "attention logits grow", "lr"),
    (drift, "output logits drift", "wd"),
    (hot, "the temperature is out of its useful range", "batch_size"),
    (narrow, "the features collapse", "lr"),
]


@pytest.mark.parametrize(("plant", "cause", "factor"), PLANTED)
def test_a_planted_cause_comes_first(plant: Any, cause: str, factor: str) -> None:
    """The cause that was planted leads the list, with evidence and the factor to try."""
    rows = whole_rows(np.random.default_rng(0), STEPS)
    evals = healthy_evaluations(STEPS, 200)
    config = SANE | plant(rows, evals)
    judgement = judge(rows, evals, context=CONTEXT)
    verdict = judgement.verdict
    suspects = diagnose(
        judgement.events, config=config, silent=verdict.silent, causes=ALL, asked=verdict.flags
    )
    ranked = [(suspect.cause, suspect.score) for suspect in suspects]
    assert suspects and suspects[0].cause == cause, (ranked, judgement.events)
    assert len(suspects) == 1 or suspects[0].score > suspects[1].score, ranked
    assert suspects[0].evidence and next(iter(suspects[0].factors)) == factor
    from_lines = diagnose(
        [json.loads(json.dumps(item.to_dict())) for item in judgement.events],
        config=config,
        silent=verdict.silent,
        causes=ALL,
        asked=verdict.flags,
    )
    assert from_lines == suspects


def test_every_cause_has_a_planted_case() -> None:
    """No line of the table is untested."""
    assert {cause for _, cause, _ in PLANTED} == {cause.name for cause in ALL}


def test_a_healthy_run_has_no_suspect() -> None:
    """Without events there is nothing to explain, whatever the configuration."""
    rows = whole_rows(np.random.default_rng(0), STEPS)
    judgement = judge(rows, healthy_evaluations(STEPS, 200), context=CONTEXT)
    for config in (SANE, SANE | {"precision": "pure_fp16", "beta2": 0.999, "warmup": 0}, None):
        assert diagnose(judgement.events, config=config) == []


def test_an_annotated_run_is_accused_of_nothing_unless_someone_asks() -> None:
    """Attention logits that double to 200 are a flag of a STABLE run: no suspect, but to one who
    asks about that flag the cause is named."""
    rows = whole_rows(np.random.default_rng(0), STEPS)
    attention(rows, [])
    judgement = judge(rows, healthy_evaluations(STEPS, 200), context=CONTEXT)
    assert judgement.verdict.name == "STABLE" and judgement.verdict.flags == ("ATTENTION_LOGITS",)
    assert diagnose(judgement.events) == []
    assert diagnose(judgement.events, asked=["BN_DRIFT"]) == []
    (suspect,) = diagnose(judgement.events, asked=["ATTENTION_LOGITS"])
    assert suspect.cause == "attention logits grow"


def test_factors_are_fields_of_the_recipe() -> None:
    """What is proposed can be written into a study file as it stands."""
    from ablate.recipes.openclip import Config

    fields = set(Config.model_fields)
    for cause in ALL:
        assert set(cause.factors) <= fields, cause.name
        assert cause.source
