"""What tuning may have left on the table: the best of a few noisy scores is not the best setting.

A level and its reference stand at the settings that looked best on the tuning seeds. Equal levels
differ by what either choice lost, and the more seeds are compared, the surer that looks. So a
difference counts as the level's own only if it exceeds what the choices may have lost.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_SURE = 0.95
_DRAWS = 2000


@dataclass(frozen=True, slots=True)
class Tuned:
    """How the two sides of a contrast were tuned; scores of all candidates, larger is better."""

    level: Sequence[float]
    reference: Sequence[float]
    seeds: int


def possible_loss(scores: Sequence[float], sigma: float, seeds: int) -> float:
    """What the chosen candidate may score less than the best one; exceeded in one case of 20.

    The candidates' true scores are normal around their mean, with the spread that the scores show
    beyond `sigma` / sqrt(`seeds`), the noise of a mean over the tuning seeds; never less than half
    of that noise, since a handful of scores tells its spread badly.
    """
    seen = np.asarray(scores, dtype=float)
    if len(seen) < 2 or not np.isfinite(seen).all():
        return math.inf
    noise = sigma**2 / seeds
    spread = max(float(seen.var(ddof=1)) - noise, noise / 2)
    kept = spread / (spread + noise) if spread + noise > 0 else 1.0
    center = seen.mean() + kept * (seen - seen.mean())
    draws = np.random.default_rng(20).standard_normal((_DRAWS, len(seen)))
    true = center + math.sqrt(kept * noise) * draws
    lost = true.max(axis=1) - true[:, int(np.argmax(seen))]
    return float(np.quantile(lost, _SURE))
