"""The study loop at scale, on a simulated cluster."""

from __future__ import annotations

import cProfile
import functools
import pstats
from pathlib import Path

import pytest
from simulated_cluster import SimulatedCluster

from ablate import design, runner
from ablate.records import StudyRecord
from ablate.search import CellBook
from ablate.status import StudyStatus
from ablate.study import Study, parse_study


class Nobody:
    """A mirror that nobody looks at."""

    trouble = None

    def update(self, trials: object, active: object) -> None:
        pass


def factorial(tmp_path: Path, *, cells: int, seeds: int) -> Study:
    """A full factorial of `cells` cells, a multiple of ten, with `seeds` seeds each."""
    val = tmp_path / "val"
    for name in ("cat", "dog"):
        (val / name).mkdir(parents=True, exist_ok=True)
    lrs = [f"{1e-3 * (1 + i / 1000):.6g}" for i in range(cells // 10)]
    text = f"""\
name: factorial-{cells}-{seeds}
recipe: openclip
baseline: {{model: tiny-rn-a, train_data: t.tar, imagenet_val: val, lr: {lrs[0]}, beta2: 0.9}}
factors:
  lr: [{", ".join(lrs)}]
  beta2: [{", ".join(f"0.9{i}" for i in range(10))}]
design: full_factorial
seeds: [{", ".join(map(str, range(seeds)))}]
"""
    return parse_study(text, path="s.yaml", root=tmp_path)


def run_simulated(
    study: Study, folder: Path, *, gangs: int
) -> tuple[StudyStatus, SimulatedCluster, cProfile.Profile]:
    """Run a study with the real loop, records and Optuna storage; the loop's calls are counted."""
    record = StudyRecord(folder / study.name)
    cluster = SimulatedCluster(gangs)
    profile = cProfile.Profile()
    score = functools.partial(design.score_of, study)
    book = CellBook(study, storage=folder / f"{study.name}.db", score=score)
    with runner.controlling(record):
        profile.enable()
        status = runner.launch(
            study, record, cluster=cluster, book=book, mirror=Nobody(), clock=cluster.clock
        )
        profile.disable()
    book.close()
    return status, cluster, profile


def test_a_trial_of_a_large_study_costs_what_one_of_a_small_study_costs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop's function calls per trial do not grow from 40 to 400 trials on as many seats."""
    # The picture for people is bounded as a share of the time, which would make the count random.
    monkeypatch.setattr(runner, "LOOKING_SHARE", 1e-12)
    calls = {}
    for cells in (20, 200):
        study = factorial(tmp_path, cells=cells, seeds=2)
        status, cluster, profile = run_simulated(study, tmp_path, gangs=cells)
        assert status.outcomes == {"completed": cells * 2}
        assert cluster.most_running == cells
        calls[cells] = pstats.Stats(profile).total_calls / (cells * 2)  # type: ignore[attr-defined]
    assert calls[200] < 1.2 * calls[20]


def test_a_simulated_study_is_taken_up_where_it_was(tmp_path: Path) -> None:
    """Launching a finished study again starts nothing and finds every outcome."""
    study = factorial(tmp_path, cells=20, seeds=2)
    run_simulated(study, tmp_path, gangs=4)
    status, cluster, _ = run_simulated(study, tmp_path, gangs=4)
    assert status.outcomes == {"completed": 40}
    assert cluster.most_running == 0
