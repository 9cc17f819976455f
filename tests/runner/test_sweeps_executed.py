"""Sweeps as they are run: cells asked one by one, an end when little is left, confirming."""

from __future__ import annotations

import functools
import math
import re
from pathlib import Path

import numpy as np
import pytest

from ablate.cluster.contract import Attempt
from ablate.errors import StudyError
from ablate.records.attempt import AttemptWriter
from ablate.records.files import read_json
from ablate.records.folder import StudyRecord
from ablate.report.best import recommend
from ablate.report.page import read_page
from ablate.report.path import walked
from ablate.report.pictures.figures import path_picture
from ablate.runner import controller, hold
from ablate.runner.plan.plan import plan
from ablate.runner.status import StudyStatus
from ablate.search.book import CellBook
from ablate.study import Search, Study, design, load_study, parse_study, sweep
from ablate.study.table import StudyTable, read_table
from ablate.tracking.mlflow.answer import read_answer
from tests.simulated_cluster import Course, SimulatedCluster

TEXT = """\
recipe: openclip
baseline: {{model: RN50, train_data: d.tar, train_num_samples: 640, imagenet_val: data/val}}
factors:
  lr: {{low: 1.0e-4, high: 1.0e-2, log: true}}
  beta2: [0.999, 0.98]
  augmentation:
    default: {{}}
    strong: {{aug_cfg: {{use_timm: true, scale: [0.4, 1.0], re_prob: 0.3}}}}
  erasing:
    only_if: {{augmentation: strong}}
    none: {{aug_cfg: {{use_timm: true, scale: [0.4, 1.0], re_prob: 0.0}}}}
design: {{name: search, cells: {cells}{more}}}
confirm: {confirm}
seeds: [0]
objective: {{metric: imagenet_top1, direction: maximize, margin: 0.01}}
"""


class Nobody:
    """A mirror that shows nothing."""

    trouble = None

    def update(self, trials, active):
        pass


def act(attempt: Attempt, noise: float = 0.003) -> Course:
    """A run whose score falls off around lr 1e-3 and diverges above 6e-3."""
    trial = read_json(attempt.folder / "trial.json")
    config = trial["config"]
    rng = np.random.default_rng(int(attempt.trial_id, 16) % 2**32)
    gone = config["lr"] > 6e-3
    value = 0.2 - 0.05 * math.log10(config["lr"] / 1e-3) ** 2 + 0.02 * (config["beta2"] == 0.98)
    value += rng.normal(0, noise)
    writer = AttemptWriter(attempt.folder, attempt.number)
    writer.step([{"step": 1, "attempt": attempt.number, "time": 0.0, "loss": 1.0}])
    final = {} if gone else {"imagenet_top1": value}
    status = "diverged" if gone else "completed"
    writer.result({"status": status, "step": 1, "final": final, "verdict": "STABLE"})
    writer.close()
    return Course()


def launch(
    folder: Path,
    *,
    cells: int,
    more: str = "",
    confirm: bool = False,
    text: str = TEXT,
    noise: float = 0.003,
) -> tuple[Study, StudyTable, StudyStatus]:
    for index in range(10):
        (folder / "data" / "val" / f"c{index}").mkdir(parents=True, exist_ok=True)
    text = text.format(cells=cells, more=more, confirm=str(confirm).lower())
    study = parse_study(text, path="sweep.yaml", root=folder)
    record = StudyRecord(folder / "runs" / study.name)
    cluster = SimulatedCluster(2, functools.partial(act, noise=noise))
    score = functools.partial(design.score_of, study)
    book = CellBook(study, storage=folder / "optuna.db", score=score)
    with hold.controlling(record):
        status = controller.launch(
            study, record, cluster=cluster, book=book, mirror=Nobody(), clock=cluster.clock
        )
    book.close()
    return study, read_table(study, record), status


def test_a_sweep_confirms_its_best_on_fresh_seeds(tmp_path: Path) -> None:
    """After its cells, the best settings and the baseline run on seeds that chose nothing; the
    choice then rests on them too; launching again adds nothing; a condition is kept to."""
    study, table, status = launch(tmp_path, cells=12, confirm=True)
    own = [row for row in table.rows if row.seed == 0]
    fresh = [row for row in table.rows if row.seed in study.fresh_seeds]
    assert len(own) == 12 and len(own) + len(fresh) == len(table.rows) == status.num_ended
    confirmed = {row.levels for row in fresh}
    assert 2 <= len(confirmed) <= 5 and table.baseline.levels in confirmed
    assert len(fresh) == 3 * len(confirmed)
    used = recommend(table)
    assert used.cell is not None and used.cell.levels in confirmed
    assert set(study.fresh_seeds) <= set(used.seeds)
    for row in table.rows:
        levels = dict(row.levels)
        assert levels["augmentation"] == "strong" or levels["erasing"] == "baseline"
        erased = (row.config or {})["aug_cfg"].get("re_prob")
        assert levels["augmentation"] == "default" or erased == (
            0.0 if levels["erasing"] == "none" else 0.3
        )
    page = read_page(table)
    assert dict(page.facts)["Seeds"] == "0; to confirm 2000, 2001, 2002"
    told = read_answer(study, StudyRecord(tmp_path / "runs" / study.name)).effects
    assert told[used.cell.levels].verdict == "better"
    assert "not among the best" in {effect.verdict for effect in told.values()}
    assert told[table.baseline.levels].verdict == "the baseline"
    scores = [float(cell.score.rstrip(" %")) for cell in page.runs.cells]
    assert scores == sorted(scores, reverse=True)
    _, again, _ = launch(tmp_path, cells=12, confirm=True)
    assert {row.id for row in again.rows} == {row.id for row in table.rows}
    assert any("cells left" in line for line in status.search)


def test_the_way_to_the_winner_of_a_sweep_is_walked_and_told(tmp_path: Path) -> None:
    """`then: ablation_path` runs each change on top of those before, up to the best cell; the
    report draws the way and says what each step of it adds."""
    study, table, _ = launch(tmp_path, cells=6, more=", then: ablation_path")
    target = design.winner(study, table.results)
    assert target is not None
    usual = study.baseline_levels()
    changed = {name for name, level in target.items() if usual[name] != level}
    steps = walked(table)
    assert {name for name, _ in steps[1:]} == changed and len(changed) > 1
    assert dict(steps[-1][1].levels) == target
    page = read_page(table)
    assert page.sweep is not None
    assert f"To {study.change_name(target)}" in page.sweep.path
    assert all(f"{name} " in page.sweep.path for name in changed)
    assert path_picture(table, page.scale) is not None


def test_a_sweep_ends_when_too_little_is_to_be_gained(tmp_path: Path) -> None:
    """With a margin that is soon reached it asks for no more cells, and says why."""
    _, table, status = launch(tmp_path, cells=30, more=", until: {gain_below: 0.2}")
    assert len(table.cells) < 15
    assert any("until" in line for line in status.search)
    best, going_on = status.search[:2]
    assert re.fullmatch(r"best so far: .+, imagenet_top1 \d\d\.\d%", best)
    assert re.match(r"going on is expected to gain [\d.]+ points more \(margin 1\); ", going_on)


def test_a_sweep_repeats_what_only_noise_hides(tmp_path: Path) -> None:
    """Where every setting has run and their noise decides, the rest of the budget goes to further
    runs of the most promising ones, which the answer counts; launching again adds nothing."""
    listed = TEXT.replace("{{low: 1.0e-4, high: 1.0e-2, log: true}}", "[5.0e-4, 1.0e-3]")
    asked = {"cells": 15, "more": ", until: {gain_below: 1.0e-5}", "text": listed, "noise": 0.02}
    study, table, status = launch(tmp_path, **asked)
    again = [row for row in table.rows if row.seed in study.spare_seeds]
    assert len(again) >= 3 and len(table.cells) + len(again) == len(table.rows) == 15
    assert any("0 of 15 cells left" in line for line in status.search)
    found = sweep.answer_of(study, table.results)
    assert found is not None
    names = [tuple(level for _, level in row.levels) for row in table.rows]
    assert all(use.runs == names.count(use.cell) for use in found.ranking)
    assert max(use.runs for use in found.ranking) > 1
    _, same, _ = launch(tmp_path, **asked)
    assert {row.id for row in same.rows} == {row.id for row in table.rows}


@pytest.mark.parametrize("name", ["emoji_sweep", "rn50_cc3m_sweep"])
def test_the_sweeps_that_come_along_cost_what_they_say(name: str, tmp_path: Path) -> None:
    """The counts in the header of a study file are those that its plan prints."""
    file = Path(__file__).parent.parent.parent / "studies" / f"{name}.yaml"
    study = load_study(file)
    assert isinstance(study.design, Search)
    said = re.search(
        r"up to (\d+) trials \((\d+) cells and (\d+) that confirm\)", study.source.text
    )
    assert said is not None
    made = plan(study, StudyRecord(tmp_path / "runs" / study.name))
    notes = " ".join(made.notes)
    assert f"up to {said[2]} cells" in notes and f"up to {said[3]} trials" in notes
    assert int(said[1]) == int(said[2]) + int(said[3])
    steps = {line.steps for line in made.trials} - {None}
    assert all(f"{number:,} steps" in study.source.text for number in steps)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("low: 1.0e-4, high: 1.0e-2", "low: 1.0e-3, high: 1.0e-3", "must be below high"),
        ("low: 1.0e-4", "low: 0.0", "needs low above 0"),
        ("only_if: {augmentation: strong}", "only_if: {augmentations: strong}", "augmentation"),
        ("only_if: {augmentation: strong}", "only_if: {augmentation: weak}", "no level of"),
        ("only_if: {augmentation: strong}", "only_if: strong", "the factor it hangs on"),
        ("design: {name: search, cells: 5}", "design: one_at_a_time", "only a search"),
        ("cells: 5}", "cells: 5, until: {gain_below: 0}}", "gain_below"),
    ],
)
def test_a_sweep_that_cannot_be_asked_is_refused_in_a_sentence(
    old: str, new: str, says: str
) -> None:
    """A range of one value, a logarithm of zero, a condition on nothing: each is said."""
    text = TEXT.format(cells=5, more="", confirm="false")
    assert old in text
    with pytest.raises(StudyError, match=re.escape(says)):
        parse_study(text.replace(old, new), path="sweep.yaml", root="/")
