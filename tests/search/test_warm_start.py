"""Earlier studies inform a search: their cells are fitted by what they ran, and counted."""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest
from synthetic import study_of, write_study

from ablate.api import open_book
from ablate.errors import PlanError, RecordError
from ablate.records.folder import StudyRecord
from ablate.runner.plan import plan
from ablate.search.warm_start import earlier_studies
from ablate.study import Study
from ablate.study.table import read_table

BASE = """\
recipe: openclip
baseline: {model: tiny-rn-a, train_data: d.tar, train_num_samples: 640, imagenet_val: data/val,
           precision: fp32, warmup: 2, batch_size: 64, epochs: 4, beta2: 0.98, wd: 0.2}
"""

LAST_YEAR = f"""{BASE}factors:
  weight_decay: {{usual: {{}}, small: {{wd: 0.1}}, huge: {{wd: 0.9}}}}
  warmup: [2, 5]
design: full_factorial
seeds: [0, 1]
"""

SEARCH = f"""{BASE}factors:
  wd: [0.2, 0.1]
  warmup: {{low: 1, high: 4}}
  beta2: [0.98, 0.999]
design: {{name: search, cells: 5, warm_start: [runs/last_year]}}
seeds: [0, 1]
"""


def last_year(folder: Path, text: str = LAST_YEAR) -> Study:
    """A study that ended, but for one trial; in runs/last_year under `folder`."""
    study = study_of(folder, text, name="last_year")
    write_study(folder, study, effects={}, diverged={}, missing=[("weight_decay", "small", 1)])
    return study


def test_cells_are_fitted_by_their_configuration_and_the_rest_is_counted(tmp_path: Path) -> None:
    """Other names and a factor that was fixed do not matter; what has no level here is told."""
    last_year(tmp_path)
    [found] = earlier_studies(study_of(tmp_path, SEARCH, name="now"))
    assert [levels for levels, _ in found.cells] == [{"wd": "0.2", "warmup": "2", "beta2": "0.98"}]
    assert found.left == {
        "wd=0.9 is no level here": 2,
        "not every seed has ended with a score": 2,
        "warmup=5 is no level here": 1,
    }
    assert found.sentence.startswith("runs/last_year: 1 of 6 cells inform the sampler (")


def test_the_plan_says_what_was_taken_and_the_book_stores_it(tmp_path: Path) -> None:
    """Plan counts the cells; the storage shows them apart; the cell itself is still asked."""
    before = last_year(tmp_path)
    study = study_of(tmp_path, SEARCH, name="now")
    record = StudyRecord(tmp_path / "runs" / "now")
    notes = plan.plan(study, record).notes
    assert any(note.startswith("warm start: runs/last_year: 1 of 6 cells") for note in notes)
    with open_book(study, record, None) as book:
        assert book.ask() == study.cell({})
    stored = optuna.load_study(
        study_name="now", storage=f"sqlite:///{record.folder / 'optuna.db'}"
    ).trials
    assert [t.user_attrs.get("earlier_study") for t in stored] == ["runs/last_year", None]
    baseline = read_table(before, StudyRecord(tmp_path / "runs" / "last_year")).baseline
    assert stored[0].value == pytest.approx(baseline.mean)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (("seeds: [0, 1]", "objective: {metric: knn_top1}\nseeds: [0, 1]"), "objective knn_top1"),
        (
            ("seeds: [0, 1]", "objective: {metric: imagenet_top1, at: mean_last_k}\nseeds: [0, 1]"),
            "objective.at mean_last_k",
        ),
    ],
)
def test_a_study_that_says_nothing_here_is_refused(
    change: tuple[str, str], expected: str, tmp_path: Path
) -> None:
    """Another objective's scores must not teach the sampler."""
    last_year(tmp_path, LAST_YEAR.replace(*change))
    with pytest.raises(PlanError, match=f"runs/last_year has {expected}"):
        earlier_studies(study_of(tmp_path, SEARCH, name="now"))


def test_a_folder_without_a_study_is_named(tmp_path: Path) -> None:
    """A typo in the folder is told with the studies that are near."""
    last_year(tmp_path)
    text = SEARCH.replace("runs/last_year", "runs/last_yaer")
    with pytest.raises(RecordError, match="last_yaer holds no study.*last_year"):
        earlier_studies(study_of(tmp_path, text, name="now"))


def test_other_designs_take_nothing(tmp_path: Path) -> None:
    """Only a sampler can be informed."""
    assert earlier_studies(study_of(tmp_path, LAST_YEAR, name="last_year")) == ()
