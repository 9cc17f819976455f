"""Drawn shapes as folders of images: a training set and held-out images of the same classes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from small_trials import CLASSES, draw


def make_pictures(folder: Path, *, each: int = 12) -> Path:
    """train/CLASS/N.jpg and val/CLASS/N.jpg under `folder`, of four classes."""
    rng = np.random.default_rng(7)
    for split, count in (("train", each), ("val", 3)):
        for kind, name in enumerate(CLASSES):
            place = folder / split / name.replace(" ", "_")
            place.mkdir(parents=True)
            for number in range(count):
                (place / f"{number:02d}.jpg").write_bytes(draw(kind, rng))
    return folder


def list_few(root: Path) -> None:
    """few_train.json and few_val.json beside the whole lists."""
    for split in ("train", "val"):
        rows = json.loads((root / f"{split}.json").read_text())[:64]
        (root / f"few_{split}.json").write_text(json.dumps(rows))
