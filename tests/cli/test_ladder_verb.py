"""`ablate ladder`: rungs of a study are run, and the cheapest that gives its verdicts is named.

A real ladder in the small: a linear classifier of drawn points, on fewer samples.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from tests.cli.conftest import Said

SCRIPT = """
import json, sys
import numpy as np

rate, penalty, noise, samples, seed = (float(word) for word in sys.argv[1:])
draw = np.random.default_rng(int(seed))
means = np.random.default_rng(99).normal(0, 1, (10, 20))
y = draw.integers(0, 10, int(samples) + 20000)
x = means[y] + draw.normal(0, 1.3, (len(y), 20))
given = np.where(draw.random(len(y)) < noise, draw.integers(0, 10, len(y)), y)
train, test = slice(20000, None), slice(0, 20000)
w = np.zeros((20, 10))
for step in range(1, 41):
    p = np.exp(x[train] @ w)
    p /= p.sum(axis=1, keepdims=True)
    w -= rate * (x[train].T @ (p - np.eye(10)[given[train]]) / samples + penalty * w)
    if step % 10 == 0:
        top1 = float((np.argmax(x[test] @ w, axis=1) == y[test]).mean())
        print(json.dumps({"step": step, "epoch": step / 10, "top1": top1}), flush=True)
"""
STUDY = """
recipe: command
baseline:
  command: python train.py {rate} {penalty} {noise} {samples} {seed}
  metrics: {top1: {unit: fraction, chance: 0.1}}
  rate: 0.5
  penalty: 0.001
  noise: 0.0
  samples: 2000
factors:
  rate: [0.5, 0.001]
  penalty: [0.001, 0.3]
  noise: [0.0, 0.7]
seeds: [0, 1, 2]
objective: {margin: 0.01}
ladder: [{samples: 500}]
"""
HERE = ("--cluster", "local", "--cpus", "2", "--yes")


def test_a_rung_is_run_and_held_against_the_study(
    tmp_path: Path, ablate: Callable[..., Said], empty_store: Path
) -> None:
    """Both are studies of their own; the verdicts of the rung are counted against the study's, at a
    cost that was measured, and the same is said of the folder alone. Early looks are rungs too."""
    (tmp_path / "train.py").write_text(SCRIPT)
    (tmp_path / "s.yaml").write_text(STUDY)
    (tmp_path / "runs").mkdir()
    shutil.copy(empty_store, tmp_path / "runs" / "mlflow.db")
    said = ablate("ladder", "s.yaml", *HERE)
    assert said.code == 0, said.err
    for name in ("s", "s-rung1"):
        told = ablate("status", f"runs/{name}", "--json")
        assert json.loads(told.out)["outcomes"] == {"completed": 12}
    found = json.loads(ablate("ladder", "runs/s", "--json").out)
    rung, *early = found["rungs"]
    assert rung["name"] == "rung 1 (samples=500)" and found["comparisons"] == 3
    assert rung["cost"] > 0, "of processes that mostly import; how much is the machine's matter"
    assert rung["found"]["of"] >= 2 and rung["found"]["against"] == 0
    low, high = rung["found"]["interval"]
    assert low <= rung["found"]["same"] / rung["found"]["of"] <= high
    assert [one["cost"] for one in early] == [0.25, 0.5, 0.75]
    assert found["sentence"] in " ".join(said.out.split())
    assert found["sentence"].startswith(("Use ", "No rung gives"))
