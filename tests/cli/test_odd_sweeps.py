"""Sweeps that went wrong, read as their owner reads them: an answer or a sentence, no traceback."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from scripted_studies import prepare

from ablate.records.folder import StudyRecord
from ablate.report.report import write_report
from ablate.study import parse_study
from ablate.trial.identity import Cell

SWEEP = """\
name: odd
recipe: openclip
baseline: {model: tiny-rn-a, train_data: t.tar, train_num_samples: 640, imagenet_val: val,
  precision: fp32, warmup: 5, batch_size: 64, epochs: 1, lr: 1.0e-3}
factors:
  lr: {low: 1.0e-4, high: 1.0e-2, log: true}
  beta2: [0.999, 0.98]
  precision: [fp32, amp_bf16]
design: {name: search, cells: 2000}
seeds: [0]
objective: {metric: imagenet_top1, margin: 0.01}
"""


def write(root: Path, cells: int, score: Callable[[float, int], float | None]) -> StudyRecord:
    """A folder of `cells` ended cells; a score of None is a divergence."""
    study = prepare(root, [], SWEEP)
    record = StudyRecord(root / "runs" / "odd")
    record.write_study(
        {"format": 1, "name": "odd", "path": "s.yaml", "root": str(root), "text": SWEEP,
         "version": "0.1.0"}
    )  # fmt: skip
    for index in range(cells):
        lr = 1e-3 if index == 0 else float(f"{10 ** (-4 + 2 * (index + 0.5) / cells):.6g}")
        levels = {"lr": "0.001" if index == 0 else repr(lr)}
        if index % 2:
            levels["beta2"] = "0.98"
        if index % 3 == 2:
            levels["precision"] = "amp_bf16"
        cell: Cell = study.cell(levels)
        home = record.write_trial(study.trial(cell, seed=0).to_json())
        number = record.new_attempt(home)
        value = score(lr, index)
        record.write_end(home, number, {"kind": "ended", "wall_s": 60.0, "step": 10})
        record.write_outcome(
            home,
            {
                "outcome": "diverged" if value is None else "completed",
                "value": value,
                "attempt": 1,
                "step": 10,
                "time": 1.7e9 + index,
                "wall_s": 60.0,
                "verdict": "DIVERGED" if value is None else "STABLE",
                "reason": "loss is back at ln B" if value is None else "",
                "final": {} if value is None else {"imagenet_top1": value},
            },
        )
    return record


def hill(lr: float, index: int) -> float | None:
    """Best at 1e-3, divergence above 5e-3, and a little that no setting explains."""
    wobble = 0.004 * math.sin(12.9898 * index)
    return None if lr > 5e-3 else 0.2 - 0.04 * math.log10(lr / 1e-3) ** 2 + wobble


@pytest.mark.parametrize(
    ("cells", "score", "says"),
    [
        (5, lambda lr, index: None, "Nothing to use yet: no cell has a completed run."),
        (1, lambda lr, index: 0.2, "1 of the cells have a completed run, and a model needs four"),
        (6, lambda lr, index: 0.2, "every cell scores the same"),
        (6, lambda lr, index: None if index else 0.2, "a model needs four"),
    ],
)
def test_a_sweep_that_says_nothing_is_reported_in_a_sentence(
    ablate, tmp_path, cells, score, says
) -> None:
    """All diverged, one finished cell, a constant score: the report says so and ends well."""
    record = write(tmp_path, cells, score)
    said = ablate("report", str(record.folder))
    assert said.code == 0 and "Traceback" not in said.out + said.err
    assert says in " ".join(said.out.split())
    assert says in (record.folder / "report.md").read_text()
    found = json.loads((record.folder / "verdicts.json").read_text())["search"]
    assert found["factors"] == [] and found["left"] is None and found["why_no_model"]


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("low: 1.0e-4, high: 1.0e-2", "low: 1.0e-3, high: 1.0e-3", "must be below high"),
        ("low: 1.0e-4", "low: 0.0", "needs low above 0"),
        ("low: 1.0e-4", "low: -1.0e-4", "needs low above 0"),
        ("beta2: [0.999, 0.98]", "beta2: {only_if: {beta3: a}, a: {beta2: 0.9}}", "beta3"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("verb", ["check", "plan"])
def test_a_space_that_cannot_be_searched_is_refused(ablate, tmp_path, verb, old, new, says) -> None:
    """A range of one value, a logarithm through zero, a condition on nothing: said with its line,
    before anything runs."""
    prepare(tmp_path, [], SWEEP)
    assert old in SWEEP
    (tmp_path / "s.yaml").write_text(SWEEP.replace(old, new))
    said = ablate(verb, "s.yaml")
    assert said.code == 2 and said.out == "" and "Traceback" not in said.err
    text = " ".join(said.err.split())
    assert "s.yaml:" in text and says in text


@pytest.mark.exhaustive
@pytest.mark.timeout(600)
def test_two_thousand_cells_are_reported_within_a_minute(tmp_path) -> None:
    """The report of 2,000 cells is there within a minute of processor time, and it is right."""
    record = write(tmp_path, 2000, hill)
    study = parse_study(SWEEP, path="s.yaml", root=tmp_path)
    began = time.process_time()
    paths = write_report(study, record)
    spent = time.process_time() - began
    found = json.loads(paths.verdicts_json.read_text())["search"]
    assert sum(found["cells"].values()) == 2000
    assert 6e-4 < float(found["use"]["levels"]["lr"]) < 1.6e-3
    print(f"{spent:.1f} s of processor time")
    assert spent < 60
