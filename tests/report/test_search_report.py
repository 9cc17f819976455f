"""The report of a search: its front of score and cost, its factors, and the winner taken apart."""

from __future__ import annotations

import csv
import json
import math
import random

import pytest
from synthetic import EFFECTS, QUICK, study_of, write_study

from ablate.report.page import read_page
from ablate.report.pareto import pareto_front, weigh
from ablate.report.report import write_report
from ablate.study import design
from ablate.study.results import cost_of
from ablate.study.table import read_table

SEARCH = (
    QUICK.replace(
        "design: one_at_a_time",
        "design: {name: search, cells: 26, sampler: random, then: leave_one_out}",
    )
    .replace("seeds: [0, 1, 2, 3]", "seeds: [0, 1]")
    .replace("margin: 0.01}", "margin: 0.01, cost: peak_memory_gib}")
)
MEMORY = {("precision", "fp32"): 3.0, ("augmentation", "strong"): 0.5, ("lr", "0.02"): -3.0}
MATTERING = {factor for factor, _ in EFFECTS}


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """(study, record) of a search of 26 cells and of what follows it, all ended."""
    folder = tmp_path_factory.mktemp("search")
    study = study_of(folder, SEARCH, name="sweep")
    lot = random.Random(4)
    asked = [study.baseline_levels()]
    while len(asked) < 26:
        levels = {f.name: lot.choice([level.name for level in f.levels]) for f in study.factors}
        if levels not in asked:
            asked.append(levels)
    known = ()
    for _ in range(5):  # each round runs what the results so far ask for
        record = write_study(
            folder,
            study,
            asked=asked,
            results=known,
            memory=MEMORY,
            diverged={("lr", "0.02"): (1,)},
        )
        known = read_table(study, record).results
    return study, record


@pytest.fixture(scope="module")
def report(searched, tmp_path_factory):
    return write_report(*searched, folder=tmp_path_factory.mktemp("report"))


def test_the_front_is_what_no_other_cell_dominates():
    """Equal points stay together, and a point beaten in one and equal in the other is out."""
    merits = [(1.0, 5.0), (2.0, 4.0), (2.0, 4.0), (2.0, 3.0), (0.5, 5.0), (3.0, 1.0)]
    assert pareto_front(merits) == [True, True, True, False, False, True]
    lot = random.Random(0)
    cloud = [(lot.random(), lot.random()) for _ in range(200)]
    front = [point for point, on in zip(cloud, pareto_front(cloud), strict=True) if on]
    assert all(any(a >= x and b >= y for a, b in front) for x, y in cloud)
    front.sort()
    assert [y for _, y in front] == sorted((y for _, y in front), reverse=True)


def test_the_front_of_a_search_is_drawn_and_written(searched, report):
    """Picture, table, CSV and JSON hold the same front; a diverged run's cost is no bargain."""
    trade = weigh(read_table(*searched))
    assert trade is not None and trade.cost == "peak_memory_gib"
    folder = report.html.parent
    content = json.loads((folder / "pareto.json").read_text())
    with open(folder / "pareto.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    on = [cell for cell in content["cells"] if cell["on_front"]]
    assert [r["cell"] for r in rows if r["on_front"] == "1"] == [p.cell.name for p in trade.front]
    assert [cell["cost"] for cell in on] == [point.cost for point in trade.front]
    assert len(on) < len(rows) == len(content["cells"])
    scores = [cell["score"] for cell in on]
    assert scores == sorted(scores) and math.isfinite(scores[-1])
    html, markdown = report.html.read_text(), report.markdown.read_text()
    assert "peak_memory_gib, GiB" in html and "the Pareto front" in html
    for point in trade.front:
        assert point.cell.name in html and point.cell.name.split(",")[0] in markdown


def test_costs_are_those_of_completed_runs():
    """Each cost is read from the outcome; a run that diverged early is not cheap."""
    outcome = {
        "outcome": "completed",
        "wall_s": 1800.0,
        "train_s": 500.0,
        "step": 1000,
        "num_parameters": 7,
        "peak_memory_gib": None,
        "final": {"knn_top1": 0.25},
    }
    costs = ("gpu_hours", "mean_step_time_s", "num_parameters", "peak_memory_gib", "knn_top1")
    assert [cost_of(name, outcome, workers=4) for name in costs] == [2.0, 0.5, 7.0, None, 0.25]
    assert cost_of("gpu_hours", {**outcome, "outcome": "diverged"}, workers=4) is None
    assert cost_of(None, outcome, workers=4) is None


def test_a_search_is_answered_as_a_sweep(searched, report):
    """The report opens with what to use and what moved the score, over all cells that have run;
    nothing is compared level by level, and no seeds are asked for."""
    found = json.loads(report.verdicts_json.read_text())["search"]
    moved = [entry["factor"] for entry in found["factors"] if entry["verdict"] == "moved"]
    assert moved and set(moved) <= MATTERING | {"lr"}
    complete = {r.levels for r in read_table(*searched).results}
    assert found["cells"]["completed"] + found["cells"]["diverged"] >= len(complete)
    assert found["use"]["gain"]["low"] > 0
    for text in (report.html.read_text(), report.markdown.read_text()):
        answer = text[text.index("The answer") :]
        assert answer.index("Use ") < answer.index("moves the score by")
        assert "no seed in which both have a result" not in text
        assert "open comparisons" not in text


def test_the_winner_of_a_search_is_taken_apart(searched, report):
    """Each change of the best cell is reverted alone and made alone, and both are judged."""
    study, record = searched
    winner = design.winner(study, read_table(study, record).results)
    changed = {f for f, level in winner.items() if level != study.baseline_levels()[f]}
    asked = json.loads(report.verdicts_json.read_text())["questions"]
    assert list(asked) == ["reverted", "added"]
    assert {c["factor"] for c in asked["reverted"]["contrasts"]} == changed
    assert {c["factor"] for c in asked["added"]["contrasts"]} == changed
    assert "part of its lead is luck" in report.html.read_text()


def test_a_search_over_combinations_that_contradict_each_other_is_followed_up(tmp_path):
    """Fewer cells exist than were asked for: the winner is known when all of them have ended."""
    text = (
        "recipe: openclip\n"
        "baseline: {model: RN50, train_data: d.tar, train_num_samples: 640, "
        "imagenet_val: data/val}\n"
        "factors:\n"
        "  loss: {clip: {}, siglip: {siglip: true}}\n"
        "  gather: {no: {}, yes: {gather_with_grad: true}}\n"
        "design: {name: search, cells: 4, then: leave_one_out}\n"
        "seeds: [0, 1]\n"
    )
    study = study_of(tmp_path, text, name="few")
    asked = [{}, {"loss": "siglip"}, {"gather": "yes"}]  # siglip refuses gather_with_grad
    effects = {("loss", "siglip"): 0.1}
    record = write_study(tmp_path, study, asked=asked[:2], effects=effects, diverged={})
    assert design.winner(study, read_table(study, record).results) is None
    record = write_study(tmp_path, study, asked=asked, effects=effects, diverged={})
    winner = design.winner(study, read_table(study, record).results)
    assert winner == {"loss": "siglip", "gather": "no"}


def test_a_search_that_is_not_over_is_gone_on_with_as_it_is(tmp_path):
    """While cells are left, going on asks for no more of them; the report says how many are."""
    study = study_of(tmp_path, SEARCH, name="midway")
    names = [(f.name, level.name) for f in study.factors for level in f.levels]
    asked = [study.baseline_levels() | dict([pair]) for pair in names][:6]
    table = read_table(study, write_study(tmp_path, study, asked=asked))
    steps = [step for step in read_page(table).next if step.text.startswith("Go on")]
    assert len(steps) == 1 and "cells:" not in steps[0].code
    left = 26 - len({row.levels for row in table.rows})
    assert f"{left} of 26 cells are left" in steps[0].text


@pytest.mark.parametrize(
    ("asked", "gone", "says"),
    [
        ([{}], (), "a model needs four"),
        ([{}, {"lr": "0.02"}], (0, 1), "a model needs four"),
        ([{"lr": "0.02"}], (0, 1), "a model needs four"),
        ([], (), "there is nothing to say"),
    ],
)
def test_a_search_that_has_hardly_begun_is_reported(tmp_path, asked, gone, says):
    """One finished cell, hardly anything but divergence, nothing at all: a sentence, no error."""
    study = study_of(tmp_path, SEARCH, name="begun")
    missing = () if asked else [("baseline", "", seed) for seed in study.seeds]
    record = write_study(
        tmp_path, study, asked=asked, diverged={("lr", "0.02"): gone}, missing=missing
    )
    paths = write_report(study, record)
    for text in (paths.html.read_text(), paths.markdown.read_text()):
        assert says in text
