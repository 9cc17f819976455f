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
