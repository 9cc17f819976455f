"""Synthetic traces like those of CLIP training, and shortcuts to judge them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ablate.markers import Context, Event, Judgement, Thresholds, judge

LONG = Context(
    global_batch=1024,
    warmup=100,
    steps_total=5000,
    accuracy="imagenet_top1",
    chance_top1=0.001,
    eval_images=50_000,
    feature_dim=1024,
)


def noise(
    rng: np.random.Generator, steps: int, *, ar: float = 0.0, heavy: bool = False
) -> NDArray[np.float64]:
    """Unit noise: normal, autoregressive of order 1, or Student t with 4 degrees of freedom."""
    drawn = rng.standard_t(4, steps) / np.sqrt(2.0) if heavy else rng.standard_normal(steps)
    if not ar:
        return drawn
    series = np.empty(steps)
    series[0] = drawn[0]
    fresh = np.sqrt(1.0 - ar * ar) * drawn
    for step in range(1, steps):
        series[step] = ar * series[step - 1] + fresh[step]
    return series


def descent(steps: int, *, scale: float = 800.0) -> NDArray[np.float64]:
    """The loss of a run that learns, from 8 nat towards 1.5."""
    return 1.5 + 6.5 * (1.0 + np.arange(steps) / scale) ** -0.7


def clip_loss(
    rng: np.random.Generator, steps: int, *, sigma: float = 0.06, **kind: Any
) -> NDArray[np.float64]:
    return descent(steps) + sigma * noise(rng, steps, **kind)


def rows_of(**columns: Sequence[float] | NDArray[np.float64]) -> list[dict[str, Any]]:
    """Rows of steps 1, 2, ... from columns; ``rms__conv1`` becomes ``rms/conv1``."""
    names = [name.replace("__", "/") for name in columns]
    return [
        {"step": step, **dict(zip(names, map(float, values), strict=True))}
        for step, values in enumerate(zip(*columns.values(), strict=True), start=1)
    ]


def judged(
    rows: Sequence[Mapping[str, Any]],
    evaluations: Sequence[Mapping[str, Any]] = (),
    *,
    context: Context = LONG,
    **thresholds: Mapping[str, Any],
) -> Judgement:
    return judge(rows, evaluations, thresholds=Thresholds(thresholds), context=context)


def told(judgement: Judgement, marker: str, kind: str | None = None) -> list[Event]:
    """Its events of a marker."""
    return [
        item
        for item in judgement.events
        if item.marker == marker and kind in (None, item.evidence["kind"])
    ]


def whole_rows(rng: np.random.Generator, steps: int, **kind: Any) -> list[dict[str, Any]]:
    """Rows of a healthy run with everything that the markers read, on every step."""

    def jitter(around: float, sigma: float) -> NDArray[np.float64]:
        return around * (1.0 + sigma * noise(rng, steps, **kind))

    step = np.arange(1, steps + 1)
    rows = rows_of(
        loss=clip_loss(rng, steps, **kind),
        grad_norm=jitter(3.0, 0.15),
        grad_norm__visual=jitter(2.0, 0.15),
        grad_norm__text=jitter(2.0, 0.15),
        lr=1e-3 * np.minimum(1.0, step / 100.0) * 0.5 * (1.0 + np.cos(np.pi * step / steps)),
        logit_scale=np.exp(np.log(14.3) + 1.5 * step / 5000.0),
        logits_lse=10.0 + 2.0 * step / 5000.0 + 0.05 * noise(rng, steps, **kind),
        scaler_scale=np.full(steps, 65536.0),
        skipped_steps=step // 2000,
        image_feature_std=jitter(0.03, 0.02),
        text_feature_std=jitter(0.03, 0.02),
        data_faults=step * 1024 // 1000 * 4,
        samples=step * 1024,
        rms__conv1=np.maximum(jitter(1.0, 0.2), 0.05),
        update_ratio__visual=jitter(1e-3, 0.1),
        update_norm=jitter(30.0, 0.1),
        update_turn=jitter(0.9, 0.05),
        eps_share=np.full(steps, 0.05),
        attention_logits__text0=np.maximum(jitter(10.0, 0.1), 0.0),
        image_feature_rank=jitter(300.0, 0.02),
        text_feature_rank=jitter(200.0, 0.02),
        prototypes_used=np.full(steps, 20.0),
        projection_spread=np.full(steps, 0.6),
    )
    for row in rows:  # the decay of the learning rate takes the updates with it
        row["update_ratio/visual"] *= row["lr"] / 1e-3
    return rows


def healthy_evaluations(steps: int, every: int = 250) -> list[dict[str, Any]]:
    return [
        {
            "step": step,
            "imagenet_top1": 0.2 * step / steps,
            "eval_images": 50_000,
            "params_non_finite": 0,
            "bn_non_finite": 0,
            "bn_drift_median": 0.05,
            "bn_drift_max": 0.3,
            "bn_gap": 0.02,
        }
        for step in range(every, steps + 1, every)
    ]
