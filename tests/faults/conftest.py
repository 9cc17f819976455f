"""The stage that drills of one file share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from drills import Stage
from small_trials import make_data

from ablate.cluster.local import LocalCluster


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small data set; caches of it go to a folder of their own."""
    os.environ["ABLATE_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    return make_data(tmp_path_factory.mktemp("data") / "shapes")


@pytest.fixture(scope="session")
def stage(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """A warm cluster of two seats."""
    preload = ("ablate.recipes.openclip:PRELOAD",)
    with LocalCluster(num_cpus=2, preload=preload) as cluster:
        yield Stage(tmp_path_factory.mktemp("drills"), data, cluster)
