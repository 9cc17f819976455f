"""How good the answer of a sweep is, on sweeps whose truth is known.

Regret: true score of the best setting minus that of what is handed out, in points. Each measure is
printed with its number of sweeps; the whole comparison is run on demand:
``ABLATE_SWEEPS=200 pytest -m calibration tests/calibration/test_sweeps.py``.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections import defaultdict

import numpy as np
import pytest
from sweep_worlds import AXES, BASELINE, KINDS, World, best_observed, confirm, judge

from ablate.analysis.results import tabulate
from ablate.analysis.sweep import MOVED, NOTHING, Answer, Effect

SWEEPS = int(os.environ.get("ABLATE_SWEEPS", "40"))


def true_curve(world: World, effect: Effect) -> np.ndarray:
    """Of the factor at the effect's nodes, averaged over all settings of the others, centred; lr
    interacts with nothing, so that one of its values stands for all."""
    found = []
    for node in effect.nodes:
        choices = [axis.levels or (BASELINE[0],) for axis in AXES]
        choices[AXES.index(effect.axis)] = (effect.axis.level(node),)
        found.append(np.mean([world.smooth(cell) for cell in itertools.product(*choices)]))
    return np.array(found) - np.mean(found)


def covered(world: World, effect: Effect) -> float:
    """Share of the nodes at which the 90 % band holds the truth, both centred."""
    middle = effect.mean.mean()
    truth = true_curve(world, effect)
    return float(((effect.low - middle <= truth) & (truth <= effect.high - middle)).mean())


def measure(world: World) -> dict[str, float]:
    """What one sweep answers, against the truth; shares are averaged where they apply."""
    rows = world.sweep()
    table = tabulate(rows)
    first = judge(rows)
    if world.kind == "null":
        return {"claims": float(_claims(first))}
    last = confirm(world, rows, first, cells=4, seeds=3)
    assert first.use is not None and last.use is not None and first.left is not None
    observed = best_observed(table)
    regret = 100 * (world.best - world.truth(first.use.cell))
    found = {
        "regret observed": 100 * (world.best - world.truth(observed)),
        "regret posterior": regret,
        "regret confirmed": 100 * (world.best - world.truth(last.use.cell)),
        "gain left, expected": 100 * first.left.mean,
        "gain covered": _inside(world, first),
        "claims": float(_claims(first)),
    }
    listed = [effect for effect in first.effects if effect.axis.name != "lr"]
    (rate,) = (effect for effect in first.effects if effect.axis.name == "lr")
    found["band of lr"] = covered(world, rate)
    found["band of others"] = float(np.mean([covered(world, effect) for effect in listed]))
    truth = {e.axis.name: np.ptp(true_curve(world, e)) for e in listed}
    largest = max(truth, key=lambda name: truth[name])
    found["largest first"] = float(listed[0].axis.name == largest)
    found["largest first, all else known"] = float(world.likely_largest(table) == largest)
    moved = [truth[e.axis.name] > 0.0025 for e in listed if e.verdict == MOVED]
    nothing = [truth[e.axis.name] < 0.005 for e in listed if e.verdict == NOTHING]
    found |= {"moved is so": float(np.mean(moved))} if moved else {}
    found |= {"nothing is so": float(np.mean(nothing))} if nothing else {}
    steep = [cliff for cliff in first.cliffs if cliff.axis == 0]
    if steep:
        low, high = (AXES[0].value(p) for p in steep[0].interval)
        at = AXES[0].value(steep[0].at)
        found["cliff in interval"] = float(low <= 10**world.cliff <= high)
        found["cliff within 1.5"] = float(1 / 1.5 <= at / 10**world.cliff <= 1.5)
    if world.kind == "cliff":
        found["cliff found"] = float(bool(steep))
    if world.kind == "interaction" and np.ptp(world.pair) > 0.02:
        assert first.pair is not None
        found["pair found"] = float({a.name for a in first.pair.axes} == {"beta2", "augmentation"})
    return found


def _inside(world: World, first: Answer) -> float:
    assert first.use is not None
    if first.use.gain is None:
        return float("nan")
    gain = world.smooth(first.use.cell) - world.smooth(BASELINE)
    return float(first.use.gain.low <= gain <= first.use.gain.high)


def _claims(first: Answer) -> bool:
    shown = first.pair is not None and first.pair.is_shown
    return shown or bool(first.cliffs) or any(e.verdict == MOVED for e in first.effects)


def measured(kind: str, sweeps: int) -> dict[str, tuple[float, int]]:
    """Mean of each measure, and over how many sweeps it is one."""
    found: dict[str, list[float]] = defaultdict(list)
    for seed in range(sweeps):
        for name, value in measure(World(kind, seed)).items():
            if not np.isnan(value):
                found[name].append(value)
        if sys.stderr.isatty() or seed % 10 == 9:
            print(f"{kind}: {seed + 1} of {sweeps}", file=sys.stderr, flush=True)
    return {name: (float(np.mean(values)), len(values)) for name, values in found.items()}


@pytest.mark.calibration
@pytest.mark.timeout(0)
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_sweep_answers_is_so(kind, capsys):
    """Bands hold the truth as often as they say; the largest factor is named first; what is handed
    out after confirmation loses less than the best observed; nothing is claimed of nothing."""
    with capsys.disabled():
        found = measured(kind, SWEEPS)
        print(f"\n{kind}, {SWEEPS} sweeps of {KINDS[kind]} cells and seeds")
        for name, (value, count) in sorted(found.items()):
            print(f"  {name}: {value:.3f} ({count})")
    mean = {name: value for name, (value, _) in found.items()}
    error = 1.0 / np.sqrt(SWEEPS)  # twice the standard error of a share, at most
    if kind == "null":
        assert mean["claims"] <= 0.05 + error / 2
        return
    assert mean["regret confirmed"] <= 0.6 * mean["regret observed"]
    for band in ("band of lr", "band of others"):
        assert 0.85 - error / 2 <= mean[band] <= 0.95 + error / 2
    assert mean["gain covered"] >= 0.9 - error / 2
    assert mean["moved is so"] >= 0.95 - error / 2
    assert mean["nothing is so"] >= 0.95 - error / 2
    # No answer can know more than one that is told everything but what is asked.
    assert mean["largest first"] >= min(0.8, mean["largest first, all else known"]) - error / 2
    if kind == "cliff":
        assert mean["cliff within 1.5"] >= 0.9 - error / 2


if __name__ == "__main__":
    for name in sys.argv[1:] or KINDS:
        for what, (value, count) in sorted(measured(name, SWEEPS).items()):
            print(f"{name}  {what}: {value:.3f} ({count})", flush=True)
