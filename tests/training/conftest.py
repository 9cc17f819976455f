"""Data and caches that the tests of this folder share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from small_trials import make_data


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small data set; caches of it go to a folder of their own."""
    os.environ["ABLATE_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    return make_data(tmp_path_factory.mktemp("data") / "shapes")
