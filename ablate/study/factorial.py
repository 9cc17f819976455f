"""Designs as plain matrices: full and fractional factorials, Plackett-Burman, orthogonal arrays.

Two-level matrices hold -1 (the baseline's level) and +1, one row per cell, one column per factor;
every fraction is chosen such that it contains the baseline, the row of all -1. Orthogonal arrays
hold level numbers, 0 being the baseline's.

    design = fractional(6, resolution="IV")
    design.runs, design.resolution          # 16, 4
    design.aliases(["lr", "wd", "beta2", "warmup", "aug", "loss"])["lr x wd"]
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, product

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]

RESOLUTIONS = {"III": 3, "IV": 4, "V": 5}
MOST_FACTORS = 31
SEARCH_LIMIT = 20_000
"""Up to this many words are formed in comparing choices of generators for least aberration."""

MOST_IN_FRACTION = {4: 5, 5: 6, 6: 8, 7: 11, 8: 17}
"""log2(runs) -> most factors at resolution V (longest binary codes of distance 5)."""


@dataclass(frozen=True, slots=True)
class TwoLevel:
    """A two-level design and what it confounds."""

    matrix: IntArray
    """[run, factor] of -1 and +1."""
    resolution: int | None
    """Length of the shortest word of the defining relation; None when nothing is confounded."""
    words: tuple[tuple[int, ...], ...]
    """Factors of each word of the defining relation of a regular fraction, shortest first."""

    @property
    def runs(self) -> int:
        return len(self.matrix)

    def level_numbers(self) -> IntArray:
        """[run, factor]: 0 for the baseline's level, 1 for the other."""
        return (self.matrix + 1) // 2

    def aliases(self, names: Sequence[str]) -> dict[str, dict[str, float]]:
        """Main effects and pairs -> the other mains and pairs in their estimate, with weights.

        +-1 in regular fractions; fractions of 1 where an effect is only partly confounded. Effects
        that are clear have an empty entry.
        """
        effects = [(i,) for i in range(len(names))] + list(combinations(range(len(names)), 2))
        labels = [" x ".join(names[i] for i in effect) for effect in effects]
        columns = np.array([self.matrix[:, list(e)].prod(axis=1) for e in effects])
        overlap = columns @ columns.T / self.runs
        np.fill_diagonal(overlap, 0.0)
        return {
            label: {labels[j]: float(row[j]) for j in np.flatnonzero(np.abs(row) > 1e-9)}
            for label, row in zip(labels, overlap, strict=True)
        }


@dataclass(frozen=True, slots=True)
class MixedLevel:
    """A design with two or three levels a factor: an orthogonal array."""

    matrix: IntArray
    """[run, factor] of level numbers, 0 the baseline's."""

    def level_numbers(self) -> IntArray:
        return self.matrix

    def aliases(self, names: Sequence[str]) -> dict[str, dict[str, float]]:
        """Main effects and pairs -> the other mains and pairs in their estimate.

        The weight is the largest canonical correlation of the two effects' columns over the runs:
        1 when some contrast of one is a contrast of the other, the size of the alias for two
        levels.
        """
        effects = [(i,) for i in range(len(names))] + list(combinations(range(len(names)), 2))
        labels = [" x ".join(names[i] for i in effect) for effect in effects]
        bases = [_effect_basis(self.matrix, effect) for effect in effects]
        table: dict[str, dict[str, float]] = {label: {} for label in labels}
        for (one, basis), (two, other) in combinations(zip(labels, bases, strict=True), 2):
            overlap = np.linalg.svd(basis.T @ other, compute_uv=False)
            weight = float(overlap[0]) if len(overlap) else 0.0
            if weight > 1e-9:
                table[one][two] = table[two][one] = min(weight, 1.0)
        return table


def _effect_basis(matrix: IntArray, effect: tuple[int, ...]) -> npt.NDArray[np.float64]:
    """Orthonormal columns over the runs that span an effect: level contrasts, or their products."""
    columns = np.ones((len(matrix), 1))
    for i in effect:
        names = np.unique(matrix[:, i])
        # Sum-to-zero contrasts of the full crossing, so that a pair is free of its mains there.
        contrasts = (matrix[:, i, None] == names[1:]).astype(float) - (
            matrix[:, i, None] == names[:1]
        )
        columns = (columns[:, :, None] * contrasts[:, None, :]).reshape(len(matrix), -1)
    columns = columns - columns.mean(axis=0)
    left, sizes, _ = np.linalg.svd(columns, full_matrices=False)
    basis: npt.NDArray[np.float64] = left[:, sizes > 1e-9]
    return basis


def full_factorial(levels: Sequence[int]) -> IntArray:
    """Every combination of level numbers, the last factor fastest; the first row is all 0."""
    return np.array(list(product(*(range(n) for n in levels))), dtype=np.int64)


def fractional(count: int, *, resolution: str = "IV") -> TwoLevel:
    """The smallest regular 2^(k-p) fraction of `count` factors with at least this resolution.

    III: a main effect may be confounded with pairs; IV: only with triples; V: pairs are clear of
    each other too. The whole factorial where no fraction will do. Raises ValueError.
    """
    if resolution not in RESOLUTIONS:
        raise ValueError(f"resolution {resolution!r}: use III, IV or V")
    if not 1 <= count <= MOST_FACTORS:
        raise ValueError(f"{count} factors: a two-level fraction takes 1 to {MOST_FACTORS}")
    least = RESOLUTIONS[resolution]
    if least == 5 and count > max(MOST_IN_FRACTION.values()):
        raise ValueError(
            f"{count} factors: resolution V takes at most {max(MOST_IN_FRACTION.values())} (256 "
            "runs) here; use resolution IV and follow up what it finds"
        )
    for base in range(max(1, math.ceil(math.log2(count + 1))), count + 1):
        columns = choose_generators(base, count - base, least)
        if columns is not None:
            return _regular(base, columns)
    raise AssertionError("the whole factorial has no words")  # pragma: no cover


def plackett_burman(count: int, *, fold_over: bool = True) -> TwoLevel:
    """The smallest Hadamard design with more runs than factors, with its mirror image or not.

    Alone, mains are partly confounded with pairs (resolution III); with the fold-over's twice as
    many runs they are clear of pairs (IV). Raises ValueError.
    """
    if not 1 <= count <= 47:
        raise ValueError(f"{count} factors: a Plackett-Burman design takes 1 to 47")
    size = 4 * (count // 4 + 1)
    square = hadamard(size)
    # The first column is the mean; the first row is turned into the baseline.
    square = square * square[:, :1]
    square[:, 1:] *= -square[0, 1:]
    matrix = square[:, 1 : count + 1]
    if fold_over:
        matrix = np.vstack([matrix, -matrix])
    full = count <= 2 or (count == 3 and fold_over)
    return TwoLevel(matrix, None if full else 4 if fold_over else 3, ())


def fold_over(design: TwoLevel) -> TwoLevel:
    """The design and its mirror image: mains become clear of pairs. Its words keep even lengths."""
    words = tuple(word for word in design.words if len(word) % 2 == 0)
    shortest = min((len(word) for word in words), default=None)
    resolution = shortest if design.words or design.resolution is None else 4
    return TwoLevel(np.vstack([design.matrix, -design.matrix]), resolution, words)


def hadamard(n: int) -> IntArray:
    """A square +-1 matrix with orthogonal rows, by Paley's and Sylvester's constructions."""
    if n in (1, 2):
        return np.array([[1, 1], [1, -1]], dtype=np.int64)[:n, :n]
    if _is_prime(n - 1) and (n - 1) % 4 == 3:
        squares = _jacobsthal(n - 1)
        matrix = np.ones((n, n), dtype=np.int64)
        matrix[1:, 1:] = squares + np.eye(n - 1, dtype=np.int64)
        matrix[1:, 0] = -1
        matrix[0, :] = 1
        return matrix
    if _is_prime(n // 2 - 1) and (n // 2 - 1) % 4 == 1:
        q = n // 2 - 1
        conference = np.zeros((q + 1, q + 1), dtype=np.int64)
        conference[0, 1:] = conference[1:, 0] = 1
        conference[1:, 1:] = _jacobsthal(q)
        identity = np.eye(q + 1, dtype=np.int64)
        return np.kron(conference, [[1, 1], [1, -1]]) + np.kron(identity, [[1, -1], [-1, -1]])
    if n % 4 == 0:
        return np.kron(np.array([[1, 1], [1, -1]], dtype=np.int64), hadamard(n // 2))
    raise ValueError(f"no Hadamard matrix of {n} rows is built here")


def _jacobsthal(q: int) -> IntArray:
    """[i, j] = quadratic character of j - i modulo the prime q."""
    character = np.full(q, -1, dtype=np.int64)
    character[[i * i % q for i in range(1, q)]] = 1
    character[0] = 0
    index = np.arange(q)
    matrix: IntArray = character[(index[None, :] - index[:, None]) % q]
    return matrix


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))


# ---- regular fractions: an added factor's column is the product of some base columns -----------
# A column is a bit mask over the base factors; a word is a set of columns whose masks cancel.


def choose_generators(base: int, added: int, least: int) -> tuple[int, ...] | None:
    """Masks of the added columns with no word shorter than `least`, of least aberration if few."""
    candidates = [mask for mask in range(1, 1 << base) if mask.bit_count() >= max(2, least - 1)]
    candidates.sort(key=lambda mask: (-mask.bit_count(), mask))
    if added > len(candidates):
        return None
    if math.comb(len(candidates), added) << added <= SEARCH_LIMIT:
        best: tuple[tuple[int, ...], tuple[int, ...]] | None = None
        for chosen in combinations(candidates, added):
            lengths = [len(word) for word in words_of(base, chosen)]
            if lengths and min(lengths) < least:
                continue
            pattern = tuple(lengths.count(length) for length in range(3, base + added + 1))
            if best is None or pattern < best[0]:
                best = (pattern, chosen)
        return None if best is None else best[1]
    if least == 4:
        # Columns that are products of an odd number make words of even length only, and a
        # fraction of resolution IV with more factors than that does not exist.
        candidates = [mask for mask in candidates if mask.bit_count() % 2]
    if least == 5 and base + added > MOST_IN_FRACTION.get(base, 0):
        return None
    return _first_fit(base, added, least, candidates)


def _first_fit(
    base: int, added: int, least: int, candidates: Sequence[int]
) -> tuple[int, ...] | None:
    """Backtracking: no sum of fewer than `least` columns may vanish."""
    units = [1 << i for i in range(base)]

    def sums(columns: Sequence[int]) -> set[int]:
        """Sums of up to least - 2 columns: what a further column must not equal."""
        found = {0}
        for size in range(1, least - 1):
            for group in combinations(columns, size):
                total = 0
                for mask in group:
                    total ^= mask
                found.add(total)
        return found

    def extend(chosen: list[int], start: int) -> list[int] | None:
        if len(chosen) == added:
            return chosen
        taken = sums([*units, *chosen])
        for i in range(start, len(candidates)):
            if candidates[i] not in taken:
                result = extend([*chosen, candidates[i]], i + 1)
                if result is not None:
                    return result
        return None

    result = extend([], 0)
    return None if result is None else tuple(result)


def words_of(base: int, added: Sequence[int]) -> list[tuple[int, ...]]:
    """The defining relation: factors of each word (base factors first, then the added ones)."""
    words = []
    for size in range(1, len(added) + 1):
        for group in combinations(range(len(added)), size):
            mask = 0
            for i in group:
                mask ^= added[i]
            letters = [i for i in range(base) if mask >> i & 1]
            words.append((*letters, *(base + i for i in group)))
    return sorted(words, key=lambda word: (len(word), word))


def _regular(base: int, added: Sequence[int]) -> TwoLevel:
    basis = 2 * full_factorial([2] * base) - 1
    columns = [basis[:, i] for i in range(base)]
    for mask in added:
        letters = [i for i in range(base) if mask >> i & 1]
        # The sign that puts the row of all -1 into the fraction.
        sign = 1 if len(letters) % 2 else -1
        columns.append(sign * basis[:, letters].prod(axis=1))
    # More words than this (2^p) are of no use to a reader; the alias table has them all.
    words = words_of(base, added) if len(added) <= 12 else []
    resolution = len(words[0]) if words else None
    if resolution is None and added:
        resolution = 3
    return TwoLevel(np.stack(columns, axis=1), resolution, tuple(words))


# ---- three levels ------------------------------------------------------------------------------

_L18 = (
    "00000000 00111111 00222222 01001122 01112200 01220011 02010212 02121020 02202101 "
    "10022110 10100221 10211002 11012021 11120102 11201210 12021201 12102012 12210120"
)
"""Taguchi's L18: one two-level and seven three-level columns."""


def mixed_levels(levels: Sequence[int]) -> MixedLevel:
    """The smallest design here for factors with 2 or 3 levels, at resolution III."""
    return MixedLevel(orthogonal_array(levels))


def orthogonal_array(levels: Sequence[int]) -> IntArray:
    """The smallest array of strength 2 here for factors with 2 or 3 levels: [run, factor] numbers.

    Main effects are estimable free of each other and confounded with pairs (resolution III). A
    two-level factor in a three-level column shows its baseline level twice as often, which keeps
    that. Raises ValueError for other numbers of levels, or too many factors.
    """
    if not levels or any(n not in (2, 3) for n in levels):
        raise ValueError(
            f"levels {list(levels)}: an orthogonal array here takes factors with 2 or 3 levels; "
            "split other factors, or use full_factorial or one_at_a_time"
        )
    three = sum(n == 3 for n in levels)
    if three == 0:
        return (fractional(len(levels), resolution="III").matrix + 1) // 2
    count = len(levels)
    if count <= 4:
        array, two_columns = _linear_array(2), 0
    elif count <= 7 or (count == 8 and three < 8):
        array = np.array([[int(x) for x in row] for row in _L18.split()], dtype=np.int64)
        two_columns = 1 if three < count else 0
        array = array if two_columns else array[:, 1:]
    elif count <= 13:
        array, two_columns = _linear_array(3), 0
    else:
        raise ValueError(
            f"{count} factors with up to 3 levels: at most 13 fit in 27 runs; fix some of them, "
            "or give each 2 levels"
        )
    first_two = list(levels).index(2) if two_columns else None
    free = iter(range(two_columns, array.shape[1]))
    columns = []
    for i, n in enumerate(levels):
        if i == first_two:
            columns.append(array[:, 0])
            continue
        column = array[:, next(free)]
        columns.append(np.where(column == 2, 0, column) if n == 2 else column)
    return np.stack(columns, axis=1)


def _linear_array(dimensions: int) -> IntArray:
    """L9 or L27: all points of GF(3)^d, one column for each of its lines through 0."""
    points = full_factorial([3] * dimensions)
    lines = [p for p in points if p.any() and p[np.flatnonzero(p)[0]] == 1]
    return np.stack([points @ line % 3 for line in lines], axis=1)
