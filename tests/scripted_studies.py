"""Studies of the scripted worker: prepared and run by the study loop, on this machine."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ablate.analysis.results import Result
from ablate.cluster.local import LocalCluster
from ablate.records.folder import StudyRecord
from ablate.runner import controller, hold
from ablate.runner.status import StudyStatus
from ablate.study import Study, parse_study
from ablate.trial.identity import Cell, Trial

STUDY = """\
name: scripted
recipe: openclip
baseline: {model: tiny-rn-a, train_data: t.tar, imagenet_val: val, precision: fp32, warmup: 5}
factors:
  warmup: [5, 1]
  beta2: [0.999, 0.98]
design: one_at_a_time
seeds: [0, 1]
"""
TRIALS = 6


class Recorder:
    """A book and a mirror that only remember what they were told."""

    trouble = None

    def __init__(self) -> None:
        self.told: list[tuple[Cell, Sequence[Result]]] = []

    def begin(self, cell: Cell) -> None:
        pass

    def ask(self) -> Cell | None:
        return None

    def report(self, cell: Cell, rung: float, score: float) -> None:
        pass

    def tell(self, cell: Cell, results: Sequence[Result]) -> None:
        self.told.append((cell, results))

    def update(self, trials: Sequence[Trial], active: Sequence[str]) -> None:
        pass


def prepare(tmp_path: Path, rules: list[dict[str, Any]], text: str = STUDY) -> Study:
    (tmp_path / "script.json").write_text(json.dumps(rules))
    val = tmp_path / "val"
    for name in ("cat", "dog"):
        (val / name).mkdir(parents=True, exist_ok=True)
    (val / "classnames.json").write_text('["cat", "dog"]')
    (val / "templates.json").write_text('["a photo of a {}."]')
    return parse_study(text, path="s.yaml", root=tmp_path)


def run(
    study: Study,
    tmp_path: Path,
    *,
    stop_level: Callable[[], int] = lambda: 0,
    watch: Callable[[StudyStatus], None] = lambda status: None,
    cpus: float = 2,
) -> tuple[StudyStatus, StudyRecord, Recorder]:
    record = StudyRecord(tmp_path / "runs" / study.name)
    told = Recorder()
    with hold.controlling(record), LocalCluster(num_cpus=cpus) as cluster:
        status = controller.launch(
            study,
            record,
            cluster=cluster,
            book=told,
            mirror=told,
            stop_level=stop_level,
            watch=watch,
            entry="tests.scripted:main",
        )
    return status, record, told


def attempts(record: StudyRecord) -> dict[str, int]:
    return {folder.trial_id: len(folder.attempts()) for folder in record.records()}
