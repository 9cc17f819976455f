"""SkyPilot's own parser on the files that are written for it; on demand, since it installs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from synthetic import QUICK, study_of, write_study

from ablate.report.export import export_best

REPOSITORY = Path(__file__).parents[2]
VERSION = "0.14.1"
READ = """\
import json, sys, sky
task = sky.Task.from_yaml(sys.argv[1])
wanted = next(iter(task.resources))
print(json.dumps({"nodes": task.num_nodes, "run": task.run, "setup": task.setup,
                  "accelerators": wanted.accelerators, "spot": wanted.use_spot}))
"""


@pytest.mark.exhaustive
@pytest.mark.timeout(900)
def test_skypilot_reads_what_is_written_for_it(tmp_path: Path) -> None:
    """launch/sky/study.yaml is two spot nodes that end in `ablate launch`; an exported bundle's
    sky.yaml is one machine that runs its train.sh; a key that SkyPilot does not know is refused."""
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", python.parents[1]], check=True)
    subprocess.run([python, "-m", "pip", "install", "-q", f"skypilot=={VERSION}"], check=True)
    env = {**os.environ, "HOME": str(tmp_path)}
    env.pop("PYTHONPATH", None)

    def read(file: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [python, "-c", READ, file], cwd=tmp_path, env=env, capture_output=True, text=True
        )

    study = study_of(tmp_path, QUICK)
    best = export_best(study, write_study(tmp_path, study, diverged={})).folder
    launched = json.loads(read(REPOSITORY / "launch" / "sky" / "study.yaml").stdout)
    assert (launched["nodes"], launched["spot"]) == (2, True)
    assert launched["accelerators"] == {"H100": 8}
    assert 'ablate launch "$STUDY" --yes' in launched["run"]
    bundle = json.loads(read(best / "sky.yaml").stdout)
    assert (bundle["nodes"], bundle["run"]) == (1, "bash train.sh")
    assert bundle["setup"] == "pip install -r requirements.txt"

    wrong = tmp_path / "wrong.yaml"
    wrong.write_text((best / "sky.yaml").read_text().replace("resources:", "resource:"))
    refused = read(wrong)
    assert refused.returncode != 0 and "resource" in refused.stderr
