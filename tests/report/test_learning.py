"""What may say that the runs of a study learnt nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from synthetic import QUICK, study_of, write_study

from ablate.report.learning import nothing_learnt
from ablate.study.table import StudyTable, read_table

MAE = """\
recipe: mae
baseline: {model: tiny, input_size: 32, data_path: data/train, val_path: data/val}
factors: {mask_ratio: [0.75, 0.5]}
seeds: [0, 1, 2]
objective: {metric: recon_gap, direction: maximize, margin: 0.01}
"""


def looked_at(folder: Path, text: str, *, shift: float = 0.0) -> StudyTable:
    """A finished study in which a look at each trial's weights found nothing learnt."""
    study = study_of(folder, text)
    table = read_table(study, write_study(folder, study, diverged={}), curves=False)

    def seen(row):
        return replace(row, learning="not learning", value=row.value + shift)

    cells = tuple(replace(c, trials=tuple(map(seen, c.trials))) for c in table.cells)
    return replace(table, cells=cells)


def test_an_objective_with_a_zero_of_its_own_outweighs_a_probe(tmp_path: Path) -> None:
    """Features that a probe of eighty images finds no better do not make a reconstruction that is
    clearly better than predicting nothing "nothing learnt"; one about as good as nothing is."""
    assert nothing_learnt(looked_at(tmp_path / "a", MAE)) == ""
    none = looked_at(tmp_path / "b", MAE, shift=-1.0)
    assert "none has learnt" in nothing_learnt(none)


def test_accuracy_above_guessing_is_no_proof_against_a_probe(tmp_path: Path) -> None:
    """Where guessing is all that is known of the metric, the look at the weights decides: features
    of random weights are better than guessing, too."""
    table = looked_at(tmp_path, QUICK)
    assert min(row.value or 0 for row in table.rows) > 0.05
    assert "none has learnt" in nothing_learnt(table)


def test_what_was_loaded_was_learnt_before(tmp_path: Path) -> None:
    """Of runs that began with given weights the look says what they learnt beside those: where
    they are clearly better than guessing it is no complaint, and at chance it is."""
    for folder, shift, complains in (("a", 0.0, False), ("b", -1.0, True)):
        table = looked_at(tmp_path / folder, QUICK, shift=shift)
        assert table.chance is not None
        cells = tuple(
            replace(c, trials=tuple(replace(r, learning="nothing added") for r in c.trials))
            for c in table.cells
        )
        assert bool(nothing_learnt(replace(table, cells=cells))) == complains


@pytest.mark.parametrize("word", ["learning", "undecided", ""])
def test_one_that_learnt_or_none_that_was_judged_is_no_complaint(tmp_path: Path, word: str) -> None:
    table = looked_at(tmp_path, QUICK)
    kept = "not learning" if word == "learning" else word
    cells = tuple(
        replace(c, trials=tuple(replace(row, learning=kept) for row in c.trials))
        for c in table.cells
    )
    first = cells[0]
    learnt = replace(first, trials=(replace(first.trials[0], learning=word), *first.trials[1:]))
    assert nothing_learnt(replace(table, cells=(learnt, *cells[1:]))) == ""
