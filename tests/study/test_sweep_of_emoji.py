"""What a real sweep led to: thirty runs of studies/emoji_sweep.yaml, 2 December 2026."""

from __future__ import annotations

import csv
from pathlib import Path

from ablate.analysis.results import Result
from ablate.study import load_study, sweep
from ablate.study.controls import withheld

HERE = Path(__file__).parent


def test_nothing_poor_and_no_control_is_proposed_or_confirmed() -> None:
    """Its two best runs were of a control, and where nothing alike had run a poor setting had the
    longest tail: 6 of 15 confirming runs went to settings of 1 and 3 %, where 8 % had been seen,
    and the control was "the most promising setting"."""
    study = load_study(HERE.parent.parent / "studies" / "emoji_sweep.yaml")
    with (HERE / "assets" / "emoji_sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    names = [factor.name for factor in study.factors]
    results = [
        Result(tuple((name, row[name]) for name in names), 0, "completed", float(row["value"]))
        for row in rows
    ]
    found = sweep.answer_of(study, results)
    assert found is not None and found.next
    for cell in (*found.confirm, *(proposal.cell for proposal in found.next)):
        levels = dict(zip(names, cell, strict=True))
        assert not withheld(study, levels)
        assert levels["augmentation"] == "default" and levels["warmup"] == "100"
    baseline, *confirmed = sweep.to_confirm(study, results)
    assert baseline == study.cell({})
    assert len(confirmed) == sweep.CONFIRMED
