"""`ablate data check`: anybody's shards, before anything is trained on them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tars import pairs, write_tar


def check(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ablate", "data", "check", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_samples_and_faults_are_counted_with_their_place(tmp_path: Path) -> None:
    """What is whole is counted, a picture without a caption is named with its shard; a pattern
    without shards is an error of usage."""
    write_tar(tmp_path / "0.tar", pairs(3))
    write_tar(tmp_path / "1.tar", pairs(2, start=3)[:-1])
    shards = str(tmp_path / "{0..1}.tar")
    done = check(shards)
    assert done.returncode == 0, done.stderr
    assert "2 shards, 4 samples" in done.stdout
    assert "missing_caption" in done.stdout and "1.tar" in done.stdout
    found = json.loads(check(shards, "--json").stdout)
    assert (found["shards"], found["samples"]) == (2, 4)
    assert [fault["kind"] for fault in found["faults"]] == ["missing_caption"]
    assert check(str(tmp_path / "none-{0..3}.tar")).returncode == 2
