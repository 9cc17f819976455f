"""What the answer of a sweep must be, on sweeps small enough for the suite.

How often it is right is measured in tests/calibration/test_sweeps.py.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from sweep_worlds import AXES, BASELINE, GOAL, World, confirm, judge

from ablate.analysis.axes import Axis, positions
from ablate.analysis.response import fit
from ablate.analysis.results import Objective, Result, tabulate
from ablate.analysis.sweep import MOVED, answer

LINE = (Axis("lr", low=1e-4, high=1e-2, is_log=True),)


def on_a_line(lrs, score, *, seeds=1, noise=0.0, seed=0):
    """Runs of a learning rate alone; a score of None is a divergence."""
    rng = np.random.default_rng(seed)
    rows = []
    for lr in lrs:
        for replicate in range(seeds):
            value = score(lr)
            gone = value is None
            rows.append(
                Result(
                    (("lr", repr(float(lr))),),
                    replicate,
                    "diverged" if gone else "completed",
                    None if gone else value + rng.normal(0, noise),
                )
            )
    return rows


def hill(lr):
    """Best at 1e-3, divergence above 5e-3."""
    return None if lr > 5e-3 else 0.2 - 0.04 * math.log10(lr / 1e-3) ** 2


def test_what_may_not_be_used_is_neither_handed_out_nor_proposed():
    """The better half of a space is barred: all that is named lies in the other."""
    world = World("plain", 3)
    (best,) = {axis.levels[int(np.argmax(world.effects[axis.name]))]
               for axis in AXES if axis.name == "augmentation"}  # fmt: skip
    usable = {"default", "strong"} - {best}
    table = tabulate(world.sweep(cells=20))
    found = answer(table, AXES, BASELINE, GOAL, may_use=lambda cell: cell[4] in usable)
    named = [use.cell for use in found.ranking] + [each.cell for each in found.next]
    assert len(found.confirm) > 1 and found.next
    assert {cell[4] for cell in (*named, *found.confirm)} == usable


def test_a_sweep_is_answered_and_confirmed():
    """TPE's cells name the best region, the cliff and the strong factors; confirming updates it."""
    world = World("cliff", 4)
    rows = world.sweep()
    first = judge(rows)
    assert first.use is not None and first.use.gain is not None and first.left is not None
    assert world.truth(first.use.cell) > world.truth(BASELINE)
    by_name = {effect.axis.name: effect for effect in first.effects}
    assert by_name["lr"].verdict == MOVED
    good = [by_name["lr"].axis.value(float(by_name["lr"].nodes[i]))
            for i, is_good in enumerate(by_name["lr"].good) if is_good]  # fmt: skip
    assert min(good) / 1.6 <= 10**world.optimum <= max(good) * 1.6
    (cliff,) = first.cliffs
    assert AXES[cliff.axis].name == "lr" and cliff.above
    assert AXES[0].value(cliff.interval[0]) <= 10**world.cliff <= AXES[0].value(cliff.interval[1])
    last = confirm(world, rows, first, cells=3, seeds=2)
    assert last.use is not None and last.use.gain is not None
    before, after = (g.high - g.low for g in (first.use.gain, last.use.gain))
    assert after < 0.9 * before
    assert max(use.runs for use in last.ranking) == 3


def test_nothing_is_claimed_of_a_sweep_without_effects():
    """Noise alone moves no factor, shows no pair and no cliff, and leaves little to gain."""
    found = judge(World("null", 1).sweep(cells=24))
    assert [effect.axis.name for effect in found.effects if effect.verdict == MOVED] == []
    assert found.pair is not None and not found.pair.is_shown and found.cliffs == ()
    assert found.left is not None and found.left.mean < GOAL.margin


@pytest.mark.parametrize(("ahead", "used"), [(1.05, "0.001"), (2.0, "0.002")])
def test_the_baseline_is_not_left_for_a_hairs_breadth(ahead, used):
    """A cell whose believed gain is a small part of the margin is no reason to change anything;
    one that gains the margin's half is."""
    lrs = [1e-4, 3e-4, 1e-3, ahead * 1e-3, 4e-3, 8e-3]
    rows = on_a_line(lrs, lambda lr: 0.2 - 0.04 * math.log10(lr / (ahead * 1e-3)) ** 2)
    found = answer(tabulate(rows), LINE, ("0.001",), GOAL)
    assert found.use is not None and found.use.cell == (used,)
    assert (found.use.gain is None) == (used == "0.001")


def test_less_is_better_mirrors_more_is_better():
    """With the score negated and the direction turned, the same cell is used for the same gain."""
    rows = World("plain", 2).sweep(cells=20)
    turned = [
        Result(r.levels, r.seed, r.outcome, None if r.value is None else -r.value) for r in rows
    ]
    less = Objective("loss", "minimize", margin=GOAL.margin)
    one, two = judge(rows), answer(tabulate(turned), AXES, BASELINE, less)
    assert one.use is not None and two.use is not None and one.use.gain and two.use.gain
    assert one.use.cell == two.use.cell
    assert two.use.gain.mean == pytest.approx(one.use.gain.mean, abs=0.002)
    assert [e.axis.name for e in one.effects][:2] == [e.axis.name for e in two.effects][:2]


def test_the_model_agrees_with_another_implementation():
    """On one smooth factor with noise, means and deviations are those of scikit-learn's process
    within what the two priors may differ by."""
    process = pytest.importorskip("sklearn.gaussian_process")
    kernels = pytest.importorskip("sklearn.gaussian_process.kernels")
    lrs = np.geomspace(1e-4, 4e-3, 18)
    rows = on_a_line(lrs, hill, noise=0.002)
    table = tabulate(rows)
    response = fit(table, LINE)
    assert response is not None
    x, y = positions(LINE, table.cells), table.values[:, 0]
    theirs = process.GaussianProcessRegressor(
        kernels.ConstantKernel(1.0, (0.05, 50)) * kernels.Matern(0.5, (0.1, 5), nu=2.5)
        + kernels.WhiteKernel(0.05, (1e-4, 2)),
        n_restarts_optimizer=2,
        random_state=0,
    ).fit(x, (y - y.mean()) / y.std())
    points = np.linspace(0.1, 0.75, 9)[:, None]
    mean, sd = theirs.predict(points, return_std=True)
    noise = math.sqrt(theirs.kernel_.k2.noise_level)
    sample = response.sample(points, np.random.default_rng(0))
    assert sample.mean(0) == pytest.approx(mean * y.std() + y.mean(), abs=0.0015)
    assert response.mean(points) == pytest.approx(sample.mean(0), abs=0.001)
    assert response.noise == pytest.approx(noise * y.std(), rel=0.5)
    own = np.sqrt(np.maximum(sd**2 - noise**2, 0)) * y.std()
    assert sample.std(0) == pytest.approx(own, rel=0.8, abs=0.0005)


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (on_a_line([1e-3, 2e-3], lambda lr: None), "no cell has a completed run"),
        (on_a_line([1e-3], lambda lr: 0.2), "a model needs four"),
        (on_a_line([1e-3, 2e-3, 3e-3, 4e-3, 9e-3], lambda lr: 0.2), "scores the same"),
        (on_a_line([1e-3, 6e-3, 7e-3], hill), "a model needs four"),
    ],
)
def test_what_cannot_be_modelled_is_said(rows, says):
    """All diverged, one finished cell, a constant score: a sentence, and the best observed."""
    found = answer(tabulate(rows), LINE, ("0.001",), GOAL)
    assert says in found.why_no_model and found.effects == () and found.left is None
    assert (found.use is None) == all(row.outcome == "diverged" for row in rows)


def test_more_cells_than_are_modelled_at_once_are_answered():
    """Hundreds of cells are answered in seconds, with all of them taken into account."""
    lrs = np.geomspace(1e-4, 1e-2, 600)
    found = answer(tabulate(on_a_line(lrs, hill, noise=0.004)), LINE, (repr(1e-4),), GOAL)
    assert found.completed + found.diverged == 600
    assert found.use is not None and 6e-4 < float(found.use.cell[0]) < 1.6e-3
    assert LINE[0].value(found.cliffs[0].at) == pytest.approx(5e-3, rel=0.02)


def test_a_factor_that_does_not_count_is_not_asked_about():
    """A conditional factor is judged by the cells in which it counts, whatever the others say."""
    axes = (
        Axis("augmentation", levels=("default", "strong")),
        Axis("erasing", levels=("0", "1"), only_if=(("augmentation", frozenset({"strong"})),)),
    )
    rng = np.random.default_rng(0)
    rows = [
        Result(
            (("augmentation", a), ("erasing", e)),
            seed,
            "completed",
            0.2
            + 0.02 * (a == "strong")
            + 0.03 * (a == "strong" and e == "1")
            + rng.normal(0, 0.002),
        )
        for a, e in (("default", "0"), ("default", "1"), ("strong", "0"), ("strong", "1"))
        for seed in range(4)
    ]
    table = tabulate(rows)
    assert np.isnan(positions(axes, table.cells)[:2, 1]).all()
    found = answer(table, axes, ("default", "0"), GOAL)
    assert found.use is not None and found.use.cell == ("strong", "1")
    for proposal in found.next:
        assert proposal.cell[0] == "strong" or proposal.cell[1] == "0"
