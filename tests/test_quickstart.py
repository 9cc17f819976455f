"""The quickstart's answer is the one that its header promises.

A finished run is judged where ABLATE_QUICKSTART names its folder; else it is made, in minutes.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ablate
from ablate.api import Run, open_run
from ablate.study import load_study

REPOSITORY = Path(__file__).parent.parent
FILE = REPOSITORY / "studies" / "quickstart.yaml"


def call(folder: Path, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "ablate", *words],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=3000,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    if given := os.environ.get("ABLATE_QUICKSTART"):
        return open_run(Path(given))
    folder = tmp_path_factory.mktemp("quickstart")
    call(folder, "data", "emoji")
    call(folder, "launch", str(FILE), "--yes", "--cluster", "local")
    return ablate.load(folder / "runs" / "quickstart")


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)  # whichever is first makes the run
def test_the_too_high_rate_diverges_and_is_diagnosed(run: Run) -> None:
    """All runs of lr=1.0 and no others end as diverged, early, named by markers; the likely cause
    of each is a learning rate that is too high."""
    from ablate.report.replay import diagnose_run

    results = run.results()
    lost = results[results["outcome"] == "diverged"]
    assert set(lost["lr"]) == {"1.0"} and len(lost) == 3
    assert (lost["step"] < 100).all() and set(results["outcome"]) == {"completed", "diverged"}
    found = diagnose_run(run.folder)
    for trial in lost["trial"]:
        assert found[trial][0]["cause"] == "learning rate too high"


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)  # whichever is first makes the run
def test_at_least_three_comparisons_are_decided(run: Run) -> None:
    """lr=1.0 is worse by its divergence, light augmentation is better, local_gather is the same."""
    effects = run.effects().set_index("level")
    decided = effects[effects["verdict"] != "INCONCLUSIVE"]
    assert {"1.0", "light", "local_gather"} <= set(decided.index)
    assert decided.loc["light", "delta"] > 0
    assert decided.loc["local_gather", "verdict"] == "EQUIVALENT"


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)  # whichever is first makes the run
def test_what_is_recommended_was_run_and_its_export_holds(run: Run) -> None:
    """Both changes together are handed out, measured on every seed, and each part of the export
    does what it says."""
    best = run.best()
    assert best.cell is not None
    assert {("lr", "0.002"), ("augmentation", "light")} <= set(best.cell.levels)
    results = run.results()
    together = results[(results["lr"] == "0.002") & (results["augmentation"] == "light")]
    assert len(together) == 3 and (together["outcome"] == "completed").all()
    said = call(run.folder.parent, "export", str(run.folder), "--verify", "--no-register")
    assert "BROKEN" not in said and (run.folder / "best" / "train.sh").is_file()


def test_the_header_says_what_the_file_asks() -> None:
    """Levels that the expected answer names are levels of the study, and it confirms."""
    study = load_study(FILE)
    said = FILE.read_text().partition("recipe:")[0]
    for name, level in re.findall(r"\b(\w+)=([\w.]+)(?=[ ,])", said):
        assert level in [item.name for item in study.factor(name).levels]
    assert study.confirm and "local_gather" in said


PLANNED = [
    path for path in sorted(FILE.parent.glob("*.yaml")) if "steps a trial" in path.read_text()
]


@pytest.mark.parametrize("path", PLANNED, ids=lambda path: path.stem)
def test_a_header_counts_as_plan_counts(path: Path) -> None:
    """The steps of a trial, cells and seeds that a header names are those of the plan."""
    from ablate.recipes.openclip import Config, num_steps
    from ablate.study import design

    header = re.sub(r"\n#\s*", " ", path.read_text().partition("recipe:")[0])
    study = load_study(path)
    cells, seeds = map(int, re.search(r"(\d+) cells x (\d+) seeds", header).groups())  # type: ignore[union-attr]
    assert (cells, seeds) == (len(design.cells(study)), len(study.seeds))
    config = Config(**study.baseline)
    steps = num_steps(config, workers=study.gang.workers, num_samples=config.train_num_samples)
    assert f"{steps:,} steps a trial" in header
