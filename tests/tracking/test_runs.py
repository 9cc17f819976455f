"""What a run should show is a function of what is known: no MLflow is asked."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic import study_of

from ablate.analysis.results import Result
from ablate.study import design
from ablate.tracking.mlflow import runs
from ablate.tracking.mlflow.curves import Curves, curves_of, spread_of
from ablate.tracking.mlflow.measures import Measures
from ablate.trial.identity import Trial


def ended(number: int, score: float | None) -> runs.Ended:
    result = Result(levels=(), seed=number, outcome="completed", value=score)
    return runs.Ended(result, float(number), score)


@pytest.fixture(scope="module")
def measures(tmp_path_factory: pytest.TempPathFactory) -> Measures:
    return Measures(study_of(tmp_path_factory.mktemp("study")))


@given(st.lists(st.none() | st.floats(-1e3, 1e3), min_size=1, max_size=6), st.integers(0, 6))
def test_a_mean_is_told_once_for_each_number_of_seeds(
    measures: Measures, scores: list[float | None], known: int
) -> None:
    """Whatever was told before, what is told now are the means over the first k seeds that follow,
    in per cent and each later than the one before: told in pieces or at once, the same points
    stand there, and the last is what a reader sees."""
    counted = [ended(number, score) for number, score in enumerate(scores)]
    metrics = runs.cell_numbers(counted, known=known, measures=measures)
    told = {m.timestamp: m.value for m in metrics if m.key == "score_pct"}
    expected = []
    for number in range(known + 1, len(scores) + 1):
        seen = [100 * score for score in scores[:number] if score is not None]
        if seen:
            expected.append(pytest.approx(fmean(seen), rel=1e-3, abs=1e-9))
    assert [told[when] for when in sorted(told)] == expected
    assert {m.step for m in metrics} <= {0}


def test_a_row_is_told_under_few_keys(measures: Measures) -> None:
    """Of what a real step and a real evaluation measure at most 25 keys are told, in named
    sections: the worst of many modules in place of all of them, shares in per cent, infinity as no
    number, nothing that stands still."""
    step = {
        "step": 7, "attempt": 1, "time": 3.0, "epoch": 0.5, "samples": 448, "lr": 1e-3,
        "loss": math.inf, "grad_norm": 2.0, "grad_norm/visual": 1.0, "logit_scale": 14.0,
        "in_batch_accuracy": 0.25, "image_feature_std": 0.1, "text_feature_std": 0.05,
        "update_ratio/visual": 0.01, "update_ratio/text": 0.03, "rms/visual.conv1.weight": 1.0,
        "step_time_s": 2.0, "data_time_s": 0.5, "samples_per_s": 32.0, "data_faults": 0,
        "alignment": 1.2,
    }  # fmt: skip
    evaluation = {
        "step": 7, "attempt": 1, "time": 4.0, "epoch": 1, "imagenet_top1": 0.2,
        "imagenet_top5": 0.4, "recalibrated_top1": 0.21, "bn_drift_max": 0.3, "bn_gap": 0.1,
        "attention_logits/a": 4.0, "attention_logits/b": 9.0, "eval_images": 100,
        "knn_top1/faces": 0.5,
    }  # fmt: skip
    told = measures.of_step(step)
    assert math.isnan(told.pop("train/loss"))
    assert told == {
        "train/epoch": 0.5, "train/lr": 1e-3, "train/grad_norm": 2.0, "train/logit_scale": 14.0,
        "train/in_batch_accuracy_pct": 25.0, "stability/feature_std": 0.05,
        "stability/update_ratio_max": 0.03, "system/samples_per_s": 32.0,
        "system/data_wait_percentage": 25.0,
    }  # fmt: skip
    machine = {"step": 7, "time": 3.0, "system/gpu_0_utilization_percentage": 93.0}
    assert measures.of_machine(machine) == {"system/gpu_0_utilization_percentage": 93.0}
    assert measures.of_evaluation(evaluation) == {
        "eval/imagenet_top1_pct": 20.0, "eval/imagenet_top5_pct": 40.0,
        "eval/recalibrated_top1_pct": 21.0, "eval/knn_top1/faces_pct": 50.0,
        "stability/bn_drift_max": 0.3, "stability/attention_logit_max": 9.0,
    }  # fmt: skip


def test_of_many_cards_the_worst_is_told(measures: Measures) -> None:
    """A page draws a chart of every key: eight cards take no more of them than one."""
    known = {"utilization_percentage": 97.0, "temperature_celsius": 60.0}
    row = {f"system/gpu_{card}_{key}": v for card in range(8) for key, v in known.items()}
    row |= {"system/gpu_3_utilization_percentage": 12.0, "system/gpu_5_temperature_celsius": 91.0}
    row |= {"system/cpu_utilization_percentage": 40.0, "step": 7}
    assert measures.of_machine(row) == {
        "system/gpu_utilization_percentage": 12.0,
        "system/gpu_temperature_celsius": 91.0,
        "system/cpu_utilization_percentage": 40.0,
    }
    one = {f"system/gpu_2_{key}": value for key, value in known.items()}
    assert measures.of_machine(one) == one


def test_a_setting_has_the_mean_and_the_edges_of_its_seeds(measures: Measures) -> None:
    """At steps that every seed reached: the mean under the trials' own key, lowest and highest
    beside it; nothing at a step that one of them did not reach, or where one is not finite."""

    def seed(*losses: float) -> Curves:
        rows = [{"step": i, "time": float(i), "loss": x} for i, x in enumerate(losses, start=1)]
        return curves_of(rows, [], measures)

    points = spread_of([seed(4.0, 2.0, 1.0), seed(2.0, math.nan, 3.0), seed(3.0, 2.0, 2.0, 1.0)],
                       measures)  # fmt: skip
    told = {(p.key, p.step): p.value for p in points}
    assert told == {
        ("train/loss", 1): 3.0, ("train/loss_low", 1): 2.0, ("train/loss_high", 1): 4.0,
        ("train/loss", 3): 2.0, ("train/loss_low", 3): 1.0, ("train/loss_high", 3): 3.0,
    }  # fmt: skip
    alone = spread_of([seed(4.0)], measures)
    assert [(p.key, p.value) for p in alone] == [("train/loss", 4.0)]


def test_seeds_of_tuning_come_after_the_studys_own(tmp_path: Path) -> None:
    """A nuisance setting is chosen on seeds that are not the study's: they are ordered all the
    same, behind them."""
    study = study_of(tmp_path)
    first = design.propose(study)[0]

    def trial(seed: int) -> Trial:
        return replace(first, id=f"{seed:012x}", seed=seed)

    own = list(study.seeds)
    strange = max(own) + 1000
    ordered = runs.in_order_of_seeds(study, [trial(seed) for seed in (strange, *reversed(own))])
    assert [found.seed for found in ordered] == [*own, strange]
