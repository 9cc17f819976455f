"""The benchmarks run on demand only; here each of their runners runs for a few steps, untimed, so
that what they wrap and call cannot go away unseen."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import small_trials
import test_bench_markers
import test_bench_sweeps
import test_bench_training
from looking import EVERY_STEP, LOOK, UPDATES
from test_bench_scale import controller_cost
from test_launch_latency import ours
from test_mirror_pace import pace


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    os.environ["ABLATE_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    data = small_trials.make_data(tmp_path_factory.mktemp("data") / "shapes")
    shutil.rmtree(data / "val")
    # The peer's top-5 needs five classes.
    names = [f"{name} {number}" for number in range(3) for name in small_trials.CLASSES]
    small_trials.draw_classes(data / "val", names)
    return data


SHORT = small_trials.fields(model="tiny-test-rn", train_num_samples=32)
"""2 epochs of 2 steps, each with its evaluation."""


@pytest.mark.parametrize(
    ("runner", "measured"),
    [
        (test_bench_training._ours, {"train", "eval", "measuring"}),
        (test_bench_training._peer, {"train", "eval"}),
        (test_bench_training._bare, {"train"}),
    ],
)
def test_each_runner_measures_what_the_benchmark_divides(
    tmp_path: Path, shapes: Path, runner: object, measured: set[str]
) -> None:
    """Ours, the peer and the bare loop give their times, none of them nothing."""
    times = test_bench_training._run(runner, tmp_path / "round", shapes, SHORT)  # type: ignore
    assert {name.split()[0] for name in times} == measured
    assert all(seconds > 0 for seconds in times.values())


def test_everything_that_looks_is_timed(
    tmp_path: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of the functions is called in the steps around step 200."""
    small_trials.add_models()
    fields = {**SHORT, "imagenet_val": None, "zeroshot_frequency": 0, "epochs": 200}
    _, costs = test_bench_markers.measure(tmp_path, shapes, monkeypatch, fields, 2, 1)
    assert set(costs) == {name for _, name in (*EVERY_STEP, *UPDATES, LOOK)}
    assert all(seconds > 0 for seconds in costs.values())


def test_the_cost_of_a_study_is_measured(tmp_path: Path) -> None:
    """With the mirror, which is complete in the end."""
    cost = controller_cost(tmp_path, cells=20, gangs=20, seeds=1, mirrored=True)
    assert cost.trials == 20
    assert cost.processor_ms > 0 and cost.wall_ms > 0 and cost.behind_s > 0


@pytest.mark.exhaustive
def test_every_contestant_hands_out_a_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a short sweep each is asked, told and charged for its runs, and the table names it."""
    monkeypatch.setattr(test_bench_sweeps, "RUNS", 11)
    monkeypatch.setattr(test_bench_sweeps, "CONFIRMING", 5)
    rows = [test_bench_sweeps.contest("plain", 0)]
    assert set(rows[0]) == set(test_bench_sweeps.CONTESTANTS)
    assert all(0 <= regret < 20 and 0 <= again < 30 for regret, again in rows[0].values())
    text = test_bench_sweeps.summarize({"plain": rows})
    assert all(name in text for name in test_bench_sweeps.CONTESTANTS)


@pytest.mark.exhaustive
def test_the_pace_of_the_mirror_is_measured(tmp_path: Path) -> None:
    """Two trials of ten rows, all of which arrive."""
    assert pace(tmp_path, "file", num_trials=2, seconds=1) > 0


@pytest.mark.exhaustive
def test_the_launch_of_a_trial_is_measured(tmp_path: Path) -> None:
    """Two trials, one after the other on the same seat."""
    gaps, waits = ours(tmp_path, 2)
    assert len(gaps) == len(waits) == 1
    assert gaps[0] >= waits[0] > 0
