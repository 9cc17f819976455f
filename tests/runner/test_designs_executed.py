"""Each design through the real study loop: what is run, in which order, and what is concluded."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from scripted_studies import prepare, run

from ablate.analysis.recommend import combine
from ablate.analysis.results import Cell, tabulate
from ablate.records.folder import StudyRecord
from ablate.report.best import recommend
from ablate.report.export import export_best
from ablate.report.report import write_report
from ablate.report.scale import objective_of
from ablate.runner import agenda
from ablate.runner.plan.plan import plan
from ablate.runner.status import StudyStatus
from ablate.study import Study, design
from ablate.study.table import StudyTable, read_table

HEAD = """\
name: executed
recipe: openclip
baseline:
  {model: tiny-rn-a, train_data: t.tar, imagenet_val: val, precision: fp32, warmup: 5, lr: 1.0e-3,
   epochs: 3}
factors:
  warmup: [5, 1]
  beta2: [0.999, 0.98]
  wd: [0.2, 0.1]
objective: {margin: 0.005}
"""
ADDS = [
    {"match": {"warmup": 1}, "adds": 0.02},
    {"match": {"beta2": 0.98}, "adds": 0.05},
    {"match": {"warmup": 1, "beta2": 0.98}, "adds": 0.03},
]
TARGET = "{warmup: '1', beta2: '0.98', wd: '0.1'}"


def execute(
    tmp_path: Path, tail: str, rules: list[dict[str, Any]], head: str = HEAD
) -> tuple[Study, StudyRecord, StudyTable, StudyStatus]:
    """Run the study with the scripted worker to its end; its table is what reports are made of."""
    study = prepare(tmp_path, rules, head + tail)
    before = [trial.id for trial in agenda.planned(study, StudyRecord(tmp_path / "none"))]
    status, record, _ = run(study, tmp_path)
    assert status.waiting == 0 and set(status.outcomes) == {"completed"}
    listed = {trial.id for trial in agenda.planned(study, record)}
    assert set(before) <= listed == {folder.trial_id for folder in record.records()}
    return study, record, read_table(study, record, curves=False), status


def verdicts(study: Study, record: StudyRecord, key: str = "baseline") -> dict[str, Any]:
    """The report's judgement of one question."""
    paths = write_report(study, record)
    content = json.loads(paths.verdicts_json.read_text())
    found: dict[str, Any] = content["questions"][key]
    return found


def deltas(found: dict[str, Any]) -> dict[str, float]:
    return {c["factor"]: round(c["delta"], 6) for c in found["contrasts"]}


def test_a_full_factorial_finds_the_interaction(tmp_path: Path) -> None:
    """8 cells, each main averaged over the others, and the planted interaction of 0.03."""
    tail = "design: full_factorial\nseeds: [0, 1]\n"
    study, record, table, _ = execute(tmp_path, tail, ADDS)
    assert len(table.cells) == 8 and all(len(cell.trials) == 2 for cell in table.cells)
    found = verdicts(study, record)
    assert deltas(found) == {"warmup": 0.035, "beta2": 0.065, "wd": 0.0}
    pairs = {tuple(i["factors"]): i for i in found["interactions"]}
    assert pairs["warmup", "beta2"]["delta"] == pytest.approx(0.03)
    assert pairs["warmup", "wd"]["delta"] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("options", "runs", "aliased"),
    [
        ("{name: fractional_factorial, resolution: III}", 4, True),
        ("{name: plackett_burman, fold_over: false}", 4, True),
        ("{name: plackett_burman, fold_over: true}", 8, False),
    ],
)
def test_a_fraction_is_run_and_says_what_it_confounds(
    tmp_path: Path, options: str, runs: int, aliased: bool
) -> None:
    """A screen of three factors gives every main effect; in four runs each is one with a pair."""
    tail = f"design: {options}\nseeds: [0, 1]\n"
    study, record, table, _ = execute(tmp_path, tail, ADDS)
    assert len(table.cells) == runs
    notes = plan(study, record).notes
    assert ("warmup cannot be told from beta2 x wd" in notes) == aliased
    assert ("main effects are clear of each other and of pairs" in notes) != aliased
    # wd is confounded with warmup x beta2 (of size 0.03, half of it in each main) in four runs.
    expected = {"warmup": 0.035, "beta2": 0.065, "wd": -0.015 if aliased else 0.0}
    found = deltas(verdicts(study, record))
    assert {name: abs(size) for name, size in found.items()} == pytest.approx(
        {name: abs(size) for name, size in expected.items()}, abs=1e-6
    )


def test_a_mixed_level_fraction_is_run(tmp_path: Path) -> None:
    """Three and two levels at resolution III: nine runs or fewer, and each level's effect."""
    head = HEAD.replace("[5, 1]", "[5, 1, 3]").replace("[0.2, 0.1]", "[0.2, 0.1, 0.3]")
    tail = "design: {name: fractional_factorial, resolution: III}\nseeds: [0, 1]\n"
    rules = [{"match": {"warmup": 3}, "adds": 0.04}, {"match": {"wd": 0.1}, "adds": -0.02}]
    study, record, table, _ = execute(tmp_path, tail, rules, head)
    assert len(table.cells) <= 9
    found = {
        (c["factor"], c["level"]): round(c["delta"], 6)
        for c in verdicts(study, record)["contrasts"]
    }
    assert found["warmup", "3"] == pytest.approx(0.04)
    assert found["wd", "0.1"] == pytest.approx(-0.02)
    assert found["beta2", "0.98"] == pytest.approx(0, abs=1e-6)


def test_leave_one_out_is_run_with_add_one_in(tmp_path: Path) -> None:
    """From the target each change reverted, and each made alone: synergy shows as a difference."""
    tail = f"design: {{name: leave_one_out, target: {TARGET}}}\nseeds: [0, 1]\n"
    study, record, table, _ = execute(tmp_path, tail, ADDS)
    assert len(table.cells) == 2 * 3 + 2
    assert deltas(verdicts(study, record, "added")) == {"warmup": 0.02, "beta2": 0.05, "wd": 0.0}
    reverted = deltas(verdicts(study, record, "reverted"))
    assert reverted == {"warmup": -0.05, "beta2": -0.08, "wd": 0.0}


def test_an_ablation_path_is_walked_and_validated(tmp_path: Path) -> None:
    """Every round is run on top of the best so far: 3 + 2 + 1 cells and the baseline, of which
    k + 1 are the path; it is drawn and its last cell is the best found."""
    tail = f"design: {{name: ablation_path, target: {TARGET}}}\nseeds: [0, 1]\n"
    study, record, table, _ = execute(tmp_path, tail, ADDS)
    names = [cell.name for cell in table.cells]
    assert len(names) == 7
    assert "warmup=1, beta2=0.98" in names, "the second round stands on beta2"
    assert "warmup=1, wd=0.1" not in names
    means = {cell.name: cell.mean for cell in table.cells}
    path = ["baseline", "beta2=0.98", "warmup=1, beta2=0.98", "warmup=1, beta2=0.98, wd=0.1"]
    base = means["baseline"]
    assert [round((means[n] or 0) - (base or 0), 6) for n in path] == [0.0, 0.05, 0.1, 0.1]
    paths = write_report(study, record)
    assert "The path from the baseline to the target" in paths.html.read_text()
    assert (tmp_path / "runs" / "executed" / "figures" / "path.pdf").exists()


def test_merged_levels_are_not_run_by_the_loop(tmp_path: Path) -> None:
    """Of four loss levels two cells are run; the others' verdict stands on the same runs."""
    head = HEAD.replace(
        "  wd: [0.2, 0.1]\n",
        "  loss: {default: {}, gather: {gather_with_grad: true}, both: {local_loss: true, "
        "gather_with_grad: true}, local: {local_loss: true}}\n",
    )
    tail = "gang: {workers: 2}\nseeds: [0, 1]\n"
    rules = [{"match": {"local_loss": True}, "adds": -0.1}]
    study, record, table, status = execute(tmp_path, tail, rules, head)
    assert [cell.name for cell in table.cells] == [
        "baseline", "warmup=1", "beta2=0.98", "loss=local",
    ]  # fmt: skip
    assert status.num_ended == 8
    found = {c["level"]: c for c in verdicts(study, record)["contrasts"] if c["factor"] == "loss"}
    assert {level: c["estimand"] for level, c in found.items()} == {
        "gather": "shared", "both": "shared", "local": "simple",
    }  # fmt: skip
    assert found["local"]["delta"] == pytest.approx(-0.1)


def recommended(study: Study, record: StudyRecord) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(write_report(study, record).verdicts_json.read_text())
    return found["use"]


@pytest.mark.parametrize("together", [0.0, -0.1])
def test_what_looks_better_alone_is_run_together_before_it_is_handed_out(
    tmp_path: Path, together: float
) -> None:
    """Two changes that are better alone are run as one cell at the end, once; it is handed out if
    it beats both, and the better of the two if it does not. No comparison takes it in."""
    rules = [
        {"match": {"warmup": 1}, "adds": 0.02},
        {"match": {"beta2": 0.98}, "adds": 0.05},
        {"match": {"warmup": 1, "beta2": 0.98}, "adds": together},
        {"match": {"wd": 0.1}, "adds": -0.01},
    ]
    study, record, table, status = execute(tmp_path, "confirm: true\nseeds: [0, 1]\n", rules)
    assert status.num_ended == 4 * 2 + 2
    combination = table.cell({"warmup": "1", "beta2": "0.98"})
    assert combination.levels in table.added and table.combinations == (combination.levels,)
    found = verdicts(study, record)
    assert deltas(found) == {"warmup": 0.02, "beta2": 0.05, "wd": -0.01}
    assert all(c["estimand"] == "simple" for c in found["contrasts"])
    use = recommended(study, record)
    if together == 0:
        assert use["chosen_as"] == "combination" and use["cell"] == dict(combination.levels)
        assert use["evidence"]["gain"] == pytest.approx(0.07)
    else:
        assert use["chosen_as"] == "cell" and "which is not better" in use["why"]
        assert use["cell"] == {"warmup": "5", "beta2": "0.98", "wd": "0.2"}
    written = export_best(study, record)
    assert json.loads(written.provenance.read_text())["levels"] == use["cell"]
    again, _, _ = run(study, tmp_path)
    assert again.num_ended == status.num_ended, "confirmed once"


def test_a_combination_that_was_handed_out_is_not_forgotten_when_a_seed_is_added(
    tmp_path: Path,
) -> None:
    """The new seed takes the belief in one of its changes; its own runs are still the best there
    are. It is run on the new seed, in whatever order trials end, and handed out."""
    tail = "confirm: true\nseeds: [0, 1, 2]\n"
    rules = [
        {"match": {"warmup": 1}, "adds": 0.02},
        {"match": {"beta2": 0.98}, "adds": 0.05},
    ]
    study, record, table, status = execute(tmp_path, tail, rules)
    assert status.num_ended == 4 * 3 + 3
    assert recommended(study, record)["chosen_as"] == "combination"
    fourth = [
        {"match": {"warmup": 1}, "adds": -0.06},
        {"match": {"beta2": 0.98}, "adds": 0.05},
        {"match": {"warmup": 1, "beta2": 0.98}, "adds": 0.08},
    ]
    alone = prepare(tmp_path, fourth, HEAD + "seeds: [0, 1, 2, 3]\n")
    run(alone, tmp_path)
    use = recommended(alone, record)
    assert use["chosen_as"] == "cell" and use["more_trials"] == 1
    assert (
        "has not run on all seeds: `ablate confirm` runs the rest, 1 trial" in use["to_know_more"]
    )
    more, _, table, status = execute(tmp_path, "confirm: true\nseeds: [0, 1, 2, 3]\n", fourth)
    assert status.num_ended == 4 * 4 + 4
    assert policy_combination(more, record) is None, "it is believed no more"
    use = recommended(more, record)
    assert use["chosen_as"] == "combination" and use["evidence"]["gain"] == pytest.approx(0.07)
    assert use["evidence"]["seeds"] == [0, 1, 2, 3]


def policy_combination(study: Study, record: StudyRecord) -> Cell | None:
    """What is believed to be better alone, together."""
    table = read_table(study, record, curves=False)
    own = [result for result in table.results if result.levels not in table.added]
    usual = tuple(study.baseline_levels().values())
    return combine(tabulate(own), usual, objective_of(table))


def test_a_combination_is_confirmed_at_its_own_best_settings(tmp_path: Path) -> None:
    """With nuisance settings the combined cell is tuned like every other one."""
    rules = [
        {"match": {"warmup": 1}, "adds": 0.02},
        {"match": {"beta2": 0.98}, "adds": 0.05},
        {"match": {"warmup": 1, "beta2": 0.98, "lr": 0.002}, "adds": 0.1},
    ]
    study, record, table, status = execute(tmp_path, "confirm: true\n" + NUISANCE, rules)
    assert status.num_ended == (4 + 1) * (3 + 3)
    assert recommended(study, record)["chosen_as"] == "combination"
    assert recommend(table).chosen.name == "warmup=1, beta2=0.98, lr=0.002"


def test_confirming_is_asked_for_where_the_file_does_not(tmp_path: Path) -> None:
    """Without `confirm: true` the best single change is handed out with what it takes to know
    more; asked for, the combination is run in the same folder, and counts from then on."""
    study, record, table, _ = execute(tmp_path, "seeds: [0, 1]\n", ADDS)
    use = recommended(study, record)
    assert use["chosen_as"] == "cell" and use["more_trials"] == 2
    assert use["combination"] == {"warmup": "1", "beta2": "0.98", "wd": "0.2"}
    assert "ablate confirm" in use["to_know_more"]
    run(replace(study, confirm=True), tmp_path)
    assert recommended(study, record)["chosen_as"] == "combination"
    assert len(agenda.planned(study, record)) == 4 * 2 + 2


NUISANCE = """\
nuisance:
  settings: {lr: [5.0e-4, 1.0e-3, 2.0e-3]}
  seeds: [1000]
seeds: [0, 1, 2]
"""
NEEDS_OTHER_LR = [
    {"match": {}, "adds": 0.2},  # something was learnt: chance is one in two
    # At the usual lr, beta2=0.98 looks 0.05 worse; at 0.0005 it is as good as the baseline's best.
    {"match": {"beta2": 0.98, "lr": 0.001}, "adds": -0.05},
    {"match": {"beta2": 0.98, "lr": 0.002}, "adds": -0.09},
    {"match": {"beta2": 0.999, "lr": 0.0005}, "adds": -0.03},
    {"match": {"beta2": 0.999, "lr": 0.002}, "adds": -0.02},
]


def test_a_nuisance_is_tuned_in_every_cell_and_judged_on_other_seeds(tmp_path: Path) -> None:
    """Each cell has the same candidates on the tuning seed; its best alone is run on the study's
    seeds, and only those runs are compared, reported and exported."""
    study, record, table, status = execute(tmp_path, NUISANCE, NEEDS_OTHER_LR)
    assert status.num_ended == 4 * 3 + 4 * 3
    chosen = {row.name: row.best for row in table.tuning}
    assert chosen == {"baseline": 1, "warmup=1": 1, "beta2=0.98": 0, "wd=0.1": 1}
    assert {row.seed for cell in table.cells for row in cell.trials} == {0, 1, 2}
    per_cell = Counter(trial.cell.levels for trial in agenda.planned(study, record))
    assert sorted(per_cell.values()) == [1] * 8 + [4] * 4
    found = verdicts(study, record)
    assert deltas(found)["beta2"] == pytest.approx(0, abs=1e-9), "equal, each at its own best lr"
    assert "beta2=0.98, lr=0.0005" in (tmp_path / "runs" / "executed" / "report.md").read_text()
    best = recommend(table)
    assert {row.seed for row in best.cell.trials} == {0, 1, 2}


def test_a_tuned_setting_is_exported(tmp_path: Path) -> None:
    """The exported command trains the best cell at its own learning rate, not the baseline's."""
    rules = [*NEEDS_OTHER_LR, {"match": {"beta2": 0.98}, "adds": 0.2}]
    study, record, table, _ = execute(tmp_path, NUISANCE, rules)
    assert recommend(table).cell.name == "beta2=0.98, lr=0.0005"
    written = export_best(study, record)
    command = written.script.read_text()
    assert "--lr 0.0005" in command and "--beta2 0.98" in command
    text = (
        (tmp_path / "runs" / "executed" / "report.md").read_text()
        if (write_report(study, record))
        else ""
    )
    assert "lies at the edge of those tried" in text


def test_the_plan_of_a_nuisance_study_counts_what_waits_for_the_choice(tmp_path: Path) -> None:
    """Before anything ran: 12 tuning trials, and 12 more whose learning rate is not known yet."""
    study = prepare(tmp_path, [], HEAD + NUISANCE)
    made = plan(study, StudyRecord(tmp_path / "none"), samples_per_s=None)
    assert len(made.to_run) == 24
    unknown = [trial for trial in made.to_run if not trial.trial_id]
    assert len(unknown) == 12 and unknown[0].name == "baseline, at its best lr"
    assert {trial.seed for trial in made.to_run if trial.trial_id} == {1000}
    assert len(design.pending(study)) == 12


def test_a_nuisance_goes_with_an_ablation_path_and_with_added_seeds(tmp_path: Path) -> None:
    """Rounds of a path wait for each cell's choice; sequential seeds begin when all are chosen."""
    path = f"design: {{name: ablation_path, target: {TARGET}}}\n"
    study, record, table, _ = execute(
        tmp_path, path + NUISANCE.replace("[0, 1, 2]", "[0, 1]"), NEEDS_OTHER_LR
    )
    assert len(table.cells) == 7 and all(len(cell.trials) == 2 for cell in table.cells)
    tail = NUISANCE.replace("[0, 1, 2]", "{min: 2, max: 4, until: decided}")
    (tmp_path / "more").mkdir()
    study, record, table, _ = execute(tmp_path / "more", tail, NEEDS_OTHER_LR)
    assert all(len(cell.trials) >= 2 for cell in table.cells)
