"""Study folders that tests only read."""

from __future__ import annotations

import pytest
from synthetic import study_of, write_study


@pytest.fixture(scope="session")
def quick(tmp_path_factory):
    """(study, record) of a complete study; not to be written to."""
    folder = tmp_path_factory.mktemp("quick")
    study = study_of(folder)
    return study, write_study(folder, study)
