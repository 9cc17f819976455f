"""Shared settings of all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

# How long an example takes is the machine's affair, and the first one imports what it needs.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")

# Before anything imports torch, ray or mlflow: no hub, no telemetry, one thread a process unless
# the suite is run to see what other numbers of threads do.
os.environ.update(
    HF_HUB_OFFLINE="1",
    RAY_USAGE_STATS_ENABLED="0",
    MLFLOW_DISABLE_TELEMETRY="true",
    DO_NOT_TRACK="true",
    MPLBACKEND="agg",
)
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def quick(tmp_path_factory):
    """(study, record) of a complete study; not to be written to."""
    from synthetic import study_of, write_study

    folder = tmp_path_factory.mktemp("quick")
    study = study_of(folder)
    return study, write_study(folder, study)


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow store with all of its tables and nothing in them, to be copied: making one takes
    two seconds."""
    from ablate.tracking.mlflow.store import one_at_a_time

    file = tmp_path_factory.mktemp("store") / "mlflow.db"
    with one_at_a_time(f"sqlite:///{file}"):
        pass
    return file


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that no worker waits at the end for another one's."""
    items.sort(key=lambda item: "training" not in item.path.parts)
