"""Non-finite numbers are findings of their own and blind no other marker.

Two published detectors lose their sight after one NaN; both are replayed here beside ours.
"""

from __future__ import annotations

import math
from collections import deque

import numpy as np
import pytest
from marker_traces import LONG, judged, noise, rows_of, told, whole_rows

from ablate.markers import Context, Monitor


class WindowWithNaN:
    """The rule of OLMo-core's stability monitor and skip-step optimizer: NaN enters the window.

    A step is a spike when its value is more than 6 deviations above the mean of the last 128,
    and it is skipped unless it is at most that much above. Both compare with NaN.
    """

    def __init__(self) -> None:
        self.window: deque[float] = deque(maxlen=128)

    def step(self, value: float) -> tuple[bool, bool]:
        """(is a spike, would be skipped)."""
        held = np.array(self.window)
        spike = skipped = False
        if len(held) == 128:
            limit = held.mean() + 6.0 * held.std()
            spike, skipped = bool(value > limit), not value <= limit
        self.window.append(value)
        return spike, skipped


class WarmUpWithNaN:
    """The rule of ZClip: mean and variance of the norm begin with those of the first 25."""

    def __init__(self) -> None:
        self.early: list[float] = []
        self.mean = self.var = math.nan

    def step(self, norm: float) -> bool:
        if len(self.early) < 25:
            self.early.append(norm)
            self.mean, self.var = float(np.mean(self.early)), float(np.var(self.early))
            return False
        z = (norm - self.mean) / (math.sqrt(self.var) + 1e-6)
        self.mean = 0.97 * self.mean + 0.03 * norm
        self.var = 0.97 * self.var + 0.03 * (norm - self.mean) ** 2
        return z > 2.5


def test_one_nan_in_the_window_hides_no_spike() -> None:
    """A spike within the 128 steps after a NaN loss is found; the published rule misses it."""
    rng = np.random.default_rng(0)
    loss = 2.0 + 0.06 * rng.standard_normal(800)
    loss[300] = math.nan
    loss[350:356] += 2.0
    published = WindowWithNaN()
    answers = [published.step(value) for value in loss]
    assert not any(spike for spike, _ in answers)  # blind
    assert sum(skipped for _, skipped in answers) >= 128  # and would skip every step
    judgement = judged(rows_of(loss=loss, grad_norm=3.0 + 0.2 * noise(rng, 800)))
    (spike,) = told(judgement, "loss_spike")
    assert spike.first_step == 351
    (bad,) = told(judgement, "non_finite")
    assert (bad.first_step, bad.last_step) == (301, 301)


@pytest.mark.parametrize("at", [0, 7, 24])
def test_a_nan_in_the_first_norms_is_forgotten(at: int) -> None:
    """A NaN norm at the very start does not end the judgement of all later norms."""
    rng = np.random.default_rng(0)
    norm = 3.0 + 0.2 * rng.standard_normal(600)
    norm[at] = math.nan
    norm[400:403] *= 10.0
    published = WarmUpWithNaN()
    assert not any([published.step(value) for value in norm])  # blind for ever
    (spike,) = told(judged(rows_of(grad_norm=norm)), "grad_norm_spike")
    assert spike.first_step == 401


@pytest.mark.parametrize("name", ["loss", "grad_norm", "rms/conv1"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_value_does_not_hide_what_comes_five_steps_later(
    name: str, bad: float
) -> None:
    """NaN or infinity at step k: the spike of the same quantity at k + 5 is still told."""
    marker = {"loss": "loss_spike", "grad_norm": "grad_norm_spike", "rms/conv1": "rms_spike"}[name]
    for k in (600, 777, 901):
        rows = whole_rows(np.random.default_rng(k), 1200)
        rows[k - 1][name] = bad
        for row in rows[k + 4 : k + 7]:
            row[name] *= 8.0
        found = told(judged(rows), marker)
        assert [item.first_step for item in found] == [k + 5]


@pytest.mark.parametrize(
    ("steps", "verdict", "stop"),
    [
        ([1], "SPIKY", None),
        ([500], "SPIKY", None),
        ([500, 501], "SPIKY", None),
        ([500, 502, 504], "SPIKY", None),
        ([500, 501, 502], "NUMERIC_FAIL", 502),
        ([1, 2, 3], "NUMERIC_FAIL", 3),
        ([799, 800], "NUMERIC_FAIL", None),
    ],
)
def test_how_many_non_finite_losses_are_fatal(
    steps: list[int], verdict: str, stop: int | None
) -> None:
    """Three in a row end a trial at the third; a trace that ends on one has failed, too."""
    rows = whole_rows(np.random.default_rng(0), 800)
    for step in steps:
        rows[step - 1]["loss"] = math.nan
    judgement = judged(rows)
    assert judgement.verdict.name == verdict
    assert (judgement.verdict.stop.step if judgement.verdict.stop else None) == stop


def test_an_infinite_gradient_that_the_scaler_skipped_is_not_a_failure() -> None:
    """fp16: the scaler sees the infinity, skips and halves; that is scaler_skips' business."""
    rows = whole_rows(np.random.default_rng(0), 800)
    for place, row in enumerate(rows):
        skips = sum(place >= at for at in (100, 300, 301, 302))
        row["skipped_steps"], row["scaler_scale"] = skips, 65536.0 / 2**skips
    for place in (100, 300, 301, 302):
        rows[place]["grad_norm"] = math.inf
    judgement = judged(rows)
    assert told(judgement, "non_finite") == []
    assert judgement.verdict.name == "STABLE"


def test_nan_on_one_rank_shows_in_the_mean_over_ranks() -> None:
    """The loss is the mean over ranks, so one rank's NaN is the row's."""
    ranks = np.array([[2.0, 2.1], [2.0, math.nan]])
    rows = rows_of(loss=ranks.mean(axis=1))
    assert told(judged(rows), "non_finite")[0].first_step == 2


def test_a_threshold_may_keep_a_failing_trial_running() -> None:
    """With stop: false the verdict stands, but the trial is not ended."""
    rows = whole_rows(np.random.default_rng(0), 300)
    for row in rows[100:]:
        row["loss"] = math.nan
    judgement = judged(rows, non_finite={"stop": False})
    assert judgement.verdict.name == "NUMERIC_FAIL"
    assert judgement.verdict.stop is None


def test_collapsed_features_confirm_chance_level_early() -> None:
    """A loss at ln(batch) with collapsed features is called DIVERGED before its time."""
    rng = np.random.default_rng(0)
    context = Context(global_batch=1024, warmup=100, steps_total=5000, feature_dim=1024)

    def stopped(std: float) -> int:
        rows = rows_of(
            loss=np.log(1024) + 0.003 * rng.standard_normal(1500),
            image_feature_std=np.full(1500, std),
        )
        stop = judged(rows, context=context).verdict.stop
        assert stop is not None and stop.marker == "divergence"
        return stop.step

    assert stopped(1e-4) < stopped(0.03) - 200


def test_rows_after_a_stop_are_still_read_offline() -> None:
    """A run that nobody ended is judged to its end, and `stop` says where it should have been."""
    rows = whole_rows(np.random.default_rng(0), 1200)
    for row in rows[400:410]:
        row["loss"] = math.nan
    for row in rows[900:906]:
        row["loss"] += 2.0
    judgement = judged(rows, context=LONG)
    assert judgement.verdict.stop is not None and judgement.verdict.stop.step == 403
    assert [item.first_step for item in told(judgement, "loss_spike")] == [901]


def test_the_first_stop_is_the_one_that_counts() -> None:
    """A monitor keeps the step and marker at which it first asked for the end."""
    monitor = Monitor()
    for step in range(1, 10):
        monitor.observe({"step": step, "loss": math.nan, "bn_non_finite": 1 if step > 5 else 0})
    assert monitor.stop is not None
    assert (monitor.stop.step, monitor.stop.marker) == (3, "non_finite")
