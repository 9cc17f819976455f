"""Designs against their defining properties, with pyDOE3 as the oracle."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pyDOE3
import pytest

from ablate.study import factorial

SMALLEST = {
    "III": {3: 4, 4: 8, 7: 8, 8: 16, 15: 16, 31: 32},
    "IV": {3: 8, 4: 8, 5: 16, 8: 16, 9: 32, 16: 32},
    "V": {3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 8: 64, 9: 128, 11: 128},
}


def orthogonal(matrix: np.ndarray) -> bool:
    return bool((matrix.T @ matrix == len(matrix) * np.eye(matrix.shape[1])).all())


@pytest.mark.parametrize(
    ("resolution", "count", "runs"),
    [(r, k, n) for r, table in SMALLEST.items() for k, n in table.items()],
)
def test_fractions_have_the_tabled_size_and_their_resolution(
    resolution: str, count: int, runs: int
) -> None:
    """Run counts of the standard tables; orthogonal; balanced; contains the baseline; mains and
    pairs are clear of what the resolution promises."""
    design = factorial.fractional(count, resolution=resolution)
    matrix = design.matrix
    assert design.runs == runs == len(np.unique(matrix, axis=0))
    assert orthogonal(matrix) and (matrix.sum(axis=0) == 0).all()
    assert (matrix == -1).all(axis=1).any()
    names = [str(i) for i in range(count)]
    table = design.aliases(names)
    if resolution != "III":
        assert all(not table[name] for name in names)
    if resolution == "V":
        assert all(not aliased for aliased in table.values())
    shortest = design.resolution or math.inf
    assert shortest >= factorial.RESOLUTIONS[resolution]
    if design.words:
        word = design.words[0]
        assert len(word) == shortest
        assert abs(matrix[:, list(word)].prod(axis=1).sum()) == runs


@pytest.mark.parametrize(("count", "resolution"), [(5, "III"), (6, "IV"), (7, "IV"), (5, "V")])
def test_aliases_are_those_of_pydoe3(count: int, resolution: str) -> None:
    """The same matrix through pyDOE3's alias finder gives the same confounded sets."""
    design = factorial.fractional(count, resolution=resolution)
    names = [chr(ord("a") + i) for i in range(count)]
    ours = {
        frozenset({label.replace(" x ", ""), *(a.replace(" x ", "") for a in aliased)})
        for label, aliased in design.aliases(names).items()
    }
    # Mirrored, all words are positive; pyDOE3 does not look for negative ones.
    theirs, _ = pyDOE3.fracfact_aliasing(-design.matrix)
    low = {frozenset(word for word in line.split(" = ") if len(word) <= 2) for line in theirs} - {
        frozenset()
    }
    assert ours == low


def test_least_aberration_for_seven_factors_in_thirty_two_runs() -> None:
    """2^(7-2) has one word of length 4 and two of length 5 at best (Fries and Hunter 1980)."""
    words = factorial.words_of(5, factorial.choose_generators(5, 2, 4) or ())
    assert [len(word) for word in words] == [4, 5, 5]


def test_full_factorial_is_pydoe3s() -> None:
    """All combinations once, whatever the order."""
    ours = factorial.full_factorial([2, 3, 4])
    theirs = pyDOE3.fullfact([2, 3, 4]).astype(int)
    assert sorted(map(tuple, ours)) == sorted(map(tuple, theirs))
    assert not ours[0].any()


@pytest.mark.parametrize("count", [2, 3, 7, 11, 15, 19, 23, 27, 35, 47])
def test_plackett_burman_is_orthogonal_and_as_small_as_pydoe3s(count: int) -> None:
    """Orthogonal, contains the baseline, same runs as pyDOE3; folded over, mains are clear."""
    single = factorial.plackett_burman(count, fold_over=False)
    assert single.runs == 4 * (count // 4 + 1)
    if count not in (27, 35):  # pyDOE3 knows no Hadamard matrix of 28 or 36 rows
        assert single.runs == len(pyDOE3.pbdesign(count))
    assert orthogonal(single.matrix) and (single.matrix.sum(axis=0) == 0).all()
    assert (single.matrix == -1).all(axis=1).any()
    folded = factorial.plackett_burman(count, fold_over=True)
    assert folded.runs == 2 * single.runs
    names = [str(i) for i in range(count)]
    table = folded.aliases(names)
    assert all(not table[name] for name in names)
    assert (factorial.fold_over(single).matrix == folded.matrix).all()


def test_plackett_burman_confounds_in_thirds() -> None:
    """In 12 runs each main holds a third of every pair it is not in."""
    names = list("abcdefghijk")
    table = factorial.plackett_burman(11, fold_over=False).aliases(names)
    for name in names:
        assert len(table[name]) == 45
        assert all(abs(weight) == pytest.approx(1 / 3) for weight in table[name].values())


def test_fold_over_keeps_even_words() -> None:
    """Folding a resolution III fraction removes its odd words and gives resolution IV."""
    design = factorial.fractional(7, resolution="III")
    folded = factorial.fold_over(design)
    assert design.resolution == 3 and folded.resolution == 4 and folded.runs == 16
    names = list("abcdefg")
    assert all(not folded.aliases(names)[name] for name in names)
    oracle = pyDOE3.fold(design.matrix)
    assert sorted(map(tuple, oracle.astype(int))) == sorted(map(tuple, folded.matrix))


@pytest.mark.parametrize(
    ("levels", "runs"),
    [
        ([3, 3, 3, 3], 9),
        ([3, 2, 3], 9),
        ([2, 3, 3, 3, 3, 3, 3, 3], 18),
        ([3, 3, 2, 3, 2, 3], 18),
        ([3] * 7, 18),
        ([3] * 13, 27),
        ([3] * 8, 27),
        ([2, 2, 2], 4),
    ],
)
def test_orthogonal_arrays_have_strength_two(levels: list[int], runs: int) -> None:
    """Each pair of factors meets in proportion to its levels' frequencies; row 0 the baseline."""
    array = factorial.orthogonal_array(levels)
    assert array.shape == (runs, len(levels))
    assert (array == 0).all(axis=1).any()
    for i, n in enumerate(levels):
        assert set(array[:, i]) == set(range(n))
    for i, j in combinations(range(len(levels)), 2):
        for a in range(levels[i]):
            for b in range(levels[j]):
                both = ((array[:, i] == a) & (array[:, j] == b)).sum()
                assert both * runs == (array[:, i] == a).sum() * (array[:, j] == b).sum()


@pytest.mark.parametrize("resolution", ["III", "IV"])
def test_aliases_of_mixed_arrays_are_those_of_two_levels(resolution: str) -> None:
    """On a two-level fraction the general alias finder gives the sizes of the special one."""
    two = factorial.fractional(6, resolution=resolution)
    names = list("abcdef")
    special = {
        effect: {other: abs(weight) for other, weight in others.items()}
        for effect, others in two.aliases(names).items()
    }
    general = factorial.MixedLevel(two.level_numbers()).aliases(names)
    assert general.keys() == special.keys()
    for effect, others in special.items():
        assert general[effect] == pytest.approx(others), effect


def test_aliases_of_a_mixed_array() -> None:
    """L9 holds its mains free of each other and each wholly confounded with the other pairs."""
    table = factorial.mixed_levels([3, 3, 3, 3]).aliases(list("abcd"))
    assert set(table["a"]) == {"b x c", "b x d", "c x d"}
    assert all(weight > 0.7 for weight in table["a"].values())


@pytest.mark.parametrize(
    "call",
    [
        lambda: factorial.fractional(0),
        lambda: factorial.fractional(40),
        lambda: factorial.fractional(5, resolution="VI"),
        lambda: factorial.plackett_burman(48),
        lambda: factorial.orthogonal_array([4, 2]),
        lambda: factorial.orthogonal_array([3] * 14),
        lambda: factorial.hadamard(6),
    ],
)
def test_designs_that_do_not_exist_are_refused(call) -> None:  # type: ignore[no-untyped-def]
    """Impossible requests are ValueErrors that say what is possible."""
    with pytest.raises(ValueError, match=r"use|takes|at most|no Hadamard"):
        call()
