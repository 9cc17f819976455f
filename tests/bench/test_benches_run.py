"""The benchmarks run on demand only; here each of their runners runs for a few steps, untimed, so
that what they wrap and call cannot go away unseen."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import small_trials
import test_bench_markers
import test_bench_training
from looking import EVERY_STEP, LOOK, UPDATES


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    os.environ["ABLATE_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    return small_trials.make_data(tmp_path_factory.mktemp("data") / "shapes")


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
