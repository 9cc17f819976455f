"""What a plan has to know of a model is found out once for each shape, and needs torch once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ablate.recipes import openclip
from ablate.training.data.cache import cache_folder

STUDY = """\
recipe: openclip
baseline: {model: tiny-rn-a, train_data: t.tar, train_num_samples: 6400, imagenet_val: val,
  precision: fp32, batch_size: 16, warmup: 4, epochs: 1}
factors:
  wd: [0.2, 0.1]
  eps: [1.0e-8, 1.0e-6]
  lr: [5.0e-4, 1.0e-3]
  warmup: [4, 8]
  batch_size: [16, 32]
  epochs: [1, 2]
  grad_clip_norm: [null, 1.0]
design: full_factorial
seeds: [0]
objective: {margin: 0.005}
"""
PLAN = """\
import sys
from ablate.cli import app
sys.argv = ["ablate", "plan", "study.yaml", "--json"]
try:
    app.main()
finally:
    print("torch" in sys.modules, file=sys.stderr)
"""


def planned(folder: Path) -> tuple[str, bool]:
    """What `ablate plan` prints in a process of its own, and whether it needed torch."""
    done = subprocess.run(
        [sys.executable, "-c", PLAN], cwd=folder, capture_output=True, text=True, check=True
    )
    return done.stdout, done.stderr.rstrip().endswith("True")


def test_a_plan_sketches_each_shape_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """128 cells of four shapes are four sketches; the second plan says the same without torch."""
    monkeypatch.setenv("ABLATE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "study.yaml").write_text(STUDY)
    first, with_torch = planned(tmp_path)
    assert with_torch and len(list((cache_folder() / "sketches").iterdir())) == 4
    again, with_torch = planned(tmp_path)
    assert again == first and not with_torch


def test_a_sketch_hangs_on_the_shape_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other fields change no sketch but for how many checkpoints are kept; and each field of the
    shape makes one of its own."""
    monkeypatch.setenv("ABLATE_CACHE", str(tmp_path / "cache"))
    usual = {"model": "tiny-rn-a", "precision": "fp32"}
    plain = openclip.sketch(openclip.Config(**usual))
    same = openclip.sketch(openclip.Config(**usual, lr=1e-2, batch_size=7))
    assert same == plain
    others = ({"wd": 0.3}, {"precision": "bf16"}, {"siglip": True}, {"lock_image": True})
    for change in (*others, {"qk_norm": True}, {"ema_decay": 0.9}):
        assert openclip.sketch(openclip.Config(**{**usual, **change})) != plain
    assert openclip.sketch(openclip.Config(**usual, clip_updates=True)) == plain
    assert len(list((cache_folder() / "sketches").iterdir())) == 8, "by each field's own file"
    refused = openclip.Config(
        **usual, opt="timm/lamb", lr=1e-3, eps=1e-6, opt_kwargs={"nonsense": 1}
    )
    with pytest.raises(ValueError, match="opt_kwargs"):
        openclip.sketch(refused)
