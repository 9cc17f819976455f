"""What every marker must keep: planted events found once, silence otherwise, no memory lost."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from marker_traces import (
    LONG,
    clip_loss,
    healthy_evaluations,
    judged,
    noise,
    rows_of,
    told,
    whole_rows,
)

import ablate.markers
from ablate.markers import RULES, Context, Monitor, judge, settle
from ablate.markers.event import Row
from ablate.markers.rules.loss_spike import LossSpike
from ablate.records.files import dumps, loads
from ablate.testing import MarkerContract, Trace
from ablate.trial import metrics

MARKER_NAMES = (
    "non_finite loss_spike spike_score rms_spike grad_norm_spike divergence update_ratio "
    "attention_logits logit_drift logit_scale scaler_skips batch_norm feature_collapse "
    "dead_gradient accuracy_collapse data_faults prototype_collapse resume_jump"
).split()

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Plant:
    """Something done to a healthy run from row ``at`` on, and the event that must tell of it."""

    marker: str
    kind: str
    do: Callable[[Rows, Rows, int], None]
    lag: int
    verdict: str = "STABLE"
    early: int = 0
    """How many steps before the plant the event may begin."""


def from_row(name: str, value: float, *, rows: int | None = None) -> Callable[..., None]:
    def do(trace: Rows, evaluations: Rows, at: int) -> None:
        for row in trace[at : at + rows if rows else None]:
            row[name] = value

    return do


def raise_loss(nats: float) -> Callable[..., None]:
    def do(trace: Rows, evaluations: Rows, at: int) -> None:
        for place, row in enumerate(trace[at:]):
            row["loss"] += nats * min(1.0, place / 300.0)

    return do


def decaying_loss(trace: Rows, evaluations: Rows, at: int) -> None:
    for place, row in enumerate(trace[at : at + 60]):
        row["loss"] += 0.8 * math.exp(-place / 10.0)


def double_norm(trace: Rows, evaluations: Rows, at: int) -> None:
    for row in (trace[at], trace[at + 2]):
        row["grad_norm"] *= 10.0
        row["grad_norm/text"] *= 10.0


def lonely_norms(trace: Rows, evaluations: Rows, at: int) -> None:
    for row in trace[at::100]:
        row["grad_norm"] *= 4.0


def chance_loss(trace: Rows, evaluations: Rows, at: int) -> None:
    for row in trace[at:]:
        row["loss"] = math.log(1024) + 0.002 * math.sin(row["step"])


def drifting_logits(trace: Rows, evaluations: Rows, at: int) -> None:
    for row in trace:
        row["loss"] = 4.0 + 0.06 * math.sin(1.7 * row["step"])
    for place, row in enumerate(trace[at:]):
        row["logits_lse"] += 0.01 * place


def skip_steps(trace: Rows, evaluations: Rows, at: int) -> None:
    for place, row in enumerate(trace[at : at + 25], start=1):
        row["skipped_steps"] += place
    for row in trace[at + 25 :]:
        row["skipped_steps"] += 25


def skip_often(trace: Rows, evaluations: Rows, at: int) -> None:
    for place, row in enumerate(trace[at:], start=1):
        row["skipped_steps"] += place // 50


def zero_gradient(trace: Rows, evaluations: Rows, at: int) -> None:
    for row in trace[at:]:
        row["zero_grad_steps/visual.conv1.weight"] = row["step"] - at


def worse_data(trace: Rows, evaluations: Rows, at: int) -> None:
    for row in trace[at:]:
        row["data_faults"] = row["samples"] * 0.006


def broken_off(**values: float) -> Callable[..., None]:
    """An interruption whose first step measures `values` times what it usually does."""

    def do(trace: Rows, evaluations: Rows, at: int) -> None:
        trace[at] |= {"interrupted": 1.0, "resume_lr_ratio": values.get("lr", 1.0)}
        trace[at]["update_norm"] *= values.get("update", 1.0)
        trace[at]["update_turn"] *= values.get("turn", 1.0)

    return do


def at_evaluations(**values: float) -> Callable[..., None]:
    def do(trace: Rows, evaluations: Rows, at: int) -> None:
        for row in evaluations:
            if row["step"] > at:
                row.update(values)

    return do


PLANTS = {
    "one NaN loss": Plant("non_finite", "row", from_row("loss", math.nan, rows=1), 0, "SPIKY"),
    "NaN loss": Plant("non_finite", "row", from_row("loss", math.nan), 2, "NUMERIC_FAIL"),
    "infinite norm": Plant(
        "non_finite", "row", from_row("grad_norm", math.inf, rows=500), 2, "NUMERIC_FAIL"
    ),
    "NaN parameters": Plant(
        "non_finite", "parameters", at_evaluations(params_non_finite=3), 250, "NUMERIC_FAIL"
    ),
    "spike": Plant("loss_spike", "spike", decaying_loss, 10, "SPIKY"),
    "lonely outliers": Plant("spike_score", "rate", lonely_norms, 400),
    "stale moment": Plant("rms_spike", "spike", from_row("rms/conv1", 5.0, rows=1), 0),
    "norm": Plant("grad_norm_spike", "spike", double_norm, 2),
    "one norm": Plant("grad_norm_spike", "row", from_row("grad_norm", 45.0, rows=1), 0),
    "rise": Plant("divergence", "rise", raise_loss(1.5), 1100, "DIVERGED"),
    "chance": Plant("divergence", "chance", chance_loss, 900, "DIVERGED"),
    "large updates": Plant("update_ratio", "high", from_row("update_ratio/visual", 0.2), 2),
    "small updates": Plant("update_ratio", "low", from_row("update_ratio/visual", 1e-9), 2),
    "epsilon": Plant("update_ratio", "eps", from_row("eps_share", 0.8), 2),
    "attention": Plant("attention_logits", "growth", from_row("attention_logits/text0", 101.0), 0),
    "drift": Plant("logit_drift", "drift", drifting_logits, 1300),
    "saturation": Plant("logit_scale", "saturated", from_row("logit_scale", 100.0), 500),
    "low temperature": Plant("logit_scale", "fallen", from_row("logit_scale", 2.0), 0),
    "jump": Plant("logit_scale", "jump", from_row("logit_scale", 60.0), 0),
    "skips in a row": Plant("scaler_skips", "streak", skip_steps, 20, "NUMERIC_FAIL"),
    "rate of skips": Plant("scaler_skips", "rate", skip_often, 1000),
    "scale": Plant("scaler_skips", "scale", from_row("scaler_scale", 0.01), 0, "NUMERIC_FAIL"),
    "broken BatchNorm": Plant(
        "batch_norm", "non_finite", at_evaluations(bn_non_finite=2), 250, "NUMERIC_FAIL"
    ),
    "BatchNorm gap": Plant("batch_norm", "drift", at_evaluations(bn_gap=0.2), 250),
    "BatchNorm drift": Plant("batch_norm", "drift", at_evaluations(bn_drift_median=0.5), 250),
    "narrow features": Plant(
        "feature_collapse", "feature_std", from_row("text_feature_std", 1e-4), 200, "COLLAPSED"
    ),
    "few dimensions": Plant(
        "feature_collapse", "feature_rank", from_row("image_feature_rank", 5.0), 1, "COLLAPSED"
    ),
    "dead parameter": Plant("dead_gradient", "zero", zero_gradient, 50),
    "accuracy": Plant(
        "accuracy_collapse", "drop", at_evaluations(imagenet_top1=0.01), 250, "DEGRADED"
    ),
    "accuracy at chance": Plant(
        "accuracy_collapse", "drop", at_evaluations(imagenet_top1=0.0012), 500, "DIVERGED"
    ),
    "one prototype": Plant(
        "prototype_collapse", "single", from_row("prototypes_used", 1.0), 100, "COLLAPSED"
    ),
    "one point": Plant(
        "prototype_collapse", "narrow", from_row("projection_spread", 0.05), 100, "COLLAPSED"
    ),
    "no moments": Plant("resume_jump", "update", broken_off(update=2.9), 0),
    "no momentum": Plant("resume_jump", "update", broken_off(update=0.4), 0),
    "moments of another": Plant("resume_jump", "direction", broken_off(turn=0.05), 0),
    "schedule anew": Plant("resume_jump", "schedule", broken_off(lr=10.0), 0),
    "bad samples": Plant("data_faults", "rate", worse_data, 1),
}


def busy_run(seed: int, *names: str, steps: int = 600) -> tuple[Rows, Rows, Context]:
    """A short run with several plants, and its context."""
    rng = np.random.default_rng(seed)
    rows, evaluations = whole_rows(rng, steps, ar=0.5), healthy_evaluations(steps, 100)
    for place, name in enumerate(names):
        PLANTS[name].do(rows, evaluations, 150 + 60 * place)
    context = Context(
        global_batch=1024,
        warmup=20,
        steps_total=steps,
        accuracy="imagenet_top1",
        chance_top1=0.001,
        feature_dim=1024,
    )
    return rows, evaluations, context


def test_all_markers_have_the_names_that_studies_and_reports_use() -> None:
    """These eighteen markers are there, each once, whatever others there are."""
    names = [rule.name for rule in RULES]
    assert set(MARKER_NAMES) <= set(names) and names == sorted(set(names))


def test_every_input_is_defined_where_the_trainer_looks() -> None:
    """The package's docstring, or the table of measurements, defines each name a rule reads."""
    text = ablate.markers.__doc__ or ""
    for rule in RULES:
        for name in rule.reads:
            described = rule.name not in MARKER_NAMES and metrics.describe(name) is not None
            assert described or f"``{name}" in text, (rule, name)


class OfThePlants(MarkerContract):
    """A marker, and the first plant that it must tell."""

    def healthy(self) -> Trace:
        rng = np.random.default_rng(0)
        return Trace(whole_rows(rng, 2600), healthy_evaluations(2600), LONG)

    def ill(self) -> Trace:
        plant = next(plant for plant in PLANTS.values() if plant.marker == self.marker.name)
        trace = self.healthy()
        plant.do(list(trace.rows), list(trace.evaluations), 1000)
        return trace


for each in (rule for rule in RULES if rule.name in MARKER_NAMES):
    globals()[f"Test{each.__name__}"] = type(
        f"Test{each.__name__}", (OfThePlants,), {"marker": each}
    )


@pytest.mark.parametrize("name", PLANTS)
def test_a_planted_event_is_found_once_and_in_time(name: str) -> None:
    """A planted event is told by its marker exactly once, where it began, within the lag."""
    plant = PLANTS[name]
    for seed in range(2):
        rng = np.random.default_rng(seed)
        steps = 2600
        at = int(rng.integers(900, 1200))
        rows, evaluations = whole_rows(rng, steps), healthy_evaluations(steps)
        plant.do(rows, evaluations, at)
        judgement = judged(rows, evaluations)
        found = told(judgement, plant.marker, plant.kind)
        if plant.kind.startswith("feature_"):
            found = told(judgement, plant.marker)
        assert len(found) == 1, (name, judgement.events)
        event = found[0]
        assert event.verdict == plant.verdict
        first = at + 1
        assert event.first_step >= first - plant.early, (name, first, event)
        assert event.detected_at <= first + plant.lag, (name, first, event)
        assert event.message and event.evidence["quantity"]
        stops = plant.verdict in ("NUMERIC_FAIL", "DIVERGED")
        assert (judgement.verdict.stop is not None) == stops


def test_a_healthy_run_has_no_event() -> None:
    """Without a plant the same rows are STABLE and silent."""
    for seed in range(3):
        rng = np.random.default_rng(seed)
        judgement = judged(whole_rows(rng, 2600), healthy_evaluations(2600))
        assert judgement.events == []
        assert judgement.verdict.name == "STABLE"
        assert not set(judgement.verdict.silent) & set(MARKER_NAMES)


KINDS = [
    ({"ar": 0.5}, 1.0),
    pytest.param({"heavy": True}, 2.0, marks=pytest.mark.exhaustive),
]


@pytest.mark.exhaustive
@pytest.mark.parametrize(("kind", "allowed"), KINDS)
def test_false_alarms_are_rare(kind: dict[str, Any], allowed: float) -> None:
    """Autocorrelated clean traces: at most 1 event of a marker per 10 000 steps; heavy tails 2."""
    steps, runs = 5000, 16
    counts: Counter[str] = Counter()
    for seed in range(runs):
        rows = whole_rows(np.random.default_rng(seed), steps, **kind)
        counts.update(item.marker for item in judged(rows).events)
    per_10k = {name: count / (steps * runs) * 1e4 for name, count in counts.items()}
    assert all(rate <= allowed for rate in per_10k.values()), per_10k


@pytest.mark.exhaustive
@pytest.mark.parametrize(("kind", "allowed"), KINDS)
def test_false_spikes_are_rare_over_many_traces(kind: dict[str, Any], allowed: float) -> None:
    """200 clean losses: at most 1 (heavy tails 2) loss spike per 10 000 steps."""
    spikes = 0
    for seed in range(200):
        rng = np.random.default_rng(1000 + seed)
        loss = clip_loss(rng, 2000, **kind)
        rule = LossSpike()
        rule.start(LONG)
        found = [
            item.key
            for step, value in enumerate(loss, start=1)
            for item in rule.update(Row(step, {"loss": value}))
        ]
        spikes += len(set(found))
    assert spikes / 40.0 <= allowed, spikes


def test_a_constant_trace_is_silent() -> None:
    """Rows that never change, as of a run that does not move, raise no statistical alarm."""
    row = whole_rows(np.random.default_rng(0), 1)[0] | {"loss": 3.3333333, "lr": 1e-3}
    row |= {"update_ratio/visual": 1e-3}
    row |= {"logit_scale": 100.0 / 7.0, "data_faults": 0, "skipped_steps": 0}
    rows = [row | {"step": step} for step in range(1, 2001)]
    assert judged(rows).events == []


def test_a_row_without_measurements_is_no_news() -> None:
    """Rows with nothing but a step are taken, and the judgement says that all were silent."""
    judgement = judged([{"step": step} for step in range(1, 300)], [{"step": 100}])
    assert judgement.events == []
    assert set(judgement.verdict.silent) == set(judgement.missing) == {rule.name for rule in RULES}


@pytest.mark.parametrize("slope", [-0.3, 0.0, 0.15])
def test_an_epoch_sawtooth_is_silent(slope: float) -> None:
    """A loss that drops at each epoch's border, and falls, rests or rises in between, is healthy.

    So it is in training that repeats its data: from the second epoch on every sample was seen.
    """
    for seed in range(6):
        rng = np.random.default_rng(seed)
        epoch = 700
        step = np.arange(5 * epoch)
        inside = (step % epoch) / epoch
        loss = 5.0 - 0.6 * (step // epoch) + slope * inside + 0.06 * noise(rng, len(step))
        norm = 3.0 - 0.3 * (step // epoch) + 0.3 * noise(rng, len(step))
        context = Context(global_batch=1024, warmup=100, steps_total=len(step))
        assert judged(rows_of(loss=loss, grad_norm=norm), context=context).events == []


def test_a_gradient_norm_that_drifts_is_silent() -> None:
    """A norm that doubles over 500 steps is no spike."""
    rng = np.random.default_rng(0)
    norm = 3.0 * (1.0 + np.clip((np.arange(2500) - 1000) / 500.0, 0.0, 1.0))
    norm *= 1.0 + 0.1 * noise(rng, 2500, ar=0.5)
    assert told(judged(rows_of(grad_norm=norm)), "grad_norm_spike") == []


@settings(max_examples=20)
@given(scale=st.floats(1e-3, 1e3), shift=st.floats(-100.0, 100.0))
def test_units_of_the_loss_do_not_matter_to_spikes(scale: float, shift: float) -> None:
    """An affine rescaling of the loss changes neither loss_spike nor spike_score."""
    rng = np.random.default_rng(7)
    loss = clip_loss(rng, 1500, heavy=True)
    for at in (500, 900, 1200):
        loss[at : at + 6] += 1.2
    norm = 3.0 + 0.3 * noise(rng, 1500)

    def spikes(values: np.ndarray) -> list[tuple[str, int, int]]:
        events = judged(rows_of(loss=values, grad_norm=norm)).events
        wanted = ("loss_spike", "spike_score")
        return [(e.marker, e.first_step, e.last_step) for e in events if e.marker in wanted]

    plain = spikes(loss)
    assert len(plain) >= 4
    assert spikes(scale * loss + shift) == plain


BUSY = [
    ("spike", "norm", "stale moment", "accuracy", "BatchNorm gap"),
    ("one NaN loss", "spike", "narrow features", "chance", "dead parameter"),
    ("jump", "skips in a row", "few dimensions", "rise", "bad samples"),
    ("attention", "lonely outliers", "small updates", "drift", "NaN loss"),
]


def fed(monitor: Monitor, rows: Rows, evaluations: Rows) -> None:
    """Rows and evaluations in the order in which a worker has them."""
    at = {row["step"]: row for row in evaluations}
    for row in rows:
        monitor.observe(row)
        if row["step"] in at:
            monitor.evaluate(at[row["step"]])


@settings(max_examples=12)
@given(names=st.sampled_from(BUSY), cuts=st.lists(st.integers(0, 600), min_size=1, max_size=3))
def test_a_cut_and_resumed_run_is_judged_like_an_uncut_one(
    names: tuple[str, ...], cuts: list[int]
) -> None:
    """State written as strict JSON at any step and loaded elsewhere changes nothing."""
    rows, evaluations, context = busy_run(3, *names)
    whole = Monitor(context=context)
    fed(whole, rows, evaluations)
    whole.finish()
    monitor = Monitor(context=context)
    for begin, end in zip([0, *sorted(cuts)], [*sorted(cuts), len(rows)], strict=True):
        state = json.loads(json.dumps(monitor.state(), allow_nan=False))
        monitor = Monitor(context=context)
        monitor.load_state(state)
        fed(monitor, rows[begin:end], evaluations)
    monitor.finish()
    assert monitor.events == whole.events
    assert monitor.verdict() == whole.verdict()
    assert len(whole.events) >= 4


@pytest.mark.parametrize("names", BUSY)
def test_what_is_said_live_is_said_again_by_replay(names: tuple[str, ...]) -> None:
    """Events told while the rows came in, last tellings kept, are those of the recorded trace."""
    rows, evaluations, context = busy_run(4, *names)
    monitor = Monitor(context=context)
    lines: list[dict[str, Any]] = []
    at = {row["step"]: row for row in evaluations}
    for row in rows:
        lines += [item.to_dict() for item in monitor.observe(row)]
        if row["step"] in at:
            lines += [item.to_dict() for item in monitor.evaluate(at[row["step"]])]
    lines += [item.to_dict() for item in monitor.finish()]
    kept = {ablate.markers.event_key(line): line for line in lines}
    recorded = [loads(dumps(row)) for row in rows]
    judgement = judge(recorded, [loads(dumps(row)) for row in evaluations], context=context)
    assert {item.key: item.to_dict() for item in judgement.events} == kept
    assert judgement.verdict == monitor.verdict()
    assert json.loads(json.dumps(judgement.to_dict(), allow_nan=False)) == judgement.to_dict()


def test_state_of_another_run_is_refused() -> None:
    """State that was written for other windows is not taken silently."""
    state = Monitor(context=Context(steps_total=300)).state()
    with pytest.raises(ValueError, match="context"):
        Monitor(context=Context(steps_total=5000)).load_state(state)


def test_steps_that_a_later_attempt_replayed_are_void() -> None:
    """From the first row of an attempt on, earlier attempts do not count, to their very end."""
    first = [{"step": step, "attempt": 1, "loss": 1.0} for step in range(1, 701)]
    second = [{"step": step, "attempt": 2, "loss": 2.0} for step in range(501, 601)]
    evals = [{"step": 500, "attempt": 1}, {"step": 700, "attempt": 1}]
    rows, evaluations = settle([*second, *first], evals)
    assert [row["step"] for row in rows] == list(range(1, 601))
    assert all(row["attempt"] == (1 if row["step"] <= 500 else 2) for row in rows)
    assert [row["step"] for row in evaluations] == [500]


def test_a_spike_of_a_voided_attempt_is_not_reported() -> None:
    """What happened before a crash and was replayed without it did not happen."""
    rng = np.random.default_rng(0)
    rows = [row | {"attempt": 1} for row in whole_rows(rng, 1500)]
    void = [dict(row) for row in rows[1000:1300]]
    for row in void[100:120]:
        row["loss"] += 3.0
    again = [row | {"attempt": 2} for row in rows[1000:]]
    assert judged([*rows[:1000], *void, *again]).events == []


def test_a_stale_second_moment_announces_the_spike_that_follows() -> None:
    """A loss spike 1 to 8 steps after an RMS spike is linked to it; 9 steps after, it is not."""
    for lead, linked in ((1, True), (8, True), (9, False)):
        rows = whole_rows(np.random.default_rng(1), 1500)
        rows[1000 - lead]["rms/conv1"] = 6.0
        decaying_loss(rows, [], 1000)
        judgement = judged(rows)
        (spike,) = told(judgement, "loss_spike")
        expected = {"tensor": "conv1", "steps_before": lead} if linked else None
        assert spike.evidence.get("predicted_by") == expected
        assert ("PREDICTED" in judgement.verdict.flags) == linked


def test_features_that_are_one_point_are_told_before_those_that_follow() -> None:
    """Images that are all alike from the first step on, which the text features then follow."""
    steps = 400
    rows = rows_of(
        loss=np.full(steps, 6.0) + 0.1 * noise(np.random.default_rng(0), steps),
        image_feature_std=np.zeros(steps),
        text_feature_std=np.where(np.arange(steps) < 12, 0.03, 5e-4),
    )
    context = Context(global_batch=1024, warmup=20, steps_total=steps, feature_dim=1024)
    first, second = told(judged(rows, context=context), "feature_collapse")
    assert first.evidence["quantity"] == "image_feature_std" and first.first_step == 1
    assert second.evidence["quantity"] == "text_feature_std"


def test_a_temperature_that_fell_before_the_warm_up_ended_is_told_so() -> None:
    """It has been no higher since, so no number is named that it fell from."""
    scale = np.maximum(14.0 * 0.8 ** np.arange(300.0), 1.0)
    context = Context(global_batch=128, warmup=18, steps_total=300)
    (found,) = [
        event
        for event in told(judged(rows_of(logit_scale=scale), context=context), "logit_scale")
        if event.evidence["kind"] == "fallen"
    ]
    assert found.message.startswith("the temperature fell to 1 during the warm-up: logits")


@pytest.mark.parametrize("grows", [False, True])
def test_a_falling_temperature_is_no_drift_of_logits(grows: bool) -> None:
    """Logits that say nothing stay as they are while their temperature falls by a half: silent,
    although the logsumexp over the temperature rises. Where the logits do grow, they are told."""
    rng = np.random.default_rng(0)
    rows = []
    for step in range(1, 3001):
        scale = 14.0 * 0.5 ** max(0.0, (step - 1200) / 1800)
        cosine = 0.1 + (2e-4 * max(0, step - 1200) if grows else 0.0)
        lse = math.log(1024) + scale * cosine + rng.normal(0, 0.002)
        loss = math.log(1024) + rng.normal(0, 0.02)
        rows.append({"step": step, "loss": loss, "logits_lse": lse, "logit_scale": scale})
    context = Context(global_batch=1024, steps_total=3000)
    judgement = judge(rows, [], thresholds=None, context=context)
    assert bool(told(judgement, "logit_drift", "drift")) == grows
