"""Markers of the loss against planted events."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import pytest
from marker_traces import LONG, clip_loss, descent, judged, noise, rows_of, told

from ablate.markers import Context

QUICKSTART = Context(
    global_batch=128, warmup=50, steps_total=276, chance_top1=1 / 617, feature_dim=128
)


def decaying_spike(steps: int, at: int, height: float) -> np.ndarray:
    bump = np.zeros(steps)
    after = np.arange(steps - at)
    bump[at:] = height * np.exp(-after / 10.0)
    return bump


@pytest.mark.parametrize("sigmas", [8, 12, 20])
def test_a_decaying_spike_is_found_once_where_it_begins(sigmas: int) -> None:
    """A planted spike of 8 deviations or more is one event, which starts at its first step."""
    for seed in range(10):
        rng = np.random.default_rng(seed)
        at = int(rng.integers(600, 2400))
        loss = clip_loss(rng, 3000) + decaying_spike(3000, at, sigmas * 0.06)
        spikes = told(judged(rows_of(loss=loss)), "loss_spike")
        near = [item for item in spikes if abs(item.first_step - (at + 1)) <= 3]
        assert len(near) == 1, (seed, at, spikes)
        assert near[0].detected_at <= at + 12
        assert near[0].evidence["recovered"] is True
        assert near[0].verdict == "SPIKY"


def test_a_step_up_that_stays_is_one_unrecovered_spike() -> None:
    """A loss that steps up for good is one event, and the run is DEGRADED at least."""
    rng = np.random.default_rng(0)
    loss = 2.0 + 0.06 * rng.standard_normal(3000)
    loss[1500:] += 0.45
    spikes = told(judged(rows_of(loss=loss)), "loss_spike")
    assert [item.first_step for item in spikes] == [1501]
    assert spikes[0].evidence["recovered"] is False
    assert spikes[0].verdict == "DEGRADED"


def test_a_slow_rise_is_divergence_and_no_spike() -> None:
    """A rise of 0.6 nat over 1000 steps is caught by its level, not as a spike."""
    rng = np.random.default_rng(1)
    loss = clip_loss(rng, 4000)
    loss[2000:] += np.minimum(np.arange(2000) / 1000.0, 1.0) * 0.6
    loss[2000:] += descent(4000)[2000] - descent(4000)[2000:]
    judgement = judged(rows_of(loss=loss))
    assert told(judgement, "loss_spike") == []
    rises = told(judgement, "divergence", "rise")
    assert len(rises) == 1 and 2800 < rises[0].first_step < 3100
    assert judgement.verdict.name == "DIVERGED"
    assert judgement.verdict.stop is not None


def test_a_healthy_plateau_is_not_divergence() -> None:
    """A loss that settles at 0.6 of chance level is stable."""
    rng = np.random.default_rng(2)
    plateau = 0.6 * math.log(1024)
    loss = np.maximum(descent(5000, scale=100.0), plateau) + 0.06 * rng.standard_normal(5000)
    assert judged(rows_of(loss=loss)).verdict.name == "STABLE"


def test_a_loss_that_returns_to_chance_is_divergence() -> None:
    """A run that had learnt and then stays at ln(batch) is stopped as DIVERGED."""
    rng = np.random.default_rng(3)
    loss = clip_loss(rng, 5000)
    loss[2500:] = math.log(1024) + 0.01 * rng.standard_normal(2500)
    judgement = judged(rows_of(loss=loss))
    assert judgement.verdict.name == "DIVERGED"
    assert judgement.verdict.stop is not None and judgement.verdict.stop.step < 3200
    assert len(told(judgement, "divergence", "chance")) == 1


def test_passing_chance_level_on_the_way_down_is_healthy() -> None:
    """Every run crosses ln(batch) once; without warm-up that must not stop it."""
    context = Context(global_batch=128, warmup=1, steps_total=552)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        loss = 0.45 + 4.9 * np.exp(-np.arange(552) / 120.0) + 0.06 * rng.standard_normal(552)
        loss[1] += 0.9
        assert judged(rows_of(loss=loss), context=context).verdict.name == "STABLE"


@pytest.mark.parametrize("warmup", [1, 50])
@pytest.mark.parametrize(("steps", "before"), [(276, None), (299, None), (300, 301), (552, 400)])
def test_a_run_that_collapses_is_stopped_if_it_is_long_enough_to_know(
    warmup: int, steps: int, before: int | None
) -> None:
    """All rows after the eighth are at ln 128: DIVERGED. Below 300 steps that is said at the end
    and stops nothing; from there on the run is stopped after 200 rows or a fifth of it."""
    rng = np.random.default_rng(4)
    loss = math.log(128) + 0.003 * rng.standard_normal(steps)
    loss[:8] = [5.4, 5.0, 5.5, 7.25, 6.5, 5.5, 5.0, 4.9]
    context = Context(global_batch=128, warmup=warmup, steps_total=steps)
    verdict = judged(rows_of(loss=loss), context=context).verdict
    assert verdict.name == "DIVERGED" and "OVERSHOOT" in verdict.flags
    assert (verdict.stop.step if verdict.stop else 0) < (before or 1)
    assert (verdict.stop is None) == (before is None)


@pytest.mark.parametrize("steps", [91, 182, 276, 552])
def test_a_loss_that_rose_for_good_is_divergence_at_any_length(steps: int) -> None:
    """Two nat up from the middle on: DIVERGED; a rise that is gone by the end is not."""
    rng = np.random.default_rng(5)
    loss = 1.0 + 3.0 * np.exp(-np.arange(steps) / 20.0) + 0.03 * rng.standard_normal(steps)
    context = Context(global_batch=128, warmup=10, steps_total=steps)
    back = loss.copy()
    loss[steps // 2 :] += 2.0
    back[steps // 2 : steps // 2 + steps // 10] += 2.0
    assert judged(rows_of(loss=loss), context=context).verdict.name == "DIVERGED"
    assert judged(rows_of(loss=back), context=context).verdict.name != "DIVERGED"


@pytest.mark.parametrize("left_at", [60, 110, 140])
def test_a_late_starter_is_healthy(left_at: int) -> None:
    """182 steps of which the first 60 to 140 are at ln 32, features in their first cone: they
    learn from there on, and nothing is held against them."""
    rng = np.random.default_rng(6)
    step = np.arange(1, 183)
    gone = np.clip(step - left_at, 0, None)
    loss = math.log(32) - 0.9 * (1 - np.exp(-gone / 60.0)) + 0.03 * rng.standard_normal(182)
    std = np.where(step < left_at, 0.06, 0.4) / math.sqrt(32)
    rows = rows_of(loss=loss, image_feature_std=std, text_feature_std=std)
    context = Context(global_batch=32, warmup=20, steps_total=182, feature_dim=32)
    assert judged(rows, context=context).events == []


@pytest.mark.parametrize(("steps", "left_at"), [(384, 300), (900, 600), (8000, 1900)])
def test_a_loss_that_searches_is_given_time(steps: int, left_at: int) -> None:
    """Clips of motion: the loss moves by 0.03 about ln 12 for most of a short run, or for 1,900
    steps of a long one, then falls: healthy. One that never leaves it is DIVERGED in the end, and
    stopped only in the long run, after 2,000 rows; one that moves by 0.003 says nothing at all,
    and is stopped after a fifth."""
    rng = np.random.default_rng(8)
    gone = np.clip(np.arange(steps) - left_at, 0, None)
    searching = math.log(12) + 0.03 * rng.standard_normal(steps)
    context = Context(global_batch=48, warmup=30, steps_total=steps, uniform_loss=math.log(12))

    learns = searching - 0.8 * (1 - np.exp(-gone / 60.0))
    assert judged(rows_of(loss=learns), context=context).verdict.name == "STABLE"
    never = judged(rows_of(loss=searching), context=context).verdict
    assert never.name == "DIVERGED" and "CHANCE_LEVEL" in never.flags
    assert (never.stop is None) if steps < 1000 else (2000 < never.stop.step < 2400)
    silent = math.log(12) + 0.003 * rng.standard_normal(steps)
    stop = judged(rows_of(loss=silent), context=context).verdict.stop
    assert stop is not None and stop.step < max(400, steps // 5)


VITS = sorted((Path(__file__).parent / "assets" / "healthy_vit").glob("*.csv"))


@pytest.mark.parametrize("trace", VITS, ids=lambda path: path.stem)
def test_a_small_transformer_that_learns_is_healthy(trace: Path) -> None:
    """Recorded runs of 91 steps of tiny-test-vit on emoji, whose losses end .07 to .23 nat below
    ln B after a slow start and whose features begin in a cone: no event at all."""
    rows = [
        {k: float(v) for k, v in row.items()}
        for row in csv.DictReader(trace.read_text().splitlines())
    ]
    context = Context(
        global_batch=int(trace.stem.split("-")[1]),
        warmup=9 if "lr-5e-4" in trace.stem else 20,
        steps_total=91,
        feature_dim=32,
    )
    last = [row["loss"] for row in rows[-20:]]
    assert len(rows) == 91 and sum(last) / 20 < (context.chance_loss or 0.0) - 0.06
    judgement = judged(rows, context=context)
    assert judgement.events == [] and judgement.verdict.name == "STABLE"


def test_a_short_healthy_run_is_silent() -> None:
    """Runs of the quickstart's length that learn have no event at all."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        loss = 0.45 + 4.9 * np.exp(-np.arange(276) / 90.0) + 0.06 * rng.standard_normal(276)
        norm = 3.0 + 6.0 * np.exp(-np.arange(276) / 30.0) + 0.4 * rng.standard_normal(276)
        judgement = judged(rows_of(loss=loss, grad_norm=norm), context=QUICKSTART)
        assert judgement.events == []


def test_spike_score_counts_lonely_outliers() -> None:
    """Single outliers of 12 deviations on 0.5 % of the steps warn; on 3 % the run is SPIKY."""
    for share, verdict in ((0.005, "STABLE"), (0.03, "SPIKY")):
        rng = np.random.default_rng(5)
        loss = 2.0 + 0.06 * rng.standard_normal(5000)
        norm = 3.0 + 0.3 * rng.standard_normal(5000)
        norm[200 :: int(1 / share)] += 3.6
        judgement = judged(rows_of(loss=loss, grad_norm=norm), context=LONG)
        assert len({item.first_step for item in told(judgement, "spike_score")}) == 1
        assert "SPIKE_SCORE" in judgement.verdict.flags
        assert judgement.verdict.name == verdict


@pytest.mark.parametrize(("outliers", "found"), [(1, 0), (3, 0), (4, 1)])
def test_a_few_outliers_of_a_short_run_are_no_rate(outliers: int, found: int) -> None:
    """In 276 steps up to three lonely outliers say nothing, the fourth is told."""
    rng = np.random.default_rng(6)
    norm = 3.0 + 0.3 * rng.standard_normal(276)
    norm[[140, 175, 210, 245][:outliers]] += 4.5
    rows = rows_of(loss=2.0 + 0.06 * rng.standard_normal(276), grad_norm=norm)
    assert len(told(judged(rows, context=QUICKSTART), "spike_score")) == found


def test_heavy_tails_give_short_runs_no_rate() -> None:
    """100 healthy runs of 276 steps with heavy-tailed loss and norm: no spike rate in any."""
    for seed in range(100):
        rng = np.random.default_rng(seed)
        loss = 0.45 + 4.9 * np.exp(-np.arange(276) / 90.0) + 0.06 * noise(rng, 276, heavy=True)
        norm = 3.0 + 6.0 * np.exp(-np.arange(276) / 30.0) + 0.4 * noise(rng, 276, heavy=True)
        judgement = judged(rows_of(loss=loss, grad_norm=norm), context=QUICKSTART)
        assert told(judgement, "spike_score") == []


def test_a_short_window_does_not_hide_the_second_hit() -> None:
    """In the window of 32 of a short run, a hit of 10 deviations does not hide one of 4.5."""
    context = Context(global_batch=128, warmup=20, steps_total=160)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        loss = 3.2 + 0.1 * rng.uniform(-1.7, 1.7, 160)
        loss[[100, 103]] = 4.2, 3.65
        (spike,) = told(judged(rows_of(loss=loss), context=context), "loss_spike")
        assert spike.first_step == 101


@pytest.mark.parametrize("per_step", [0.0008, 0.0015])
def test_a_slow_learner_near_chance_is_not_divergence(per_step: float) -> None:
    """A low learning rate leaves ln(batch) slowly; as long as the loss falls it may go on."""
    context = Context(global_batch=128, warmup=10, steps_total=552)
    for seed in range(5):
        rng = np.random.default_rng(seed)
        loss = math.log(128) + 0.04 - per_step * np.arange(552) + 0.01 * rng.standard_normal(552)
        assert judged(rows_of(loss=loss), context=context).verdict.name == "STABLE"


def test_a_run_of_a_few_steps_is_not_condemned() -> None:
    """A smoke test of 16 steps is at chance, with features in a cone, and has done no wrong."""
    rng = np.random.default_rng(0)
    rows = rows_of(
        loss=math.log(16) + 0.3 + 0.01 * rng.standard_normal(16) - 0.3 * np.arange(16) / 8,
        image_feature_std=np.full(16, 1e-3),
    )
    context = Context(global_batch=16, warmup=2, steps_total=16, feature_dim=128)
    assert judged(rows, context=context).verdict.name == "STABLE"
