"""A whole study against what people do without us: a shell loop over the exported lines.

    pytest tests/bench/test_bench_study.py -m bench -s

Two settings of the quickstart with two seeds each, one after the other on the same machine, with
start, training, checkpoints and evaluation: `ablate launch`, then open_clip_train by `train.sh`,
then, with ROUNDS=2, both again. `train.sh` measures by `ablate evaluate`, as open_clip_train has
no classes but ImageNet's. And `speed: fast` against `speed: exact`, on 13 seeds.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from ablate.api import load

QUICKSTART = Path(__file__).parents[2] / "studies" / "quickstart.yaml"
CELLS = ("strong", "light")
SEEDS = (0, 1)

pytestmark = [pytest.mark.bench, pytest.mark.timeout(3600)]


def call(folder: Path, *words: str, **env: str) -> float:
    """Seconds that a command takes."""
    began = time.monotonic()
    done = subprocess.run(
        words,
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **env},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return time.monotonic() - began


def call_ablate(folder: Path, *words: str) -> float:
    return call(folder, sys.executable, "-m", "ablate", *words)


def write_study(path: Path, **asked: Any) -> Path:
    """The quickstart with other questions."""
    study: dict[str, Any] = yaml.safe_load(QUICKSTART.read_text(encoding="utf-8"))
    path.write_text(yaml.safe_dump({**study, "confirm": False, **asked}, sort_keys=False))
    return path


def seconds_of_parts(run: Path) -> dict[str, float]:
    """Where the trials' time went, summed over them."""
    parts = dict.fromkeys(("steps", "evaluation", "what was learnt", "the rest of a trial"), 0.0)
    for path in run.glob("trials/*/outcome.json"):
        wall = json.loads(path.read_text(encoding="utf-8"))["wall_s"]
        attempt = path.parent / "attempts" / "1"
        ended = attempt / "result.json"
        result = json.loads(ended.read_text(encoding="utf-8"))
        learnt = (attempt / "learning.json").stat().st_mtime - ended.stat().st_mtime
        known = {"steps": result["train_s"], "evaluation": result["eval_s"]}
        known["what was learnt"] = learnt
        for name, seconds in {**known, "the rest of a trial": wall - sum(known.values())}.items():
            parts[name] += seconds
    return parts


def test_a_study_against_a_loop(tmp_path: Path) -> None:
    """The same four runs: a study's wall time, and that of one exported line after another."""
    call_ablate(tmp_path, "data", "emoji")
    factors = {"augmentation": yaml.safe_load(QUICKSTART.read_text())["factors"]["augmentation"]}
    study = write_study(tmp_path / "two.yaml", factors=factors, seeds=list(SEEDS))
    run = tmp_path / "runs" / "two"
    ours, theirs = [], []
    for number in range(int(os.environ.get("ROUNDS", "1"))):
        shutil.rmtree(run, ignore_errors=True)
        ours.append(call_ablate(tmp_path, "launch", str(study), "--yes", "--cluster", "local"))
        parts = seconds_of_parts(run)
        spent = 0.0
        for cell in CELLS:
            for seed in SEEDS:
                out = tmp_path / f"best-{cell}-{seed}"
                if not out.is_dir():
                    cells = ("--cell", f"augmentation={cell}", "--seed", str(seed))
                    call_ablate(
                        tmp_path, "export", str(run), *cells, "--out", str(out), "--no-register"
                    )
                logs = tmp_path / f"logs-{number}-{cell}-{seed}"
                bin_first = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
                line = str(out / "train.sh")
                spent += call(tmp_path, "bash", line, LOGS=str(logs), PATH=bin_first)
        theirs.append(spent)
        told = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in parts.items())
        print(
            f"\nablate launch {ours[-1]:.1f} s (trials: {told}; start and end of the launch "
            f"{ours[-1] - sum(parts.values()):.1f} s); a loop over train.sh {spent:.1f} s: "
            f"{spent / ours[-1]:.2f} x"
        )
    assert sum(theirs) > sum(ours)


def test_fast_is_equivalent_to_exact(tmp_path: Path) -> None:
    """What `fast` rounds otherwise changes the score of the setting that the quickstart hands out
    by less than its margin; its baseline learns too little to say."""
    call_ablate(tmp_path, "data", "emoji")
    usual = yaml.safe_load(QUICKSTART.read_text())
    learns = {**usual["baseline"], "lr": 2.0e-3, **usual["factors"]["augmentation"]["light"]}
    asked = {"factors": {"speed": ["exact", "fast"]}, "seeds": list(range(13))}
    study = write_study(tmp_path / "speeds.yaml", baseline=learns, **asked)
    call_ablate(tmp_path, "launch", str(study), "--yes", "--cluster", "local")
    found = load(tmp_path / "runs" / "speeds").effects().set_index("level").loc["exact"]
    print(f"\nexact - fast: {found.to_dict()}")
    assert found["verdict"] == "EQUIVALENT"
