"""Rows in which every pair of levels that can stand together does so (a covering array).

Greedy, as AETG (Cohen, Dalal, Fredman and Patton 1997, doi 10.1109/32.605761) without its lottery:
each row begins with a pair that is still missing and takes for every other factor the level that
adds most missing pairs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

Row = dict[str, str]
"""Name of a level by factor."""

Pair = frozenset[tuple[str, str]]


def all_pairs(
    factors: Mapping[str, Sequence[str]], allowed: Callable[[Row], bool]
) -> frozenset[Pair]:
    """Every pair of levels of two factors that is `allowed`, alone beside defaults."""
    return frozenset(
        frozenset({(one, a), (other, b)})
        for one, other in itertools.combinations(factors, 2)
        for a in factors[one]
        for b in factors[other]
        if allowed({one: a, other: b})
    )


def pairs_of(row: Row) -> set[Pair]:
    """The pairs that stand together in a row."""
    return {frozenset(pair) for pair in itertools.combinations(row.items(), 2)}


def cover(factors: Mapping[str, Sequence[str]], possible: frozenset[Pair]) -> list[Row]:
    """Rows that hold every one of the `possible` pairs and no other."""
    rows: list[Row] = []
    missing = sorted(possible, key=sorted)
    left = set(missing)
    for seed in missing:
        if seed not in left:
            continue
        row = dict(sorted(seed))
        for factor in factors:
            if factor not in row:
                row[factor] = _best(row, factor, factors[factor], possible, left)
        left -= pairs_of(row)
        rows.append(row)
    return rows


def _best(
    row: Row, factor: str, levels: Sequence[str], possible: frozenset[Pair], left: set[Pair]
) -> str:
    """The level that stands with all of `row` and adds most missing pairs; the first of equals."""

    def beside(level: str) -> set[Pair]:
        return {frozenset({(factor, level), other}) for other in row.items()}

    fitting = [level for level in levels if beside(level) <= possible]
    return max(fitting, key=lambda level: len(beside(level) & left))
