"""Columns of simulated CLIP runs, healthy or with a planted fault, as the markers read them.

loss: power-law descent and AR(phi) noise, normal or Student t with 4 degrees of freedom; gradient
norm: lognormal, one row in 1,000 times 1 + Pareto(2.5), which rms/* share; temperature 14.3 to its
clamp; feature spread and rank rise, attention logits grow slowly; fp16: three skips at the start
and one after every 2,000 clean steps; 0.1 % bad samples; evaluations with a rising accuracy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.signal import lfilter

from ablate.markers import Context, Judgement, judge

BATCH, DIM, SIGMA = 1024, 1024, 0.06
KINDS = {
    "normal": (0.0, False),
    "normal, AR .5": (0.5, False),
    "normal, AR .9": (0.9, False),
    "t4": (0.0, True),
    "t4, AR .5": (0.5, True),
    "t4, AR .9": (0.9, True),
}
"""Noise of the loss: autocorrelation of neighbours, and whether its tails are heavy."""


@dataclass
class Run:
    """Columns, what is measured on some steps only, and evaluations."""

    columns: dict[str, Any]
    sparse: dict[int, dict[str, float]] = field(default_factory=dict)
    evaluations: list[dict[str, float]] = field(default_factory=list)
    warmup: int = 0

    @property
    def steps(self) -> int:
        return len(self.columns["loss"])

    def judged(self) -> Judgement:
        names = list(self.columns)
        rows: list[dict[str, Any]] = []
        columns = (np.asarray(self.columns[name]).tolist() for name in names)
        for place, values in enumerate(zip(*columns, strict=True)):
            rows.append({"step": place + 1, **dict(zip(names, values, strict=True))})
            rows[-1].update(self.sparse.get(place, {}))
        context = Context(
            global_batch=BATCH, warmup=self.warmup, steps_total=self.steps,
            accuracy="imagenet_top1", chance_top1=1e-3,
            feature_dim=DIM,
        )  # fmt: skip
        return judge(rows, self.evaluations, context=context)


def noise(rng: np.random.Generator, steps: int, kind: str) -> Any:
    """Unit noise of a kind, stationary from its first row on."""
    phi, heavy = KINDS[kind]
    drawn = rng.standard_t(4, steps) / math.sqrt(2.0) if heavy else rng.standard_normal(steps)
    start = np.array([(1 - math.sqrt(1 - phi * phi)) * drawn[0]])
    return lfilter([math.sqrt(1 - phi * phi)], [1, -phi], drawn, zi=start)[0] if phi else drawn


def loss_of(rng: np.random.Generator, steps: int, kind: str) -> Any:
    t, pace = np.arange(1, steps + 1.0), max(steps / 91_000, 0.02)
    fall = (math.log(BATCH) - 0.9) * (1 + t / (800 * pace)) ** -0.6
    return 0.9 + fall + SIGMA * noise(rng, steps, kind)


def fine_tuned(rng: np.random.Generator, steps: int, kind: str) -> Run:
    """A loss that falls by half a nat under noise five times as large, as of fine-tuning in small
    batches; nothing is wrong with it."""
    t = np.arange(steps) / steps
    loss = 1.5 + 0.5 * np.exp(-t / 0.15) + 5 * SIGMA * noise(rng, steps, kind)
    return Run({"loss": loss}, warmup=steps // 10)


def healthy(rng: np.random.Generator, steps: int, kind: str) -> Run:
    """A run with which nothing is wrong."""
    t, pace = np.arange(1, steps + 1.0), steps / 91_000
    warmup = min(2000, max(1, steps // 10))
    lr = 1e-3 * np.minimum(1, t / warmup) * 0.5 * (1 + np.cos(math.pi * t / steps))
    heavy = np.ones(steps)
    hit = rng.random(steps) < 1e-3
    heavy[hit] += rng.pareto(2.5, int(hit.sum()))
    level = 0.6 + 0.5 * (t / steps) + 2 * np.exp(-t / (300 * max(pace, 0.05)))
    norm = level * heavy * np.exp(0.12 * rng.standard_normal(steps)) * 0.5
    columns: dict[str, Any] = {"lr": lr, "loss": loss_of(rng, steps, kind), "grad_norm": norm}
    for part in ("visual.trunk", "visual.head", "transformer.0", "transformer.1"):
        jitter = np.exp(rng.normal(0, 0.1, steps))
        columns[f"grad_norm/{part}"] = norm * rng.uniform(0.5, 0.8) * jitter
    for tensor, sd in (("visual.conv1.weight", 0.2), ("positional_embedding", 0.25)):
        columns[f"rms/{tensor}"] = 0.93 * heavy * np.exp(rng.normal(-sd * sd / 2, sd, steps))
    climb = min(1.2 * math.log(100 / 14.3), 1e-3 * steps) * (1 - np.exp(-t / (0.19 * steps)))
    log_scale = math.log(14.3) + climb + 2e-4 * rng.standard_normal(steps)
    scale = np.exp(np.minimum(math.log(100), log_scale))
    columns["logit_scale"] = scale
    cosine = 0.3 + 0.1 * (1 - np.exp(-t / (0.25 * steps))) + 0.004 * noise(rng, steps, kind)
    columns["logits_lse"] = scale * cosine + 3
    for tower, top in (("image", 0.029), ("text", 0.027)):
        spread = top * (1 - 0.6 * np.exp(-t / (1500 * max(pace, 0.02))))
        columns[f"{tower}_feature_std"] = spread * np.exp(0.01 * rng.standard_normal(steps))
    columns["samples"] = t * BATCH
    columns["data_faults"] = np.cumsum(rng.binomial(BATCH, 0.001, steps)).astype(float)
    _scale_gradients(columns, steps)
    run = Run(columns, warmup=warmup)
    _measure_rarely(run, rng)
    return run


def _scale_gradients(columns: dict[str, Any], steps: int) -> None:
    """fp16's scaler: it begins three doublings too high, and tries one after 2,000 clean steps."""
    scale, clean, skipped = 65536.0 * 8, 0, 0
    scales, skips = np.empty(steps), np.empty(steps)
    for place in range(steps):
        if scale > 65536:
            scale, clean, skipped = scale / 2, 0, skipped + 1
            columns["grad_norm"][place] = math.inf
        else:
            clean += 1
            if clean == 2000:
                scale, clean = scale * 2, 0
        scales[place], skips[place] = scale, skipped
    columns["scaler_scale"], columns["skipped_steps"] = scales, skips


def _measure_rarely(run: Run, rng: np.random.Generator) -> None:
    steps, pace = run.steps, max(run.steps / 91_000, 0.02)
    for place in range(49, steps, 50):
        row = run.sparse.setdefault(place, {})
        rate = max(run.columns["lr"][place], 1e-9) / 1e-3
        for group, ratio in (("visual", 2e-3), ("transformer", 3e-3), ("positional", 2e-2)):
            row[f"update_ratio/{group}"] = ratio * rate * math.exp(rng.normal(0, 0.2))
        row["eps_share"] = 0.05 + 0.3 * math.exp(-place / (2000 * pace))
    for place in range(199, steps, 200):
        for layer in range(4):
            value = (6 + 8 * layer * math.sqrt(place / steps)) * math.exp(rng.normal(0, 0.1))
            run.sparse.setdefault(place, {})[f"attention_logits/text.{layer}"] = value
    for place in range(499, steps, 500):
        rank = (80 + 500 * (1 - math.exp(-place / (0.2 * steps)))) * math.exp(rng.normal(0, 0.03))
        run.sparse.setdefault(place, {}).update(image_feature_rank=rank, text_feature_rank=rank)
    number = 32 if steps >= 4000 else 2
    for k in range(1, number + 1):
        run.evaluations.append(
            {
                "step": k * steps // number,
                "imagenet_top1": max(0.0, 0.2 * (1 - math.exp(-k / 9)) + rng.normal(0, 0.003)),
                "eval_images": 50_000,
                "params_non_finite": 0.0,
                "bn_non_finite": 0.0,
                "bn_drift_median": 0.06 * math.exp(rng.normal(0, 0.3)),
                "bn_drift_max": 0.3 * math.exp(rng.normal(0, 0.3)),
                "bn_gap": 0.01 + 0.01 * abs(rng.standard_normal()),
            }
        )


@dataclass(frozen=True)
class Fault:
    """Something done to a run from row k on, and the marker that must tell of it."""

    marker: str
    do: Callable[[Run, int, Any], None]
    verdict: str = "STABLE"


def spike(height: float) -> Callable[[Run, int, Any], None]:
    """So many deviations of the loss's noise, decaying over 10 steps."""

    def do(run: Run, k: int, t: Any) -> None:
        run.columns["loss"][k:] += height * SIGMA * np.exp(-t / 10)

    return do


def _rise(run: Run, k: int, t: Any) -> None:
    run.columns["loss"][k:] += np.minimum(1.5, t / 1200)


def _chance(run: Run, k: int, t: Any) -> None:
    wiggle = np.random.default_rng(k).standard_normal(len(t))
    run.columns["loss"][k:] = math.log(BATCH) + 0.01 * wiggle


def _nan(run: Run, k: int, t: Any) -> None:
    run.columns["loss"][k : k + 5] = math.nan


def _norm(run: Run, k: int, t: Any) -> None:
    run.columns["grad_norm"][k : k + 4] *= 15


def _updates(run: Run, k: int, t: Any) -> None:
    for place, row in run.sparse.items():
        if place >= k and "update_ratio/visual" in row:
            row["update_ratio/visual"] *= 10


def _attention(run: Run, k: int, t: Any) -> None:
    for place, row in run.sparse.items():
        if place >= k and "attention_logits/text.1" in row:
            row["attention_logits/text.1"] *= math.exp((place - k) / 1000)


def _scale(run: Run, k: int, t: Any) -> None:
    run.columns["logit_scale"][k:] *= np.exp(-np.minimum(4.0, t / 300))


def _collapse(run: Run, k: int, t: Any) -> None:
    run.columns["image_feature_std"][k:] *= np.maximum(0.002, np.exp(-t / 300))


def _dead_tower(run: Run, k: int, t: Any) -> None:
    for part in ("transformer.0", "transformer.1"):
        run.columns[f"grad_norm/{part}"][k:] = 0.0


def _scaler(run: Run, k: int, t: Any) -> None:
    run.columns["skipped_steps"][k:] += 1 + t
    run.columns["grad_norm"][k:] = math.inf
    run.columns["scaler_scale"][k:] = 65536 * 0.5 ** np.minimum(t, 40)


def _bad_samples(run: Run, k: int, t: Any) -> None:
    rng = np.random.default_rng(k)
    run.columns["data_faults"][k:] += np.cumsum(rng.binomial(BATCH, 0.01, len(t)))


def _statistics(run: Run, k: int, t: Any) -> None:
    for row in run.evaluations:
        if row["step"] >= k:
            row["recalibrated_top1"] = row["imagenet_top1"]
            row["bn_drift_median"] += 1.0
            row["bn_gap"] += 0.4
            row["imagenet_top1"] *= 0.6


def _accuracy(run: Run, k: int, t: Any) -> None:
    for row in run.evaluations:
        if row["step"] >= k:
            row["imagenet_top1"] *= 0.2


FAULTS = {
    "spike of 15 deviations": Fault("loss_spike", spike(15), "SPIKY"),
    "slow rise": Fault("divergence", _rise, "DIVERGED"),
    "chance": Fault("divergence", _chance, "DIVERGED"),
    "NaN": Fault("non_finite", _nan, "NUMERIC_FAIL"),
    "norm": Fault("grad_norm_spike", _norm),
    "updates x 10": Fault("update_ratio", _updates),
    "attention grows": Fault("attention_logits", _attention),
    "temperature falls": Fault("logit_scale", _scale),
    "features collapse": Fault("feature_collapse", _collapse, "COLLAPSED"),
    "dead tower": Fault("dead_gradient", _dead_tower, "DEGRADED"),
    "scaler gives up": Fault("scaler_skips", _scaler, "NUMERIC_FAIL"),
    "bad samples": Fault("data_faults", _bad_samples),
    "statistics that cost accuracy": Fault("batch_norm", _statistics, "DEGRADED"),
    "accuracy falls": Fault("accuracy_collapse", _accuracy, "DEGRADED"),
}
"""Each at a size that is clear."""
