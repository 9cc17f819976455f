"""A study whose search is pruned, and variants of it."""

from __future__ import annotations

WD = ("0.2", "0.1", "0.3", "0.4", "0.5", "0.6", "0.7", "0.8")
BETA2 = ("0.999", "0.98")

STUDY = f"""\
name: pruned
recipe: openclip
baseline: {{model: tiny-rn-a, train_data: t.tar, train_num_samples: 640, imagenet_val: val,
           precision: fp32, warmup: 2, batch_size: 64, epochs: 1, wd: 0.2}}
factors:
  wd: [{", ".join(WD)}]
  beta2: [{", ".join(BETA2)}]
design:
  name: search
  cells: 16
  sampler: grid
  sampler_seed: 3
  prune: {{rungs: [0.4, 0.6]}}
seeds: [0, 1]
"""


def with_prune(change: str, *more: tuple[str, str]) -> str:
    text = STUDY.replace("{rungs: [0.4, 0.6]}", change)
    for old, new in more:
        assert old in text
        text = text.replace(old, new)
    return text
