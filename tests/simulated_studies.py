"""Simulated studies: value = 0.18 + planted effects + seed block + noise."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from ablate.analysis.results import Result

Factors = Mapping[str, Sequence[str]]


def one_at_a_time(factors: Factors) -> list[dict[str, str]]:
    """The baseline (first level of each factor) and every cell one level away from it."""
    base = {factor: levels[0] for factor, levels in factors.items()}
    return [base] + [{**base, f: level} for f, levels in factors.items() for level in levels[1:]]


def run(
    cells: Iterable[Mapping[str, str]],
    *,
    seeds: int,
    sigma: float,
    block: float = 0.003,
    effects: Mapping[str, float] | None = None,
    noise_of: Mapping[str, float] | None = None,
    diverged: Iterable[tuple[str, int]] = (),
    seed: int = 0,
    ids: bool = False,
) -> list[Result]:
    """One result per cell and seed.

    Keys name levels that must all be present, as "lr=5" or "lr=5,warmup=1k"; the empty key is the
    baseline's. `diverged`: (key, seed) of runs that diverge.
    """
    generator = np.random.default_rng(seed)
    blocks = generator.normal(0, block, seeds)
    lost = set(diverged)
    results = []
    for i, cell in enumerate(cells):
        held = {f"{f}={level}" for f, level in cell.items()}

        def applies(key: str, held: set[str] = held) -> bool:
            return set(key.split(",")) <= held

        mean = 0.18 + sum(x for key, x in (effects or {}).items() if applies(key))
        spread = next((x for key, x in (noise_of or {}).items() if applies(key)), sigma)
        for s in range(seeds):
            value = mean + blocks[s] + generator.normal(0, spread)
            gone = any(applies(key) and s == at for key, at in lost)
            results.append(
                Result(
                    tuple(cell.items()), s, "diverged" if gone else "completed",
                    None if gone else float(value), f"{i}-{s}" if ids else "",
                )
            )  # fmt: skip
    return results
