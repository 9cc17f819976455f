"""A whole study against what people do without us: a shell loop over the exported lines.

    pytest tests/bench/test_bench_study.py -m bench -s

Two settings of the quickstart with two seeds each, one after the other on the same machine, with
start, training, checkpoints and evaluation: `ablate launch`, then open_clip_train by `train.sh`,
then, with ROUNDS=2, both again. `train.sh` measures by `ablate evaluate`, as open_clip_train has
no classes but ImageNet's. And `speed: fast` against `speed: exact`, on 13 seeds.
"""

from __future__ import annotations

import itertools
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
USUAL: dict[str, Any] = yaml.safe_load(QUICKSTART.read_text(encoding="utf-8"))
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
    path.write_text(yaml.safe_dump({**USUAL, "confirm": False, **asked}, sort_keys=False))
    return path


def export_lines(run: Path) -> list[Path]:
    """The exported line of each of its runs."""
    lines = []
    for cell, seed in itertools.product(CELLS, SEEDS):
        out = run.parent / f"{cell}-{seed}"
        which = ("--cell", f"augmentation={cell}", "--seed", str(seed), "--out", str(out))
        call_ablate(run.parents[1], "export", str(run), *which, "--no-register")
        lines.append(out / "train.sh")
    return lines


def seconds_of_parts(run: Path) -> dict[str, float]:
    """Where the trials' time went, summed over them."""
    parts = dict.fromkeys(("steps", "evaluation", "what was learnt", "the rest of a trial"), 0.0)
    for path in run.glob("trials/*/outcome.json"):
        wall = json.loads(path.read_text(encoding="utf-8"))["wall_s"]
        attempt = path.parent / "attempts" / "1"
        ended = attempt / "result.json"
        result = json.loads(ended.read_text(encoding="utf-8"))
        learnt = (attempt / "learning.json").stat().st_mtime - ended.stat().st_mtime
        seconds = [result["train_s"], result["eval_s"], learnt]
        for name, spent in zip(parts, [*seconds, wall - sum(seconds)], strict=True):
            parts[name] += spent
    return parts


def test_a_study_against_a_loop(tmp_path: Path) -> None:
    """The same four runs: a study's wall time, and that of one exported line after another."""
    call_ablate(tmp_path, "data", "emoji")
    factors = {"augmentation": USUAL["factors"]["augmentation"]}
    study = write_study(tmp_path / "two.yaml", factors=factors, seeds=list(SEEDS))
    run, found = tmp_path / "runs" / "two", []
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for number in range(int(os.environ.get("ROUNDS", "1"))):
        shutil.rmtree(run, ignore_errors=True)
        ours = call_ablate(tmp_path, "launch", str(study), "--yes", "--cluster", "local")
        parts, logs = seconds_of_parts(run), str(tmp_path / f"logs-{number}")
        lines = export_lines(run)
        theirs = sum(call(tmp_path, "bash", str(line), LOGS=logs, PATH=path) for line in lines)
        told = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in parts.items())
        print(
            f"\nablate launch {ours:.1f} s (trials: {told}; start and end of the launch "
            f"{ours - sum(parts.values()):.1f} s); a loop over train.sh {theirs:.1f} s: "
            f"{theirs / ours:.2f} x"
        )
        found.append(theirs / ours)
    assert min(found) > 1


def test_fast_is_equivalent_to_exact(tmp_path: Path) -> None:
    """What `fast` rounds otherwise changes the score of the setting that the quickstart hands out
    by less than its margin; its baseline learns too little to say."""
    call_ablate(tmp_path, "data", "emoji")
    learns = {**USUAL["baseline"], "lr": 2.0e-3, **USUAL["factors"]["augmentation"]["light"]}
    asked = {"factors": {"speed": ["exact", "fast"]}, "seeds": list(range(13))}
    study = write_study(tmp_path / "speeds.yaml", baseline=learns, **asked)
    call_ablate(tmp_path, "launch", str(study), "--yes", "--cluster", "local")
    found = load(tmp_path / "runs" / "speeds").effects().set_index("level").loc["exact"]
    print(f"\nexact - fast: {found.to_dict()}")
    assert found["verdict"] == "EQUIVALENT"
