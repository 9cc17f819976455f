"""Python's way in: the same code as the verbs, and nothing heavy before it is used."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from scripted_studies import STUDY, TRIALS, prepare
from synthetic import study_of, write_study

import ablate
from ablate.errors import RecordError, StudyError


def test_importing_ablate_brings_no_engine() -> None:
    """`import ablate` and `ablate.load` bring neither torch, ray, mlflow, optuna nor pandas."""
    heavy = ("torch", "ray", "mlflow", "optuna", "pandas", "open_clip")
    code = f"import sys, ablate; ablate.load; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_folder_gives_results_effects_and_the_best(quick) -> None:
    """Results have a row for each trial, effects one for each comparison, with the verdicts of the
    report."""
    _, record = quick
    run = ablate.load(record.folder)
    results, effects = run.results(), run.effects()
    assert len(results) == len(set(results["trial"]))
    assert set(results["outcome"]) <= {"completed", "diverged", "failed"}
    assert results["value"].dtype == float
    assert {"factor", "level", "delta", "verdict"} <= set(effects.columns)
    assert run.best().why and run.best().why in run._repr_html_()


def test_a_study_file_is_planned_and_not_run(tmp_path: Path) -> None:
    """A study file is loaded with its folder below `runs`; a wrong one says its line."""
    study = prepare(tmp_path, [])
    (tmp_path / "s.yaml").write_text(STUDY)
    run = ablate.load(tmp_path / "s.yaml", runs=tmp_path / "runs")
    assert run.study.name == study.name and run.folder == tmp_path / "runs" / study.name
    assert len(run.status().outcomes) == 0 and run.status().waiting == TRIALS
    (tmp_path / "s.yaml").write_text("recipe: openclip\n")
    with pytest.raises(StudyError, match=r"s\.yaml:1"):
        ablate.load(tmp_path / "s.yaml")
    with pytest.raises(RecordError, match="holds no study"):
        ablate.load(tmp_path)


def test_a_table_is_judged_as_its_file_is(tmp_path: Path) -> None:
    """`analyze` of a DataFrame is `analyze` of the same CSV."""
    rows = [("baseline", "baseline", seed, 0.20 + 0.001 * seed) for seed in range(4)]
    rows += [("lr", "0.01", seed, 0.24 + 0.001 * seed) for seed in range(4)]
    table = pd.DataFrame(rows, columns=["factor", "level", "seed", "value"])
    table.to_csv(tmp_path / "results.csv", index=False)
    (of_table,) = ablate.analyze(table)
    (of_file,) = ablate.analyze(tmp_path / "results.csv")
    assert of_table == of_file
    assert math.isclose(of_table["delta"], 0.04, abs_tol=1e-9)


def test_a_study_is_launched_from_python(tmp_path: Path) -> None:
    """`launch` runs what is missing with the loop of the command line: here, nothing."""
    study = study_of(tmp_path)
    record = write_study(tmp_path, study)
    run = ablate.Run(study, record)
    ended = run.launch(cluster="debug")
    assert ended.outcomes == run.status().outcomes and not ended.waiting
