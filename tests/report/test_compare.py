"""Two studies side by side, what trials cost, and each trial's own line."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from synthetic import QUICK, study_of, write_study

from ablate.errors import AnalysisError
from ablate.records.files import read_json, write_json
from ablate.report.compare import compare
from ablate.report.page import read_page
from ablate.report.report import write_report
from ablate.runner.agenda import planned
from ablate.runner.plan.commands import commands_of
from ablate.runner.plan.plan import plan
from ablate.runner.status import summarise
from ablate.study.table import read_table

FEWER = QUICK.replace("seeds: [0, 1, 2, 3]", "seeds: [4, 5, 6]").replace("2.0e-3, 2", "3.0e-3, 2")


def test_a_study_compared_with_itself_differs_in_nothing(quick) -> None:
    """No difference of question, code or data; each effect is the report's own, and runs that
    both have count once in what is pooled."""
    found = compare(quick, quick)
    assert found.differences == () and found.shared_cells == len(read_table(*quick).cells)
    contrasts = [c for q in read_page(read_table(*quick)).questions for c in q.analysis.contrasts]
    assert [(p.factor, p.level) for p in found.effects] == [(c.factor, c.level) for c in contrasts]
    for pair, contrast in zip(found.effects, contrasts, strict=True):
        assert pair.one == pair.two and pair.one is not None and pair.one.delta == contrast.delta
        assert pair.pooled is None or pair.pooled.runs == pair.one.runs
    rows = {(row.factor, row.level): row for row in write_report(*quick).summary.rows}
    for pair in found.effects:
        row = rows[pair.factor, pair.level]
        assert pair.one.said.startswith(row.verdict) and row.delta in pair.one.said


def test_other_seeds_are_pooled_where_the_cells_are_the_same(quick, tmp_path: Path) -> None:
    """Seven seeds judge what both ran, more surely than either; a level that one lacks stands
    alone, and the report names seeds and levels as what differs."""
    study = study_of(tmp_path, FEWER)
    found = compare(quick, (study, write_study(tmp_path, study)))
    assert {item.name for item in found.differences} == {"seeds", "factors.lr"}
    pairs = {(pair.factor, pair.level): pair for pair in found.effects}
    beta2 = pairs["beta2", "0.98"]
    assert beta2.one and beta2.two and beta2.pooled and beta2.pooled.ci and beta2.one.ci
    assert beta2.pooled.runs == 7 and (beta2.one.runs, beta2.two.runs) == (4, 3)
    width = [ci[1] - ci[0] for ci in (beta2.pooled.ci, beta2.one.ci)]
    assert width[0] < width[1]
    assert pairs["lr", "0.002"].two is None and pairs["lr", "0.003"].one is None
    json.dumps(found.to_json())


def test_studies_of_different_measurements_are_not_compared(quick, tmp_path: Path) -> None:
    """Effects of different units are refused, with what to do."""
    study = study_of(tmp_path, QUICK.replace("imagenet_top1", "imagenet_top5"))
    with pytest.raises(AnalysisError, match="Name the same objective.metric"):
        compare(quick, (study, write_study(tmp_path, study)))


def test_a_price_is_told_by_plan_status_and_report(tmp_path: Path) -> None:
    """Hours times the price, of what is to run and of what was spent; nothing without a price."""
    text = QUICK + "budget: {price_per_gpu_hour: 2.5}\n"
    study = study_of(tmp_path, text)
    record = write_study(tmp_path, study)
    status = summarise(study, record, planned(study, record))
    assert status.price == pytest.approx(2.5 * status.worker_hours) and status.price > 0
    more = study_of(tmp_path, text.replace("3]", "3, 4]"))
    cost = plan(more, record).cost
    assert cost is not None and cost.price_p50 == pytest.approx(2.5 * cost.worker_hours_p50)
    assert "By budget.price_per_gpu_hour that is" in write_report(study, record).html.read_text()
    free = study_of(tmp_path, QUICK)
    assert summarise(free, record, planned(free, record)).price is None


def test_each_trial_has_its_line(tmp_path: Path, quick) -> None:
    """The line of every trial names its seed and levels; one without says why."""
    lines = commands_of(*quick)
    assert [line.trial_id for line in lines] == [trial.id for trial in planned(*quick)]
    for line in lines:
        words = shlex.split(line.command)
        assert words[words.index("--seed") + 1] == str(line.seed)
        if line.name.startswith("beta2="):
            assert words[words.index("--beta2") + 1] == line.name.removeprefix("beta2=")
    study = study_of(tmp_path, QUICK.replace("  wd: 0.1\n", "  wd: 0.1\n  fast_jpeg: true\n"))
    line = commands_of(study, quick[1])[0]
    assert line.command == "" and "fast_jpeg" in line.why_not


def test_processors_of_another_make_are_told(tmp_path: Path) -> None:
    """The same study on two makes of accelerator, and on both: numbers need not be the same."""
    text = QUICK.replace("seeds: [0, 1, 2, 3]", "seeds: [0]")
    sides = []
    for folder, makes in (("a", ["A100"]), ("b", ["A100", "H100"])):
        study = study_of(tmp_path / folder, text)
        record = write_study(tmp_path / folder, study)
        for trial in record.records():
            path = trial.folder / "attempts" / "1" / "result.json"
            write_json(path, {**read_json(path), "facts": {"makes": makes}})
        sides.append((study, record))
    told = {d.name: (d.one, d.two) for d in compare(*sides).differences}
    assert told["processors"] == ("A100", "A100, H100")
