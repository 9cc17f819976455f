"""The study of half-loaded weights, cut down and typed as its header says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

STUDIES = Path(__file__).parents[2] / "studies"
SMALL = {
    "train_data": "data/emoji-video/few_train.json", "val_data": "data/emoji-video/few_train.json",
    "num_frames": 2, "num_frames_test": 2, "batch_size": 16,
}  # fmt: skip
"""64 clips, found again by their captions: what was learnt of them shows within seconds."""


def run(folder: Path, *line: str) -> str:
    done = subprocess.run(
        [sys.executable, *line], cwd=folder, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def cut_down(name: str, folder: Path, *, keep: Sequence[str] = (), **fields: object) -> None:
    """Write the study of that name with these levels of `loading` and fields."""
    study = yaml.safe_load((STUDIES / f"{name}.yaml").read_text())
    study["baseline"] |= SMALL | fields
    if keep:
        study["factors"]["loading"] = {n: study["factors"]["loading"][n] for n in keep}
        expected = {f"loading={n}" for n in keep}
        study["hypothesis"] = {k: v for k, v in study["hypothesis"].items() if k in expected}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(study))


@pytest.mark.exhaustive
def test_half_loaded_weights_are_told_by_the_verdict(captioned: Path, tmp_path: Path) -> None:
    """Where names that do not match are passed over in silence nothing is loaded: retrieval is
    worse, which matters, and the page opens with what was expected of it. Nobody says that nothing
    was learnt, though four steps add nothing to weights that were trained before."""
    (tmp_path / "data").mkdir()
    os.symlink(captioned, tmp_path / "data" / "emoji-video")
    cut_down("retrieval_weights", tmp_path, epochs=20, eval_every=20, save_every=20)
    train = ("train", "retrieval_weights.yaml", "--out", "runs/retrieval_weights")
    run(tmp_path, "-m", "ablate", *train)
    run(tmp_path, str(STUDIES / "retrieval_files.py"), "runs/retrieval_weights")
    cut_down("retrieval_loading", tmp_path, keep=("whole", "silent_prefix"), epochs=1)
    run(tmp_path, "-m", "ablate", "launch", "retrieval_loading.yaml", "--cluster", "local", "--yes")
    said = json.loads(run(tmp_path, "-m", "ablate", "report", "runs/retrieval_loading", "--json"))
    assert [each["found"] for each in said["expected"]] == ["confirmed"]
    judged = said["questions"]["baseline"]
    [effect] = judged["contrasts"]
    assert (effect["level"], effect["verdict"], effect["direction"]) == (
        "silent_prefix", "MATTERS", "worse",
    )  # fmt: skip
    assert effect["delta"] < -0.1 and judged["unlearnt"] == ""
