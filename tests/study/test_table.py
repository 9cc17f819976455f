"""The trial table: what is read from a study folder, and what takes part."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from synthetic import EFFECTS, QUICK, study_of, write_study

from ablate.records.files import write_json
from ablate.records.folder import StudyRecord
from ablate.study.table import read_table, thin


def test_every_trial_is_listed_once_with_its_outcome(quick):
    """A complete study is read as cells x seeds, diverged runs without a value."""
    table = read_table(*quick)
    assert len(table.cells) == 11 and len(table.rows) == 44
    assert table.cells[0] is table.baseline and table.cells[0].name == "baseline"
    assert (table.count("completed"), table.count("diverged")) == (41, 3)
    assert table.chance == 0.01
    diverged = [row for row in table.rows if row.state == "diverged"]
    assert all(row.value is None and row.verdict == "DIVERGED" for row in diverged)
    assert all(math.isfinite(y) for row in table.rows for y in row.loss.y)
    assert len(table.results) == 44 and table.foreign == ()


def test_the_value_is_the_last_step_and_the_best_only_shown(quick):
    """The objective is taken at the last step; the best evaluation is kept apart."""
    study, record = quick
    for row in read_table(study, record).baseline.trials:
        evaluations = record.record(row.id).evaluations()
        scores = [entry["imagenet_top1"] for entry in evaluations]
        assert row.value == scores[-1]
        assert row.best == max(scores)
        assert row.best_epoch == evaluations[scores.index(max(scores))]["epoch"]


def test_another_metric_asked_later_is_read_from_what_the_trials_measured(tmp_path):
    """Never the old metric's number under the new name; a run that did not measure it has failed
    by this objective, and says what it measured; one that measured no number has diverged."""
    study = study_of(tmp_path)
    record = write_study(tmp_path, study)
    other = study_of(tmp_path, QUICK.replace("imagenet_top1", "imagenet_top5"))
    for folder in record.records():
        outcome = folder.outcome()
        if outcome["outcome"] == "completed" and folder.trial()["seed"] != 3:
            top5 = 2 * outcome["value"] if folder.trial()["seed"] else math.nan
            outcome["final"]["imagenet_top5"] = top5
            write_json(folder.folder / "outcome.json", outcome)
    before, after = read_table(study, record), read_table(other, record)
    known = {row.id: row for row in before.rows}
    for row in after.rows:
        was = known[row.id]
        if was.state == "completed" and row.seed == 3:
            assert row.state == "failed" and row.value is None
            assert row.reason == "it ended without imagenet_top5; it measured: imagenet_top1"
        elif was.state == "completed" and row.seed == 0:
            assert row.state == "diverged" and row.reason.startswith("imagenet_top5 is nan at step")
        elif was.state == "completed":
            assert row.value == 2 * was.value
    assert after.count("failed") == sum(r.seed == 3 and r.state == "completed" for r in before.rows)


def test_a_factor_added_later_stands_at_its_baseline(quick):
    """Old trials belong to a study with one more factor; only the new factor's are missing."""
    study, record = quick
    grown = study_of(Path(study.root), QUICK.replace("factors:\n", "factors:\n  wd: [0.1, 0.2]\n"))
    table = read_table(grown, record)
    assert table.foreign == ()
    assert table.count("completed") + table.count("diverged") == 44
    waiting = [row for row in table.rows if row.state == "waiting"]
    assert len(waiting) == 4 and all(dict(row.levels)["wd"] == "0.2" for row in waiting)


@pytest.mark.parametrize(
    ("old", "new", "foreign"),
    [
        ("wd: 0.1", "wd: 0.3", 44),
        ("warmup: [20, 5, 60]", "warmup: [20, 60]", 4),
        ("seeds: [0, 1, 2, 3]", "seeds: [0, 1, 2]", 11),
    ],
)
def test_what_the_study_no_longer_asks_takes_no_part(quick, old, new, foreign):
    """A changed baseline, a removed level and a removed seed leave their trials aside."""
    study, record = quick
    changed = study_of(Path(study.root), QUICK.replace(old, new))
    table = read_table(changed, record)
    assert len(table.foreign) == foreign
    assert not {row.id for row in table.foreign} & {row.id for row in table.rows}
    assert len(table.results) == 44 - foreign


def test_missing_trials_are_planned_ones(tmp_path):
    """A trial without an attempt is waiting; one with an attempt but no outcome was interrupted
    where no controller runs."""
    study = study_of(tmp_path)
    gone = [("warmup", "5", 1), ("baseline", "", 2)]
    record = write_study(tmp_path, study, missing=gone)
    waiting = [row for row in read_table(study, record).rows if row.state == "waiting"]
    assert len(waiting) == 2
    record.new_attempt(record.record(waiting[0].id))
    table = read_table(study, record)
    assert (table.count("waiting"), table.count("interrupted")) == (1, 1)
    assert len(table.results) == 42


def test_a_folder_that_was_never_launched_is_all_waiting(tmp_path):
    """Reading a study that has no records yet gives its plan."""
    study = study_of(tmp_path)
    table = read_table(study, StudyRecord(tmp_path / "none"))
    assert table.count("waiting") == 44 and table.results == ()


def test_crashes_change_nothing_but_the_cost(quick, tmp_path):
    """Trials whose first attempt died and was resumed are the same rows, but for their cost."""
    study, record = quick
    calm = read_table(study, record)
    rough = read_table(study, write_study(tmp_path, study, crash_at=60, speed=450.0))
    for one, two in zip(calm.rows, rough.rows, strict=True):
        assert (one.id, one.value, one.loss, one.score, one.events) == (
            (two.id, two.value, two.loss, two.score, two.events)
        )
        assert (one.cost.attempts, two.cost.attempts) == (1, 2)
        assert two.cost.crashes == 1 and two.cost.samples_per_s < one.cost.samples_per_s


def test_a_cell_scores_its_diverged_runs_at_chance(tmp_path):
    """The score of a cell counts every seed, and is unknown while one is missing."""
    study = study_of(tmp_path)
    table = read_table(study, write_study(tmp_path, study, missing=[("beta2", "0.98", 0)]))
    cell = table.cell({"lr": "0.02"})
    assert cell.score(0.01) == pytest.approx((3 * 0.01 + cell.values()[0]) / 4)
    assert cell.score(None) is None
    assert table.cell({"beta2": "0.98"}).score(0.01) is None
    assert table.cell({"warmup": "5"}).mean - table.baseline.mean == pytest.approx(
        EFFECTS["warmup", "5"], abs=0.02
    )


def test_thinning_keeps_means_and_leaves_non_finite_numbers_out():
    """A thinned curve has the mean of its bins and no NaN."""
    points = [(step, float(step)) for step in range(1, 1001)] + [(1001, math.nan)]
    curve = thin(points, most=100)
    assert len(curve.x) == 100 and all(map(math.isfinite, curve.y))
    assert curve.x == pytest.approx(curve.y)
    assert sum(curve.y) / 100 == pytest.approx(500.5, rel=1e-2)
    assert thin(points[:5]).y == (1.0, 2.0, 3.0, 4.0, 5.0)
