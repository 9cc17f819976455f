"""Optuna's Gaussian process, asked so that it sees all that a sweep has learnt."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from threadpoolctl import threadpool_info, threadpool_limits

from ablate.analysis.results import Result
from ablate.search.book import CellBook
from ablate.study import Study, parse_study


def make_study(factors: str) -> Study:
    text = f"""
recipe: openclip
baseline: {{model: RN50, train_data: x.tar, lr: 1.0e-3, batch_size: 64}}
factors:
{factors}
design: {{name: search, cells: 60, sampler: gp}}
seeds: [0]
objective: {{metric: imagenet_top1}}
"""
    return parse_study(text, path="studies/sweep.yaml", root="/")


def make_book(study: Study, folder: Path) -> CellBook:
    return CellBook(study, storage=folder / "optuna.db", score=lambda result: result.value)


def test_where_nothing_fits_is_not_asked_again_and_again(tmp_path: Path) -> None:
    """Two of five batch sizes do not fit, and larger ones are better: Optuna's GP, which is blind
    to what is not complete, asks there seldomer than lots would."""
    study = make_study("  batch_size: {low: 32, high: 1024, log: true}")
    book = make_book(study, tmp_path)
    beyond = []
    for _ in range(26):
        cell = book.ask()
        assert cell is not None
        size = float(dict(cell.levels)["batch_size"])
        beyond.append(size > 256)
        fits = [Result(cell.levels, 0, "completed", 0.1 + 0.02 * math.log2(size))]
        book.tell(cell, [Result(cell.levels, 0, "infeasible")] if beyond[-1] else fits)
    book.close()
    assert sum(beyond[10:]) <= 0.4 * len(beyond[10:])


@pytest.mark.parametrize(("factor", "end"), [("lr: {low: 1.0e-4, high: 1.0e-2, log: true}", 24),
                                             ("batch_size: {low: 60, high: 68}", 9)])  # fmt: skip
def test_a_range_is_used_up_only_when_every_value_of_it_is_known(
    tmp_path: Path, factor: str, end: int
) -> None:
    """A sampler that keeps coming back to the end of a range is given what lies beside it; 24
    learning rates are all new, nine whole numbers are all."""
    study = make_study(f"  {factor}")
    book = make_book(study, tmp_path)
    known = set()
    while len(known) < 24 and (cell := book.ask()) is not None:
        known.add(cell.levels)
        (level,) = dict(cell.levels).values()
        book.tell(cell, [Result(cell.levels, 0, "completed", float(level))])
    book.close()
    assert len(known) == end


CONDITIONAL = """
  lr: {low: 1.0e-4, high: 1.0e-2, log: true}
  augmentation:
    default: {}
    strong: {aug_cfg: {use_timm: true, scale: [0.4, 1.0], re_prob: 0.3}}
  erasing:
    only_if: {augmentation: strong}
    none: {aug_cfg: {use_timm: true, scale: [0.4, 1.0], re_prob: 0.0}}
"""


def test_a_factor_that_counts_in_some_cells_is_modelled_too(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """What counts only beside strong augmentation costs a point there, and is avoided after ten
    cells, without a warning of Optuna's that it was drawn by lot."""
    book = make_book(make_study(CONDITIONAL), tmp_path)
    asked = []
    for _ in range(26):
        cell = book.ask()
        assert cell is not None
        levels = dict(cell.levels)
        spoilt = 0.05 * (levels["erasing"] == "none") - 0.03 * (levels["augmentation"] == "strong")
        away = math.log10(float(levels["lr"])) + 3
        book.tell(cell, [Result(cell.levels, 0, "completed", 0.2 - 0.02 * away**2 - spoilt)])
        asked.append(levels["erasing"] == "none")
    book.close()
    assert sum(asked[10:]) <= 4
    assert "independently" not in capfd.readouterr().err


def test_its_fits_take_one_thread(tmp_path: Path, monkeypatch) -> None:
    """They run in the controller, on cores that train: threads that wait for one another took six
    times as long. The first fit is what imports torch."""
    seen = []
    asked = optuna.samplers.GPSampler.sample_relative

    def look(*args: Any) -> Any:
        seen.append({pool["num_threads"] for pool in threadpool_info()} | {torch.get_num_threads()})
        return asked(*args)

    monkeypatch.setattr(optuna.samplers.GPSampler, "sample_relative", look)
    book = make_book(make_study("  lr: {low: 1.0e-4, high: 1.0e-2, log: true}"), tmp_path)
    with threadpool_limits(limits=2):
        for score in (0.1, 0.2, 0.3, 0.4):
            cell = book.ask()
            assert cell is not None
            book.tell(cell, [Result(cell.levels, 0, "completed", score)])
    book.close()
    assert len(seen) > 1
    assert all(each == {1} for each in seen[1:])
