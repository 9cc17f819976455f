"""The file that tells agents how to drive the command line keeps its word."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import ablate

TEXT = (Path(ablate.__file__).parent / "SKILL.md").read_text(encoding="utf-8")


def test_the_commands_of_the_skill_file_run_as_they_stand(tmp_path: Path) -> None:
    """Its table is judged, its draft of a study is valid and planned; JSON is JSON, and the
    verdicts have the names that the file says."""
    for name, content in re.findall(r"```csv (\S+)\n(.*?)```", TEXT, re.DOTALL):
        (tmp_path / name).write_text(content)
    lines = [
        line
        for block in re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)
        for line in block.splitlines()
    ]
    assert len(lines) == 6
    printed = {}
    for line in lines:
        words = shlex.split(line)
        assert words[0] == "ablate"
        done = subprocess.run(
            [sys.executable, "-m", "ablate", *words[1:]],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, f"{line}\n{done.stderr}"
        printed[" ".join(words[1:3]), "--json" in words] = done.stdout
    verdicts = {
        row["level"]: row["verdict"] for row in json.loads(printed["analyze results.csv", True])
    }
    assert set(verdicts) == {"1000", "5e-3"} and verdicts["1000"] == "MATTERS"
    assert set(verdicts.values()) <= set(re.findall(r"[A-Z]{6,}", TEXT))
    (lucky,) = json.loads(printed["analyze lucky.csv", True])
    assert lucky["verdict"] == "INCONCLUSIVE" and lucky["needs_seeds"] >= 1 and lucky["ci"]
    assert "detectable" in json.loads(printed["plan study.yaml", True])
    assert "open_clip_train.main" in printed["plan study.yaml", False]
