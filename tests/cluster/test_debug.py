"""Trials in the caller's own process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from scripted_studies import TRIALS, Recorder, prepare

from ablate.cluster.contract import Attempt, Shape
from ablate.cluster.debug import DebugCluster
from ablate.errors import PlacementError
from ablate.records.folder import StudyRecord
from ablate.runner import controller, hold
from ablate.testing import ClusterContract


# A scripted worker leaves its files to the end of its process.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_study_runs_in_this_process_with_the_same_outcomes(tmp_path: Path) -> None:
    """Every rank is this process, a crash is retried, and the environment is as it was."""
    study = prepare(tmp_path, [{"match": {"warmup": 1}, "crashes": 1, "steps": 3}])
    record, told = StudyRecord(tmp_path / "runs" / study.name), Recorder()
    before = dict(os.environ)
    with hold.controlling(record), DebugCluster() as cluster:
        status = controller.launch(
            study, record, cluster=cluster, book=told, mirror=told, entry="tests.scripted:main"
        )
    assert status.outcomes == {"completed": TRIALS}
    assert sorted(len(folder.attempts()) for folder in record.records()) == [1, 1, 1, 1, 2, 2]
    assert dict(os.environ) == before


class TestDebug(ClusterContract):
    workers = 1

    @pytest.fixture
    def cluster(self) -> Iterator[DebugCluster]:
        with DebugCluster() as cluster:
            yield cluster


def test_what_needs_more_than_one_process_is_refused(tmp_path: Path) -> None:
    """A gang of two says that a debugger holds one process, and which key to change."""
    with DebugCluster() as cluster, pytest.raises(PlacementError, match="gang.workers: 1"):
        cluster.start(Attempt("a", 1, tmp_path, Shape(workers=2)))
