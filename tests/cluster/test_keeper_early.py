"""A keeper that imports while a launch plans does not outlive a launch that starts nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml

QUICKSTART = Path(__file__).parents[2] / "studies" / "quickstart.yaml"


def marked(mark: str) -> Iterator[psutil.Process]:
    """Processes that were started with this mark in their environment."""
    for process in psutil.process_iter():
        try:
            if process.environ().get("ABLATE_TEST_MARK") == mark:
                yield process
        except psutil.Error:
            continue


@pytest.mark.parametrize(
    ("model", "told"),
    [("tiny-rn-a", "data/emoji"), ("no-such-model", "no-such-model")],
    ids=["without its data", "that cannot be planned"],
)
def test_a_launch_that_starts_nothing_leaves_no_process(
    tmp_path: Path, model: str, told: str
) -> None:
    """It says why, by its usual code, and the keeper that began beside it is gone."""
    content = yaml.safe_load(QUICKSTART.read_text(encoding="utf-8"))
    content["baseline"]["model"] = model
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    mark = uuid.uuid4().hex
    done = subprocess.run(
        [sys.executable, "-m", "ablate", "launch", "study.yaml", "--yes", "--cluster", "local"],
        cwd=tmp_path,
        env={**os.environ, "ABLATE_TEST_MARK": mark},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert told in done.stderr
    assert not list(marked(mark))
