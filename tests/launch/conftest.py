"""What the tests of launch places share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from slurm_cluster import MISSING, Slurm, running_slurm


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    if MISSING:
        pytest.skip(f"needs {', '.join(MISSING)} (Debian: slurm-wlm)")
    with running_slurm(tmp_path_factory.mktemp("slurm")) as made:
        yield made
